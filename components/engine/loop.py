"""One optimiser loop for SFT and DPO, on accelerate: deterministic steps, checkpoints by time, exact resume.

`train` is a generator of step records; the caller logs them and draws progress. The loss is passed in as an objective,
so the loop knows neither pairs nor losses. Under torchrun every process takes its share of each step, and the step is
that of a single process, up to the order of the sums. One process on a CPU trains LoRA adapters on several packs of a
step at the same time (`cpu/threads.py`).
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
from components.engine.cpu.threads import plan_concurrent_packs, train_lanes
from components.engine.history import StepRecord
from components.engine.models import PackedModel, is_sharded, trainable_state
from components.engine.packing import Example, Pack, balance, first_fit_decreasing, pack, plan_steps
from components.engine.processes import accelerator as make_accelerator
from components.engine.processes import processes

Objective = Callable[[Tensor, Pack, list[int], float], tuple[Tensor, dict[str, float]]]
"""(token log-probs [N], pack, example indices of the pack, normaliser of the step) -> (loss, metrics).

Loss and metrics are this pack's share of the step: their sums over the packs of a step are the step's values."""


@dataclass(frozen=True)
class LoopSettings:
    """How to optimise; the fields have the meaning of the configuration's fields of the same name."""

    epochs: float
    max_steps: int
    batch_size: int
    max_tokens_per_microbatch: int
    learning_rate: float
    warmup_ratio: float
    lr_scheduler: str
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
"""Returns the validation loss and metrics of the model in its current state."""


def plan(data: TrainingSet, settings: LoopSettings) -> list[list[int]]:
    """The examples of each step of the run, cut at `max_steps` when that is above 0."""
    steps = plan_steps(len(data.examples), settings.epochs, settings.batch_size, settings.seed)
    return steps[: settings.max_steps] if settings.max_steps > 0 else steps


def learning_rate(step: int, total: int, settings: LoopSettings) -> float:
    """Learning rate of step 1 .. total: linear warm-up over `warmup_ratio` of them, then the schedule down to 0."""
    warmup = math.ceil(settings.warmup_ratio * total)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * shape[settings.lr_scheduler]


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
    """Train the trainable parameters of `model`, from the newest intact checkpoint if there is one.

    With `eval_every_steps` above 0 the model is validated that often and after the last step, and ends with the
    parameters of the step with the lowest validation loss.

    Args:
        pure: the objective does not change the model, so several packs may run at the same time.

    Yields:
        a record per optimiser step; after a resume, first the records of the steps already done.

    Raises:
        TrainingError: a loss or gradient is not finite (names the records of that step), or memory ran out.
    """
    accelerator = make_accelerator()
    parameters = trainable_state(model)
    names = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
        betas=(0.9, 0.999),
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
        _check_finite(whole, len(history))
        state = checkpoints.pack_optimizer(optimizer, names)
        rng = {
            f"{rank}{device}": state
            for rank, states in enumerate(gather_object([_random_state()]))
            for device, state in states.items()
        }
        if accelerator.is_main_process:
            current = checkpoints.Checkpoint(len(history), whole, state, rng, history)
            checkpoints.save(checkpoint_folder, current, keep=best_step(history))
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
        if validated or broadcast_flag(time.monotonic() - saved_at >= settings.checkpoint_every_s):
            save()
            saved_at, saved_step = time.monotonic(), number
        yield record
    if saved_step < len(history):
        save()
    if 0 < best_step(history) < len(history):
        log(f"step {best_step(history)} of {len(history)} has the lowest validation loss; its parameters are kept")
        checkpoints.restore(parameters, checkpoints.load(checkpoint_folder, best_step(history)).parameters)
    model.eval()


def _check_finite(parameters: Mapping[str, Tensor], number: int) -> None:
    """Look at what the last update left; before every other, the gradient tells."""
    for name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise TrainingError(f"{name} is not finite after step {number}; lower the learning rate")


def _random_state() -> dict[str, Tensor]:
    """Random state of the CPU and of a GPU, by the suffix that follows the process's index in a checkpoint."""
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


def broadcast_flag(flag: bool) -> bool:
    """Broadcast rank 0's decision: clocks differ between processes."""
    flags: list[bool] = gather_object([flag])
    return flags[0]


def local_packs(indices: Sequence[int], n_tokens: Sequence[int], max_tokens: int) -> list[tuple[list[int], bool]]:
    """This process's packs of some examples, and whether each counts.

    All processes get the same number, since every forward and backward pass is collective: a process with fewer repeats
    an example that does not count.
    """
    state = processes()
    shares = balance(indices, n_tokens, state.num_processes)
    packs = [first_fit_decreasing(share, n_tokens, max_tokens) for share in shares]
    mine = packs[state.process_index]
    idle = max(map(len, packs)) - len(mine)
    return [(members, True) for members in mine] + [([indices[0]], False)] * idle


