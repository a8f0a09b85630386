"""One optimiser loop for SFT and DPO, on accelerate: deterministic steps, checkpoints by time, exact resume.

`train` is a generator of step records; the caller logs them and draws progress. What is minimised comes in as an
objective, so the loop knows neither pairs nor losses. Started by torchrun, every process takes its share of each step,
and the step is the same as one process would do, up to the order of the sums. One process on a CPU trains LoRA adapters
on the packs of a step side by side, a thread each: many small operations keep one thread busy, but not several.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from components.common.errors import TrainingError
from components.common.files import write_json
from components.common.memory import peak_memory_mib
from components.engine import checkpoints
from components.engine.history import StepRecord
from components.engine.models import PackedModel, is_sharded, trainable_state
from components.engine.packing import Example, Pack, fill_packs, lanes, pack, plan_steps, share_out
from components.engine.processes import accelerator as make_accelerator
from components.engine.processes import processes, side_by_side

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
    eval_every_steps: int
    early_stopping_patience: int


@dataclass(frozen=True)
class TrainingSet:
    """Examples with their record ids (for messages) and their weight in the loss's normaliser."""

    examples: Sequence[Example]
    ids: Sequence[str]
    weights: Sequence[float]

    @cached_property
    def n_tokens(self) -> list[int]:
        """Tokens of each example in a pack."""
        return [example.n_tokens for example in self.examples]


Validation = Callable[[], tuple[float, dict[str, float]]]
"""Gives the validation loss and metrics of the model as it is."""


def plan(data: TrainingSet, settings: LoopSettings) -> list[list[int]]:
    """The examples of each step of the run, cut at `max_steps` when that is above 0."""
    steps = plan_steps(len(data.examples), settings.epochs, settings.batch_size, settings.seed)
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
    log: Callable[[str], None],
    validate: Validation | None = None,
    pure: bool = True,
) -> Iterator[StepRecord]:
    """Train the trainable parameters of `model`, from the newest sound checkpoint if there is one.

    With `eval_every_steps` above 0 the model is validated that often and after the last step, and at the end it has the
    parameters of the step with the lowest validation loss.

    Args:
        pure: the objective leaves the model alone, so packs may go through it side by side.

    Yields:
        a record per optimiser step; when resumed, first the records of the steps already done.

    Raises:
        TrainingError: a loss or gradient that is not finite, with the ids of the records in that step; or no memory.
    """
    accelerator = make_accelerator()
    parameters = trainable_state(model)
    names = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True, betas=(0.9, 0.999)
    )
    wrapped = model if is_sharded(model) else accelerator.prepare_model(model)
    n_lanes = model.n_lanes if pure and accelerator.num_processes == 1 else 1
    steps = plan(data, settings)
    torch.manual_seed(settings.seed + accelerator.process_index)
    checkpoint, passed_over = checkpoints.load_newest(checkpoint_folder)
    for sentence in passed_over:
        log(sentence)
    history = list(checkpoint.history) if checkpoint else []
    if checkpoint:
        log(f"resuming after step {checkpoint.step} of {len(steps)}")
        checkpoints.restore(parameters, checkpoint.parameters)
        checkpoints.unpack_optimizer(optimizer, names, checkpoint.optimizer)
        _set_random_state(checkpoint.rng, str(accelerator.process_index))
    yield from history

    def save() -> None:
        whole = {name: checkpoints.whole(parameter) for name, parameter in parameters.items()}
        state = checkpoints.pack_optimizer(optimizer, names)
        rng = {
            f"{rank}{device}": state
            for rank, states in enumerate(gather_object([_random_state()]))
            for device, state in states.items()
        }
        if accelerator.is_main_process:
            made = checkpoints.Checkpoint(len(history), whole, state, rng, history)
            checkpoints.save(checkpoint_folder, made, keep=best_step(history))
        accelerator.wait_for_everyone()

    every = settings.eval_every_steps if validate else 0
    model.train()
    saved_at, saved_step = time.monotonic(), len(history)
    for number in range(len(history) + 1, len(steps) + 1):
        if _patience_is_over(history, settings.early_stopping_patience):
            log(f"stopped early after step {len(history)}: no better validation loss since step {best_step(history)}")
            break
        step = _Step(number, len(steps), steps[number - 1], learning_rate(number, len(steps), settings), n_lanes)
        record = _run_step(wrapped, data, objective, step, optimizer, accelerator, settings, checkpoint_folder)
        validated = every and (number % every == 0 or number == len(steps))
        if validated and validate:
            loss, metrics = validate()
            record = replace(record, validation={"loss": loss} | metrics)
        history.append(record)
        if validated or _agree(accelerator, time.monotonic() - saved_at >= settings.checkpoint_every_s):
            save()
            saved_at, saved_step = time.monotonic(), number
        yield record
    if saved_step < len(history):
        save()
    if 0 < best_step(history) < len(history):
        log(f"step {best_step(history)} of {len(history)} has the lowest validation loss; its parameters are kept")
        checkpoints.restore(parameters, checkpoints.load(checkpoint_folder, best_step(history)).parameters)
    model.eval()


