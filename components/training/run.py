"""Training code shared by sft and dpo: examples, models, checkpoint folders, and MLflow metrics of the loop."""

import fcntl
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.common.errors import InputError
from components.common.files import digest, replacing_folder
from components.common.provenance import code_digest
from components.config.model import ExecutionConfig
from components.dataset.chat import encode, encode_conversation
from components.dataset.records import Instruction, Preference
from components.engine.hardware import hardware, native_precision
from components.engine.history import StepRecord
from components.engine.loop import LoopSettings, Objective, TrainingSet, Validation, best_step, train
from components.engine.models import (
    PackedModel,
    adapted_share,
    add_lora,
    load_adapter,
    load_causal_lm,
    select_packing,
    shard,
)
from components.engine.packing import Example
from components.engine.processes import processes
from components.orders import make_order
from components.stages import BY_NAME
from components.tracking import store
from components.tracking.run import StageRun, is_main_process
from components.training.checkpoint_mirror import Mirror
from components.training.config import OptimizerConfig

LOG_EVERY_STEPS = 20


def pair_examples(tokenizer: Any, rows: list[Preference]) -> list[Example]:
    """Preference pairs as examples with two completions: chosen, then rejected."""
    examples = []
    for row in rows:
        prompt, chosen = encode(tokenizer, row.prompt, row.chosen)
        _, rejected = encode(tokenizer, row.prompt, row.rejected)
        examples.append(Example(prompt, [chosen, rejected]))
    return examples


def instruction_examples(tokenizer: Any, rows: list[Instruction], train_on_turns: str) -> list[Example]:
    """Instructions as examples with one completion; `all` also trains on the earlier answers of a conversation."""
    if train_on_turns == "last":
        encoded = [encode(tokenizer, row.prompt, row.response) for row in rows]
        return [Example(prompt, [completion]) for prompt, completion in encoded]
    conversations = [encode_conversation(tokenizer, row.prompt, row.response) for row in rows]
    return [Example(prompt, [completion], answers) for prompt, completion, answers in conversations]


def resolve_precision(model: ExecutionConfig) -> ExecutionConfig:
    """The configuration with precision and hardware resolved.

    Raises:
        InputError: the run was resolved for other hardware, on which the same configuration yields other weights.
    """
    local = hardware()
    resolved = model.resolved(local)
    expected = resolved.model_copy(update={"hardware": "auto"}).resolved(local)
    if resolved.hardware != expected.hardware:
        raise InputError(
            f"model.hardware={resolved.hardware}: this run in {resolved.precision} is for that hardware, but this"
            f" machine is {local}, which would yield other weights; set model.hardware={local} or"
            " model.precision=fp32, or run it on that hardware"
        )
    return resolved


def open_model(run: StageRun, path: Path, config: ExecutionConfig, trains: bool) -> PackedModel:
    """Load the model of a local folder as configured.

    Args:
        run: logs the choice of packing, and a precision that this machine emulates.
        path: model folder.
        config: model section with its precision resolved.
        trains: whether to prepare it for training (full fine-tuning, gradient checkpointing).
    """
    if config.precision == "auto":
        raise ValueError("model.precision is auto; call resolve_precision() first")
    if config.precision == "bf16" and native_precision() != "bf16":
        run.log("no bf16 hardware support: frozen weights are stored in bf16, matrix products are computed in fp32")
    full = trains and config.finetuning == "full"
    lm = load_causal_lm(path, config.precision, full, config.quantization)
    model = PackedModel(lm, config.precision, "fp32" if config.lm_head_precision == "fp32" else None)
    run.log(select_packing(model, config.max_length))
    if trains and config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if full and processes().num_processes > 1:
        shard(model)
    return model


def open_tuned(
    run: StageRun, base: Path, tuned: Path, config: ExecutionConfig, name: str, trains: bool = False
) -> PackedModel:
    """Load the model that sft or dpo wrote to `tuned`: its adapter `name` on the base model, or its full weights."""
    if not (tuned / "adapter").is_dir():
        return open_model(run, tuned / "model", config, trains)
    model = open_model(run, base, config, trains)
    model.lm = load_adapter(model.lm, tuned / "adapter", name)
    return model


