"""Packs of a step trained side by side on the threads of one process.

Many small operations keep one thread busy, but not several: two threads that share every operation wait for each other
after each. So on a CPU the packs of a step are divided into lanes of similar size, one per thread or per few threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from components.engine.packing import balance, first_fit_decreasing

Result = TypeVar("Result")
RunPack = Callable[[list[int], Callable[[Tensor], Any]], dict[str, float]]
"""(example indices of a pack, backward) -> metrics: one forward pass; `backward` gets its loss."""
LANE_TOKENS = 256
"""Fewest tokens of a lane in a step; with fewer its matrix products would slow down."""
IMBALANCE = 1.15
"""How many times the mean the fullest lane may have; beyond, the threads that wait for it lose the gain."""


def n_lanes(model: nn.Module, config: dict[str, Any]) -> int:
    """How many threads may train the model side by side: torch's, or one where that would change the result.

    Randomness (dropout, jitter) draws from one sequence of random numbers, so it would depend on which thread comes
    first.

    Args:
        model: with its adapters.
        config: of the text model, as plain values.
    """
    random = [value for name, value in config.items() if "drop" in name or "jitter" in name]
    random += [getattr(module, "p", 0.0) for module in model.modules() if "Dropout" in type(module).__name__]
    if any(isinstance(value, float | int) and value > 0 for value in random):
        return 1
    return torch.get_num_threads()


def plan_concurrent_packs(
    indices: Sequence[int], n_tokens: Sequence[int], max_tokens: int, n_threads: int
) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Packs that threads train side by side, and packs for all threads together.

    Lanes are used only where every thread gets its share: none has many more tokens than the others (`IMBALANCE`), all
    have some (`LANE_TOKENS`) and the same number of threads. Packs trained at the same time hold at most `max_tokens`
    tokens together; an example too long for that is trained alone.

    Returns:
        the packs of each lane, no lanes or at least two; and the packs for all threads, an example longer than
        `max_tokens` in a pack of its own.
    """
    for count in range(min(n_threads, len(indices)), 1, -1):
        room = max_tokens // count
        short = [index for index in indices if n_tokens[index] <= room]
        shares = balance(short, n_tokens, count)
        sizes = [sum(n_tokens[index] for index in share) for share in shares]
        if n_threads % count == 0 and min(sizes) >= LANE_TOKENS and max(sizes) * count <= IMBALANCE * sum(sizes):
            long = [index for index in indices if n_tokens[index] > room]
            lanes = [first_fit_decreasing(share, n_tokens, room) for share in shares]
            return lanes, first_fit_decreasing(long, n_tokens, max_tokens)
    return [], first_fit_decreasing(indices, n_tokens, max_tokens)


def train_lanes(
    lanes: Sequence[Sequence[list[int]]], parameters: Sequence[nn.Parameter], run: RunPack
) -> list[dict[str, float]]:
    """Forward and backward over all lanes at the same time; gradients are added to those of the parameters.

    Each lane sums its own gradients, and these are added in the order of the lanes: the result does not depend on which
    thread finishes first.

    Returns:
        the metrics of each lane, summed over its packs.
    """

    def lane(packs: Sequence[list[int]]) -> tuple[dict[str, float], list[Tensor | None]]:
        sums: dict[str, float] = {}
        gradients: list[Tensor | None] = [None] * len(parameters)

        def backward(loss: Tensor) -> None:
            for index, gradient in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                gradients[index] = _plus(gradients[index], gradient)

        for indices in packs:
            for name, share in run(indices, backward).items():
                sums[name] = sums.get(name, 0.0) + share
        return sums, gradients

    metrics = []
    for sums, gradients in side_by_side([partial(lane, packs) for packs in lanes]):
        metrics.append(sums)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = _plus(parameter.grad, gradient)
    return metrics


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return total if more is None else more if total is None else total.add_(more)


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run tasks at the same time, each on its share of torch's threads; results are in the order of the tasks.

    Raises:
        Exception: the first one that a task raised, after all have ended.
    """
    if len(tasks) <= 1:
        return [task() for task in tasks]
    n_threads = torch.get_num_threads()

    def run(task: Callable[[], Result]) -> Result:
        torch.get_num_threads()  # a thread adopts the process's number when first asked, which would undo the next line
        torch.set_num_threads(max(1, n_threads // len(tasks)))
        return task()

    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            return list(pool.map(run, tasks))
    finally:
        # The workers' number also became the default for new threads.
        torch.set_num_threads(n_threads)
