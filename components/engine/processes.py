"""The processes of a training run: one, or those that torchrun started, over NCCL on GPUs and gloo on CPUs.

And the threads of one process on a CPU.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState

Result = TypeVar("Result")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt(3)."""


def processes() -> PartialState:
    """How many there are (`num_processes`), which is this (`process_index`), and their meeting point."""
    return PartialState(cpu=not torch.cuda.is_available())


def accelerator() -> Accelerator:
    """accelerate's door to the same processes; precision is the model's own business."""
    processes()
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


def keep_freed_memory(keep: bool = True) -> None:
    """Let the C library keep what a step freed for the next one, which otherwise gets it anew, page by page.

    On a CPU that is worth 3 % of a step, and a fifth where a host lends a virtual machine its memory late. It keeps it
    in one place for all threads: a place for each would hold an eighth more of a step's memory, and give it back. A C
    library other than glibc is left alone.

    Args:
        keep: False goes back to the highest thresholds that glibc sets by itself, and to a place for each thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30 if keep else 2**25)
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**26)
        mallopt(M_ARENA_MAX, 1 if keep else 0)


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of tasks that run at the same time, each on its share of torch's threads; their order is kept.

    Raises:
        Exception: what a task raised, the first of them, after all have ended.
    """
    if len(tasks) <= 1:
        return [task() for task in tasks]
    n_threads = torch.get_num_threads()

    def run(task: Callable[[], Result]) -> Result:
        torch.get_num_threads()  # a thread takes over the process's number when first asked, not to undo the next line
        torch.set_num_threads(max(1, n_threads // len(tasks)))
        return task()

    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            return list(pool.map(run, tasks))
    finally:
        # The workers' was also noted as the number for threads to come.
        torch.set_num_threads(n_threads)