@dataclass(frozen=True)
class _Step:
    number: int
    total: int
    indices: list[int]
    learning_rate: float
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
    lanes: list[list[list[int]]] = []
    if step.n_lanes > 1:
        lanes, shared = plan_concurrent_packs(
            step.indices, data.n_tokens, settings.max_tokens_per_microbatch, step.n_lanes
        )
        packs = [(indices, True) for indices in shared]
    else:
        packs = local_packs(step.indices, data.n_tokens, settings.max_tokens_per_microbatch)

    def run(indices: list[int], backward: Callable[[Tensor], Any]) -> dict[str, float]:
        batch = pack([data.examples[index] for index in indices]).to(accelerator.device)
        with _enough_memory(step.number, batch):
            loss, shares = objective(model(batch), batch, indices, normaliser)
            if not math.isfinite(loss.item()):
                raise TrainingError(_not_finite("loss", step.number, data, indices, folder))
            backward(loss)
        return {"loss": loss.item(), "tokens": float(len(batch.input_ids_T))} | shares

    for shares in train_lanes(lanes, trainable, run):
        _add(sums, shares)
    for position, (indices, counts) in enumerate(packs, start=1):
        # DDP averages gradients over processes, and the step needs their sum.
        factor = accelerator.num_processes if counts else 0.0
        with _sync(accelerator, model, last=position == len(packs)):
            shares = run(indices, partial(_backward, accelerator, factor))
        if counts:
            _add(sums, shares)
    norm = float(checkpoints.whole(torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)))
    if not math.isfinite(norm):
        raise TrainingError(_not_finite("gradient", step.number, data, step.indices, folder))
    for group in optimizer.param_groups:
        group["lr"] = step.learning_rate
    optimizer.step()
    optimizer.zero_grad()
    sums = _sum_over_processes(sums)
    loss_sum, tokens = sums.pop("loss"), int(sums.pop("tokens"))
    seconds = time.monotonic() - started
    return StepRecord(
        step.number, step.total, loss_sum, step.learning_rate, norm, tokens, seconds, peak_device_memory_mib(), sums
    )


def _backward(accelerator: Accelerator, factor: float, loss: Tensor) -> None:
    accelerator.backward(loss * factor)


def _sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Synchronise gradients between processes in the last pass of a step only."""
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
    """Peak memory so far: of the GPU if there is one, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mib()


@contextmanager
def _enough_memory(number: int, batch: Pack) -> Iterator[None]:
    """Turn running out of memory in a step into an error that says which setting to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        n_tokens = len(batch.input_ids_T)
        alone = len(batch.segments) == 1
        knob = "a lower model.max_length" if alone else "a lower max_tokens_per_microbatch"
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
    model: PackedModel,
    examples: Sequence[Example],
    progress: Callable[[int], None] | None = None,
    training: bool = False,
) -> list[list[Tensor]]:
    """Log-probability of each token of every completion of every example, nats: fp32 [tokens] on the CPU.

    Each example is a pack of its own, so its values never depend on the rest of the data. Several processes divide the
    examples, and all of them get all values.

    Args:
        progress: called with the number of examples done.
        training: whether the model runs as in training, dropout included; in eval mode otherwise.
    """
    was_training = model.training
    model.train(training)
    state = processes()
    values: dict[int, list[Tensor]] = {}
    # Every process does the same number, see `local_packs`; a repeated example gives the same value again.
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
    merged = {index: logps for part in every for index, logps in part.items()}
    return [merged[index] for index in range(len(examples))]


def sequence_logps(model: PackedModel, examples: Sequence[Example], training: bool = False) -> list[list[float]]:
    """Summed log-probability of every completion of every example, nats; see `completion_logps`."""
    every = completion_logps(model, examples, training=training)
    return [[float(logps_T.double().sum()) for logps_T in logps] for logps in every]


@torch.no_grad()
def evaluate(
    model: PackedModel, data: TrainingSet, objective: Objective, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Loss and metrics of the objective over a whole set, in eval mode."""
    was_training = model.training
    model.eval()
    normaliser = float(sum(data.weights))
    sums: dict[str, float] = {"loss": 0.0}
    for indices, counts in local_packs(range(len(data.examples)), data.n_tokens, max_tokens):
        batch = pack([data.examples[index] for index in indices]).to(model.device)
        loss, shares = objective(model(batch), batch, indices, normaliser)
        if counts:
            _add(sums, {"loss": loss.item()} | shares)
    model.train(was_training)
    sums = _sum_over_processes(sums)
    return sums.pop("loss"), sums
