"""What sft and dpo share: from rows to examples, from configuration to the loop, and what MLflow hears of the steps."""

import fcntl
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.common import tracking
from components.common.chat import encode
from components.common.config import OptimiserConfig
from components.common.files import digest, write_text
from components.common.identity import code_digest
from components.common.records import Instruction, Preference
from components.training.loop import LoopSettings, Objective, StepRecord, TrainingSet, train
from components.training.models import PackedModel
from components.training.packing import Example

LOG_EVERY_STEPS = 20


def pair_examples(tokenizer: Any, rows: list[Preference]) -> list[Example]:
    """Preference pairs as examples with two completions: chosen, then rejected."""
    examples = []
    for row in rows:
        prompt, chosen = encode(tokenizer, row.prompt, row.chosen)
        _, rejected = encode(tokenizer, row.prompt, row.rejected)
        examples.append(Example(prompt, [chosen, rejected]))
    return examples


def instruction_examples(tokenizer: Any, rows: list[Instruction]) -> list[Example]:
    """Instructions as examples with one completion."""
    encoded = [encode(tokenizer, row.prompt, row.response) for row in rows]
    return [Example(prompt, [completion]) for prompt, completion in encoded]


def loop_settings(config: OptimiserConfig) -> LoopSettings:
    """The loop's part of a stage's configuration."""
    return LoopSettings(**{name: getattr(config, name) for name in LoopSettings.__dataclass_fields__})


@contextmanager
def checkpoint_folder(stage: str, config: OptimiserConfig, *inputs: str) -> Iterator[Path]:
    """The folder of this very training: same stage, configuration, inputs and code; held by one process at a time.

    Args:
        stage: `sft` or `dpo`.
        config: of the stage.
        inputs: content hashes of data and models.
    """
    key = digest([stage, config.model_dump(mode="json"), inputs, code_digest(stage)])[:24]
    folder = tracking.home() / "checkpoints" / f"{stage}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def run_training(
    run: tracking.StageRun,
    model: PackedModel,
    data: TrainingSet,
    objective: Objective,
    config: OptimiserConfig,
    checkpoints: Path,
    show: Callable[[StepRecord], dict[str, str]],
) -> list[StepRecord]:
    """Train, with progress on the terminal and every step in MLflow.

    Args:
        show: what the progress line says of a step besides loss and speed.
    """
    records: list[StepRecord] = []
    logged = 0
    for record in train(model, data, objective, loop_settings(config), checkpoints, run.say):
        records.append(record)
        speed = f"{record.tokens / record.seconds:.0f}"
        run.progress(record.step, record.total_steps, loss=f"{record.loss:.4f}", tokens_per_s=speed, **show(record))
        if len(records) - logged >= LOG_EVERY_STEPS or record.step == record.total_steps:
            run.log_metrics([(r.step, step_metrics(r)) for r in records[logged:]])
            logged = len(records)
    return records


def step_metrics(record: StepRecord) -> dict[str, float]:
    """A step as MLflow metrics."""
    values = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm} | record.metrics
    values["tokens_per_second"] = record.tokens / record.seconds
    return {f"train/{name}": value for name, value in values.items() if math.isfinite(value)}


def write_history(path: Path, records: list[StepRecord]) -> None:
    """Every step as a JSON line, for the report's curves."""
    write_text(path, "".join(json.dumps(asdict(record)) + "\n" for record in records))
