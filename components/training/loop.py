"""One optimiser loop for SFT and DPO, on accelerate: deterministic steps, checkpoints by time, exact resume.

`train` is a generator of step records; the caller logs them and draws progress. What is minimised comes in as an
objective, so the loop knows neither pairs nor losses.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from components.common.errors import TrainingStop
from components.training import checkpoints
from components.training.models import PackedModel, trainable_state
from components.training.packing import Example, Pack, Step, fill_packs, pack, plan_steps

Objective = Callable[[Tensor, Pack, list[int], float], tuple[Tensor, dict[str, float]]]
"""(token log-probs [N], pack, example indices of the pack, normaliser of the step) -> (loss, metrics).

Loss and metrics are this pack's share of the step: summed over the packs of a step they give the step's value."""


@dataclass(frozen=True)
class LoopSettings:
    """How to optimise; the fields mean what the configuration's fields of the same name say."""

    epochs: float
    max_steps: int
    batch_size: int
    max_tokens_per_step: int
    lr: float
    warmup_ratio: float
    schedule: str
    weight_decay: float
    max_grad_norm: float
    seed: int
    checkpoint_every_s: float


@dataclass(frozen=True)
class TrainingSet:
    """Examples with their record ids (for messages) and their weight in the loss's normaliser."""

    examples: Sequence[Example]
    ids: Sequence[str]
    weights: Sequence[float]

    def n_tokens(self) -> list[int]:
        """Tokens of each example in a pack."""
        return [example.n_tokens for example in self.examples]


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did; `metrics` are the objective's."""

    step: int
    total_steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


def plan(data: TrainingSet, settings: LoopSettings) -> list[Step]:
    """The steps of the run, cut at `max_steps` when that is above 0."""
    steps = plan_steps(
        data.n_tokens(), settings.epochs, settings.batch_size, settings.max_tokens_per_step, settings.seed
    )
    return steps[: settings.max_steps] if settings.max_steps > 0 else steps


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """Learning rate of step 1 .. total: linear warm-up over `warmup_ratio` of them, then the schedule down to 0."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup - 1) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.lr * shape[settings.schedule]


def train(
    model: PackedModel,
    data: TrainingSet,
    objective: Objective,
    settings: LoopSettings,
    checkpoint_folder: Path,
    say: Callable[[str], None],
) -> Iterator[StepRecord]:
    """Train the trainable parameters of `model`, from the newest sound checkpoint if there is one.

    Yields:
        a record per optimiser step; when resumed, first the records of the steps already done.

    Raises:
        TrainingStop: a loss or gradient that is not finite, with the ids of the records in that step.
    """
    accelerator = Accelerator(mixed_precision="no")
    parameters = trainable_state(model)
    names = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True, betas=(0.9, 0.999)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    steps = plan(data, settings)
    torch.manual_seed(settings.seed)
    history: list[StepRecord] = []
    checkpoint, passed_over = checkpoints.load_newest(checkpoint_folder)
    for sentence in passed_over:
        say(sentence)
    if checkpoint:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(checkpoint.parameters[name])
        checkpoints.unpack_optimizer(optimizer.optimizer, names, checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng)
        history = [StepRecord(**record) for record in checkpoint.history]
        say(f"resuming after step {checkpoint.step} of {len(steps)}")
        yield from history

    def save() -> None:
        state = checkpoints.pack_optimizer(optimizer.optimizer, names)
        done = [asdict(record) for record in history]
        checkpoints.save(
            checkpoint_folder,
            checkpoints.Checkpoint(len(history), parameters, state, torch.get_rng_state(), done),
        )

    model.train()
    saved_at, saved_step = time.monotonic(), len(history)
    for number in range(len(history) + 1, len(steps) + 1):
        lr = learning_rate(number, len(steps), settings)
        record = _step(
            model, data, objective, steps[number - 1], optimizer, accelerator, settings, number, len(steps), lr
        )
        history.append(record)
        if time.monotonic() - saved_at >= settings.checkpoint_every_s:
            save()
            saved_at, saved_step = time.monotonic(), number
        yield record
    if saved_step < len(steps):
        save()
    model.eval()


def _step(
    model: PackedModel,
    data: TrainingSet,
    objective: Objective,
    step: Step,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    settings: LoopSettings,
    number: int,
    total: int,
    lr: float,
) -> StepRecord:
    """Forward and backward over the packs of one step, then one optimiser update."""
    started = time.monotonic()
    normaliser = float(sum(data.weights[index] for indices in step for index in indices))
    loss_sum, tokens = 0.0, 0
    metrics: dict[str, float] = {}
    for indices in step:
        batch = pack([data.examples[index] for index in indices]).to(accelerator.device)
        loss, shares = objective(model(batch), batch, indices, normaliser)
        if not math.isfinite(loss.item()):
            raise TrainingStop(_not_finite("loss", number, data, indices))
        accelerator.backward(loss)
        loss_sum += loss.item()
        tokens += len(batch.input_ids_T)
        for name, share in shares.items():
            metrics[name] = metrics.get(name, 0.0) + share
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm))
    if not math.isfinite(norm):
        raise TrainingStop(_not_finite("gradient", number, data, [index for indices in step for index in indices]))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepRecord(number, total, loss_sum, lr, norm, tokens, time.monotonic() - started, metrics)


def _not_finite(what: str, number: int, data: TrainingSet, indices: Sequence[int]) -> str:
    ids = ", ".join(data.ids[index] for index in indices)
    return f"the {what} of step {number} is not finite; records of that step: {ids}; look at them, or lower the rate"


@torch.no_grad()
def sequence_logps(
    model: PackedModel, examples: Sequence[Example], progress: Callable[[int], None] | None = None
) -> list[list[float]]:
    """Summed log-probability of every completion of every example, nats; each example is a pack of its own.

    So a value never depends on what else is in the data. The model is in eval mode meanwhile.

    Args:
        progress: called with the number of examples done.
    """
    from components.training import objectives

    was_training = model.training
    model.eval()
    values = []
    for done, example in enumerate(examples, start=1):
        batch = pack([example]).to(model.device)
        sums = objectives.sequence_logps(model(batch).double(), batch.sequence_N, batch.n_sequences)
        values.append(sums.tolist())
        if progress:
            progress(done)
    model.train(was_training)
    return values


@torch.no_grad()
def evaluate(
    model: PackedModel, data: TrainingSet, objective: Objective, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """The objective over a whole set in eval mode: its loss and metrics."""
    was_training = model.training
    model.eval()
    normaliser = float(sum(data.weights))
    total = 0.0
    metrics: dict[str, float] = {}
    for indices in fill_packs(range(len(data.examples)), data.n_tokens(), max_tokens):
        batch = pack([data.examples[index] for index in indices]).to(model.device)
        loss, shares = objective(model(batch), batch, indices, normaliser)
        total += loss.item()
        for name, share in shares.items():
            metrics[name] = metrics.get(name, 0.0) + share
    model.train(was_training)
    return total, metrics
