"""What runs where: the one place that picks attention and kernels by device; `hardware.py` tells what there is.

The method as a GPU runs it is in `attention.py`, `head.py`, `fused.py` and `lora.py`; `cpu/` holds what pays off on
CPUs only.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface

from components.engine import attention
from components.engine.attention import Varlen
from components.engine.cpu import attention as cpu_attention
from components.engine.packing import Segment

P = ParamSpec("P")
R = TypeVar("R")
PACKED = "packed"
"""Name of the packed attention in transformers' AttentionInterface."""


def on_cpu(cpu_function: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: call `cpu_function` instead when the first argument is a tensor on a CPU."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            is_on_cpu = isinstance(first, Tensor) and first.device.type == "cpu"
            return (cpu_function if is_on_cpu else function)(*args, **kwargs)

        return call

    return decorate


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile a function of tensors for GPUs; elsewhere, or without a compiler, it runs as written.

    For the inside of autograd functions: no gradient flows through. The first argument says where it runs.
    """
    # At the first call on a GPU: it imports torch's compiler, which a process without a GPU never needs.
    kernel: Callable[[], Callable[P, R]] = cache(partial(torch.compile, function, dynamic=True))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if isinstance(first, Tensor) and first.is_cuda and can_compile():
            # torch recompiles for every grad and autocast state it meets and gives up after eight: always use the same.
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return kernel()(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@cache
def can_compile() -> bool:
    """Whether torch.compile can build kernels here: it needs Triton and a C compiler, which slim images lack."""
    try:
        probe = torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device="cuda"))
    except Exception:  # whatever is missing, the plain function gives the same values
        return False
    return bool(probe[0] == 3)


def row_layout(segments: Sequence[Segment], device: torch.device) -> Varlen | None:
    """The variable-length layout of a row for flash attention, computed once for all layers; None on a CPU."""
    return attention.varlen(segments, device) if device.type == "cuda" else None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] = (),
    layout: Varlen | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function with the signature that transformers calls: query [1, H, T, D], key and value [1, K, T, D].

    Returns:
        output [1, T, H, D], and None for the weights.

    Raises:
        ValueError: called without `segments`, as by a plain forward pass or generation.
    """
    if not segments:
        raise ValueError("packed attention needs `segments`; set_attn_implementation('sdpa') first for a plain forward")
    options = attention.Options(scaling, dropout, sliding_window, softcap, s_aux)
    if query.device.type == "cpu":
        return cpu_attention.attend_row(query, key, value, segments, options), None
    return attention.attend_row(query, key, value, segments, layout, options), None


AttentionInterface.register(PACKED, packed_attention)
