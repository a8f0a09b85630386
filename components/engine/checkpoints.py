"""Checkpoints: written atomically, without pickles, and skipped when a byte of them is wrong.

A checkpoint is a folder `step-000123` of tensors in safetensors, a JSON state and a manifest of hashes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import TypedDict

from components.common.documents import read_document
from components.common.errors import KubealignError
from components.common.files import replacing_folder, verify_manifest, write_json, write_manifest
from components.engine.history import StepRecord
from components.engine.processes import processes

KEEP = 2
"""Checkpoints kept: the newest, and one to fall back on."""
TENSORS = ("parameters", "optimizer", "rng")
"""Parts of a checkpoint that are tensors, one file each."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training run needs to resume exactly where it was."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    """Random state by process: of the CPU, and of its GPU as `<process>.cuda`."""
    history: list[StepRecord]


class State(TypedDict):
    """state.json of a checkpoint."""

    step: int
    history: list[StepRecord]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 0) -> None:
    """Write `checkpoint` below `folder` and delete all but the newest `KEEP` and that of step `keep`."""
    with replacing_folder(_path(folder, checkpoint.step)) as aside:
        for name in TENSORS:
            tensors: dict[str, Tensor] = getattr(checkpoint, name)
            whole = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
            save_file(whole, aside / f"{name}.safetensors")
        records = [asdict(record) for record in checkpoint.history]
        write_json(aside / "state.json", {"step": checkpoint.step, "history": records})
        write_manifest(aside)
    for old in stored(folder)[:-KEEP]:
        if old != _path(folder, keep):
            shutil.rmtree(old)


def load(folder: Path, step: int) -> Checkpoint:
    """Load the checkpoint of a step; all processes must call this, and rank 0 reads: other machines' disks lack it.

    Raises:
        KubealignError: it is missing, or a byte of it is wrong.
    """
    checkpoint = _from_main_process(_load(folder, step) if _is_main_process() else None)
    assert checkpoint is not None
    return checkpoint


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint below `folder` whose hashes are right; all processes must call this.

    Returns:
        the checkpoint or None, and on rank 0 a sentence for each damaged one that was skipped.
    """
    checkpoint, skipped = _load_newest(folder) if _is_main_process() else (None, [])
    return _from_main_process(checkpoint), skipped


def _load(folder: Path, step: int) -> Checkpoint:
    path = _path(folder, step)
    verify_manifest(path)
    state = read_document(path / "state.json", State)
    tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
    return Checkpoint(step=state["step"], history=state["history"], **tensors)


def _load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    skipped: list[str] = []
    for path in reversed(stored(folder)):
        try:
            return _load(folder, int(path.name.removeprefix("step-"))), skipped
        except KubealignError as error:
            skipped.append(f"checkpoint {path.name} is damaged and passed over: {error}")
    return None, skipped


def _is_main_process() -> bool:
    main: bool = processes().is_main_process
    return main


def _from_main_process(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Broadcast rank 0's checkpoint; the argument is ignored on other ranks."""
    state = processes()
    if state.num_processes == 1:
        return checkpoint
    header: list[Any] = [None]
    if checkpoint:
        shapes = {part: {key: (t.shape, t.dtype) for key, t in getattr(checkpoint, part).items()} for part in TENSORS}
        header = [(checkpoint.step, checkpoint.history, shapes)]
    header = broadcast_object_list(header)
    if header[0] is None:
        return None
    step, history, shapes = header[0]
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in TENSORS}
    for part, entries in shapes.items():
        for key, (shape, dtype) in entries.items():
            tensor = getattr(checkpoint, part)[key] if checkpoint else torch.empty(shape, dtype=dtype)
            tensors[part][key] = broadcast(tensor.to(state.device)).cpu()
    return Checkpoint(step=step, history=history, **tensors)


def stored(folder: Path) -> list[Path]:
    """The checkpoints in a folder, intact or damaged, oldest first."""
    return sorted(folder.glob("step-*"))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over processes (all of them must call this); return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into the parameters, sharded ones included."""
    for name, parameter in parameters.items():
        parameter.copy_(_placed(saved[name], parameter))


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors; `names` are those of its parameters, in order."""
    state: Mapping[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": whole(value) for index, entry in state.items() for key, value in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Load the result of `pack_optimizer` into the optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        index = names.index(name)
        state.setdefault(index, {})[field] = _placed(tensor, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
