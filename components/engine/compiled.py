"""Element-wise work on a GPU in one kernel each, by torch.compile; elsewhere, or without a compiler, as it is written.

For the inside of autograd functions: no gradient goes through.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors for GPUs; its first tensor says where it runs."""
    compiled = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if isinstance(first, Tensor) and first.is_cuda and can_compile():
            # The same state at every call: torch compiles anew for each that it meets, and gives up after eight.
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return compiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@cache
def can_compile() -> bool:
    """Whether torch.compile makes kernels here: it needs Triton and a C compiler, which slim images lack."""
    try:
        probe = torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device="cuda"))
    except Exception:  # whatever is missing, the plain way gives the same
        return False
    return bool(probe[0] == 3)