def add_adapter(run: StageRun, model: PackedModel, name: str, config: OptimizerConfig) -> None:
    """Add a trainable adapter as a stage configures it, and say how much of the model it changes."""
    model.lm = add_lora(
        model.lm,
        name,
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_targets,
        config.seed,
        config.use_rslora,
    )
    run.log(f"LoRA of rank {config.lora_rank} on {adapted_share(model.lm):.1%} of the weights")
    if getattr(model.causal_lm.config.get_text_config(), "router_aux_loss_coef", None):
        run.log("the router's auxiliary loss is no part of the objective; its weights train by the answers alone")


def loop_settings(config: OptimizerConfig) -> LoopSettings:
    """The training loop's subset of a stage's configuration."""
    return LoopSettings(**{name: getattr(config, name) for name in LoopSettings.__dataclass_fields__})


@contextmanager
def checkpoint_folder(stage: str, config: OptimizerConfig, model: ExecutionConfig, *inputs: str) -> Iterator[Path]:
    """The checkpoint folder of a training, keyed by its order and inputs and locked by one process at a time.

    Args:
        stage: `sft` or `dpo`.
        config: section of the stage.
        model: how the model is run and tuned.
        inputs: content hashes of data and models.
    """
    n_processes = processes().num_processes
    sections = {stage: config.model_dump(mode="json"), "model": model.execution_settings()}
    order = make_order(BY_NAME[stage], sections, {}, code_digest(stage))
    key = digest([order.digest, inputs, n_processes])[:24]
    folder = store.home() / "checkpoints" / f"{stage}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        processes().wait_for_everyone()
        yield folder
        return
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Mirror(folder).download()
        processes().wait_for_everyone()
        yield folder


@contextmanager
def stage_output(out: Path) -> Iterator[Path]:
    """The folder for a stage's output, which becomes `out` atomically; output of non-zero ranks is discarded."""
    if is_main_process():
        with replacing_folder(out) as folder:
            yield folder
    else:
        with TemporaryDirectory() as scratch:
            yield Path(scratch)
    processes().wait_for_everyone()


def run_training(
    run: StageRun,
    model: PackedModel,
    data: TrainingSet,
    objective: Objective,
    config: OptimizerConfig,
    checkpoints: Path,
    show: Callable[[StepRecord], dict[str, float]],
    validate: Validation,
    stateless_objective: bool = True,
) -> list[StepRecord]:
    """Train, with a progress line on the terminal and the metrics of every step in MLflow.

    Args:
        show: values for the progress line besides loss and speed.
        validate: computes loss and metrics on the validation split.
        stateless_objective: whether the objective leaves the model unchanged.
    """
    records: list[StepRecord] = []
    logged = 0
    mirror = Mirror(checkpoints) if is_main_process() else None
    for record in train(
        model, data, objective, loop_settings(config), checkpoints, run.log, validate, stateless_objective
    ):
        records.append(record)
        if mirror:
            mirror.upload()
        metrics = {"loss": record.loss, "tokens_per_s": record.tokens / record.seconds} | show(record)
        run.progress(record.step, record.total_steps, metrics=metrics)
        if len(records) - logged >= LOG_EVERY_STEPS:
            run.log_metrics([(r.step, step_metrics(r)) for r in records[logged:]])
            logged = len(records)
    if mirror:
        mirror.upload()
    run.log_metrics([(r.step, step_metrics(r)) for r in records[logged:]])
    return records


def best_validation_metrics(records: list[StepRecord], validate: Validation) -> tuple[float, dict[str, float]]:
    """Validation loss and metrics of the parameters that training kept, as recorded then or else computed now."""
    best = best_step(records)
    if not best:
        return validate()
    metrics = dict(next(record.validation for record in records if record.step == best))
    return metrics.pop("loss"), metrics


def step_metrics(record: StepRecord) -> dict[str, float]:
    """The MLflow metrics of a step."""
    values = {
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
    } | record.metrics
    values["tokens_per_second"] = record.tokens / record.seconds
    values["memory_mib"] = record.memory_mib
    named = {f"train/{name}": value for name, value in values.items()}
    named |= {f"validation/{name}": value for name, value in record.validation.items()}
    return {name: value for name, value in named.items() if math.isfinite(value)}
