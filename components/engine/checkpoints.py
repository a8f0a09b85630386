"""Checkpoints that appear whole or not at all, hold no pickles, and are passed over when a byte of them is wrong.

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
"""Parts of a checkpoint that are tensors, each in a file of its own."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training run needs to go on exactly where it was."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    """State of the random numbers by process: of the CPU, and of its GPU as `<process>.cuda`."""
    history: list[StepRecord]


class State(TypedDict):
    """state.json of a checkpoint."""

    step: int
    history: list[StepRecord]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 0) -> None:
    """Write `checkpoint` below `folder` and drop all but the newest `KEEP` and that of step `keep`."""
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
    """The checkpoint of a step; all processes must ask, and the main one reads: further machines' disks lack it.

    Raises:
        KubealignError: it is not there, or a byte of it is wrong.
    """
    found = _from_main_process(_load(folder, step) if _is_main_process() else None)
    assert found is not None
    return found


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `folder` whose hashes are right; all processes must ask.

    Returns:
        the checkpoint or None, and a sentence for each one that was passed over (in the main process).
    """
    found, passed_over = _load_newest(folder) if _is_main_process() else (None, [])
    return _from_main_process(found), passed_over


def _load(folder: Path, step: int) -> Checkpoint:
    path = _path(folder, step)
    verify_manifest(path)
    state = read_document(path / "state.json", State)
    tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
    return Checkpoint(step=state["step"], history=state["history"], **tensors)


def _load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    passed_over: list[str] = []
    for path in reversed(stored(folder)):
        try:
            return _load(folder, int(path.name.removeprefix("step-"))), passed_over
        except KubealignError as error:
            passed_over.append(f"checkpoint {path.name} is damaged and passed over: {error}")
    return None, passed_over


def _is_main_process() -> bool:
    main: bool = processes().is_main_process
    return main


def _from_main_process(found: Checkpoint | None) -> Checkpoint | None:
    """The main process's checkpoint, in all processes; what the others give is not looked at."""
    state = processes()
    if state.num_processes == 1:
        return found
    told: list[Any] = [None]
    if found:
        shapes = {part: {key: (t.shape, t.dtype) for key, t in getattr(found, part).items()} for part in TENSORS}
        told = [(found.step, found.history, shapes)]
    told = broadcast_object_list(told)
    if told[0] is None:
        return None
    step, history, shapes = told[0]
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in TENSORS}
    for part, entries in shapes.items():
        for key, (shape, dtype) in entries.items():
            own = getattr(found, part)[key] if found else torch.empty(shape, dtype=dtype)
            tensors[part][key] = broadcast(own.to(state.device)).cpu()
    return Checkpoint(step=step, history=history, **tensors)


def stored(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or damaged, the oldest first."""
    return sorted(folder.glob("step-*"))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that is sharded over processes (all of them must ask); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Put saved values back into the parameters, sharded ones included."""
    for name, parameter in parameters.items():
        parameter.copy_(_placed(saved[name], parameter))


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor) and tensor.ndim:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors; `names` are its parameters' in order."""
    state: Mapping[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": whole(value) for index, entry in state.items() for key, value in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `pack_optimizer` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        index = names.index(name)
        state.setdefault(index, {})[field] = _placed(tensor, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
