"""Checkpoints that appear whole or not at all, hold no pickles, and are passed over when a byte of them is wrong.

A checkpoint is a folder `step-000123` of tensors in safetensors, a JSON state and a manifest of hashes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.common.errors import KubealignError
from components.common.files import read_json, replacing_folder, verify_manifest, write_json, write_manifest

KEEP = 2
"""Checkpoints kept: the newest, and one to fall back on."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training run needs to go on exactly where it was."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: Tensor
    history: list[dict[str, Any]]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` below `folder` and drop all but the newest `KEEP`."""
    with replacing_folder(folder / f"step-{checkpoint.step:06d}") as aside:
        for name, tensors in (
            ("parameters", checkpoint.parameters),
            ("optimizer", checkpoint.optimizer),
            ("rng", {"cpu": checkpoint.rng}),
        ):
            whole = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
            save_file(whole, aside / f"{name}.safetensors")
        write_json(aside / "state.json", {"step": checkpoint.step, "history": checkpoint.history})
        write_manifest(aside)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `folder` whose hashes are right.

    Returns:
        the checkpoint or None, and a sentence for each one that was passed over.
    """
    passed_over = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify_manifest(path)
        except KubealignError as error:
            passed_over.append(f"checkpoint {path.name} is damaged and passed over: {error}")
            continue
        state = read_json(path / "state.json")
        checkpoint = Checkpoint(
            step=state["step"],
            parameters=load_file(path / "parameters.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            rng=load_file(path / "rng.safetensors")["cpu"],
            history=state["history"],
        )
        return checkpoint, passed_over
    return None, passed_over


def pack_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors; `names` are its parameters' in order."""
    state: Mapping[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `pack_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        state.setdefault(names.index(name), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