def _random_state() -> dict[str, Tensor]:
    """State of the random numbers of the CPU and, with a GPU, of its own; by what follows the process's number."""
    return {"": torch.get_rng_state()} | ({".cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(rng: Mapping[str, Tensor], process: str) -> None:
    torch.set_rng_state(rng[process])
    if torch.cuda.is_available() and f"{process}.cuda" in rng:
        torch.cuda.set_rng_state(rng[f"{process}.cuda"])


def best_step(history: Sequence[StepRecord]) -> int:
    """The step with the lowest validation loss, the first of equals; 0 when none was validated."""
    validated = [record for record in history if record.validation]
    return min(validated, key=lambda record: record.validation["loss"]).step if validated else 0


def _patience_is_over(history: Sequence[StepRecord], patience: int) -> bool:
    since_best = sum(bool(record.validation) and record.step > best_step(history) for record in history)
    return patience > 0 and since_best >= patience


def _agree(accelerator: Accelerator, wish: bool) -> bool:
    """What the main process wishes, told to all: clocks differ."""
    wishes: list[bool] = gather_object([wish])
    return wishes[0]


def passes(indices: Sequence[int], n_tokens: Sequence[int], max_tokens: int) -> list[tuple[list[int], bool]]:
    """The packs of this process for some examples, and whether each counts.

    All processes get equally many, since they meet in every forward and backward pass: who has fewer repeats an
    example that does not count.
    """
    state = processes()
    packs = [fill_packs(part, n_tokens, max_tokens) for part in share_out(indices, n_tokens, state.num_processes)]
    mine = packs[state.process_index]
    idle = max(map(len, packs)) - len(mine)
    return [(members, True) for members in mine] + [([indices[0]], False)] * idle


@dataclass(frozen=True)
class _Step:
    number: int
    total: int
    indices: list[int]
    lr: float
    n_lanes: int


def _run_step(
    model: nn.Module,
    data: TrainingSet,
    objective: Objective,
    step: _Step,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    settings: LoopSettings,
    folder: Path,
) -> StepRecord:
    """Forward and backward over this process's packs of one step, then one optimiser update."""
    started = time.monotonic()
    normaliser = float(sum(data.weights[index] for index in step.indices))
    sums: dict[str, float] = {"loss": 0.0, "tokens": 0.0}
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    apart: list[list[list[int]]] = []
    if step.n_lanes > 1:
        apart, together = lanes(step.indices, data.n_tokens, settings.max_tokens_per_step, step.n_lanes)
        todo = [(indices, True) for indices in together]
    else:
        todo = passes(step.indices, data.n_tokens, settings.max_tokens_per_step)

    def run(indices: list[int], backward: Callable[[Tensor], Any]) -> dict[str, float]:
        batch = pack([data.examples[index] for index in indices]).to(accelerator.device)
        with _enough_memory(step.number, batch):
            loss, shares = objective(model(batch), batch, indices, normaliser)
            if not math.isfinite(loss.item()):
                raise TrainingError(_not_finite("loss", step.number, data, indices, folder))
            backward(loss)
        return {"loss": loss.item(), "tokens": float(len(batch.input_ids_T))} | shares

    def lane(packs: list[list[int]]) -> tuple[dict[str, float], list[Tensor | None]]:
        """Packs beside others, with their gradients for themselves: added up in a fixed order, the sum is the same."""
        found: dict[str, float] = {}
        gradients: list[Tensor | None] = [None] * len(trainable)

        def backward(loss: Tensor) -> None:
            for at, gradient in enumerate(torch.autograd.grad(loss, trainable, allow_unused=True)):
                gradients[at] = _plus(gradients[at], gradient)

        for indices in packs:
            _add(found, run(indices, backward))
        return found, gradients

    for shares, gradients in side_by_side([partial(lane, packs) for packs in apart]):
        _add(sums, shares)
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.grad = _plus(parameter.grad, gradient)
    for position, (indices, counts) in enumerate(todo, start=1):
        # Processes average their gradients, and the step's is their sum.
        factor = accelerator.num_processes if counts else 0.0
        with _sync(accelerator, model, last=position == len(todo)):
            shares = run(indices, partial(_backward, accelerator, factor))
        if counts:
            _add(sums, shares)
    norm = float(checkpoints.whole(torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)))
    if not math.isfinite(norm):
        raise TrainingError(_not_finite("gradient", step.number, data, step.indices, folder))
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    optimizer.step()
    optimizer.zero_grad()
    sums = _sum_over_processes(sums)
    loss_sum, tokens = sums.pop("loss"), int(sums.pop("tokens"))
    seconds = time.monotonic() - started
    return StepRecord(step.number, step.total, loss_sum, step.lr, norm, tokens, seconds, peak_device_memory_mib(), sums)


def _backward(accelerator: Accelerator, factor: float, loss: Tensor) -> None:
    accelerator.backward(loss * factor)


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return total if more is None else more if total is None else total.add_(more)


def _sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients travel between processes in the last pass of a step only."""
    waits = isinstance(model, nn.parallel.DistributedDataParallel) and not last
    context: AbstractContextManager[None] = accelerator.no_sync(model) if waits else nullcontext()
    return context


def _add(sums: dict[str, float], shares: dict[str, float]) -> None:
    for name, share in shares.items():
        sums[name] = sums.get(name, 0.0) + share


def _sum_over_processes(values: dict[str, float]) -> dict[str, float]:
    if processes().num_processes == 1:
        return values
    every: list[dict[str, float]] = gather_object([values])
    sums: dict[str, float] = {}
    for part in every:
        _add(sums, part)
    return sums


def peak_device_memory_mib() -> float:
    """Peak memory so far: of the GPU where there is one, else of this program."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mib()


@contextmanager
def _enough_memory(number: int, batch: Pack) -> Iterator[None]:
    """Running out of memory in a step becomes a sentence that says which knob to turn."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        n_tokens = len(batch.input_ids_T)
        alone = len(batch.segments) == 1
        knob = "a lower model.max_length" if alone else "a lower max_tokens_per_step"
        raise TrainingError(
            f"out of memory in step {number}, on a pass of {n_tokens} tokens ({len(batch.segments)} examples); what"
            f" helps: {knob}, model.gradient_checkpointing=true, or model.precision=bf16"
        ) from error


def _not_finite(what: str, number: int, data: TrainingSet, indices: Sequence[int], folder: Path) -> str:
    ids = [data.ids[index] for index in indices]
    file = folder / "not_finite.json"
    write_json(file, {"what": what, "step": number, "records": ids})
    return (
        f"the {what} of step {number} is not finite; records of that pass: {', '.join(ids)} (also in {file}); look at"
        " them, or lower the learning rate"
    )


@torch.no_grad()
def completion_logps(
    model: PackedModel, examples: Sequence[Example], progress: Callable[[int], None] | None = None
) -> list[list[Tensor]]:
    """Log-probability of each token of every completion of every example, nats: fp32 [tokens] on the CPU.

    Each example is a pack of its own, so a value never depends on what else is in the data. The model is in eval mode
    meanwhile. Several processes share the examples out, and all of them get all values.

    Args:
        progress: called with the number of examples done.
    """
    was_training = model.training
    model.eval()
    state = processes()
    values: dict[int, list[Tensor]] = {}
    # Everyone does equally many, see `passes`; a repeated example gives the same value again.
    count = -(-len(examples) // state.num_processes)
    for done in range(count):
        index = min(done * state.num_processes + state.process_index, len(examples) - 1)
        batch = pack([examples[index]]).to(model.device)
        sizes = torch.bincount(batch.sequence_N, minlength=batch.n_sequences).tolist()
        values[index] = list(model(batch).cpu().split(sizes))
        if progress:
            progress(min((done + 1) * state.num_processes, len(examples)))
    model.train(was_training)
    every: list[dict[int, list[Tensor]]] = gather_object([values])
    merged = {index: found for part in every for index, found in part.items()}
    return [merged[index] for index in range(len(examples))]


def sequence_logps(model: PackedModel, examples: Sequence[Example]) -> list[list[float]]:
    """Summed log-probability of every completion of every example, nats; see `completion_logps`."""
    return [[float(logps.double().sum()) for logps in found] for found in completion_logps(model, examples)]


@torch.no_grad()
def evaluate(
    model: PackedModel, data: TrainingSet, objective: Objective, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """The objective over a whole set in eval mode: its loss and metrics."""
    was_training = model.training
    model.eval()
    normaliser = float(sum(data.weights))
    sums: dict[str, float] = {"loss": 0.0}
    for indices, counts in passes(range(len(data.examples)), data.n_tokens, max_tokens):
        batch = pack([data.examples[index] for index in indices]).to(model.device)
        loss, shares = objective(model(batch), batch, indices, normaliser)
        if counts:
            _add(sums, {"loss": loss.item()} | shares)
    model.train(was_training)
    sums = _sum_over_processes(sums)
    return sums.pop("loss"), sums
