"""history.jsonl: the record of every optimiser step, for checkpoints, curves and diagnosis."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from components.common.documents import parse_document
from components.common.errors import InputError
from components.common.files import write_text


@dataclass(frozen=True)
class StepRecord:
    """Results of one optimiser step: `metrics` of the objective, `validation` loss and metrics after the step."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    memory_mib: float
    """Peak memory so far of this process, or of its GPU."""
    metrics: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def write_history(path: Path, records: Sequence[StepRecord]) -> None:
    """Write a step record per line."""
    write_text(path, "".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_history(path: Path, may_be_empty: bool = False) -> list[StepRecord]:
    """Read the step records.

    Args:
        path: the file.
        may_be_empty: whether a training without a step is expected, as of `sft.epochs: 0`.

    Raises:
        InputError: the file is missing or has no line, or a line is no step record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; run the step that writes it") from error
    if not lines and not may_be_empty:
        raise InputError(f"{path}: no steps; expected at least one")
    return [parse_document(line, StepRecord, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
