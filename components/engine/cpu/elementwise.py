"""RMS norms and gated activations on CPUs, chunk by chunk.

Unfused element-wise ops are memory-bound: over a whole row each of them waits for memory again. One cache-sized chunk
goes through all of them before the next. Each function gives the values of its namesake in `fused.py`.

Shapes: T tokens, E and I widths.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**17
"""Elements of a chunk; 512 KiB in fp32."""


def chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same chunks of tokens of all these tensors [T, any width], one after the other."""
    size = max(1, CHUNK_ELEMENTS // rows[0].shape[-1])
    return zip(*(torch.split(row, size) for row in rows), strict=True)


def norm_scale(x_TE: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [T, 1]."""
    squares_T1: Tensor = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True).square_()
    return squares_T1.div_(x_TE.shape[-1]).add_(eps).rsqrt_()


def normed(x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor, dtype: torch.dtype) -> Tensor:
    """w * x * scale, rounded once."""
    y_TE = torch.empty(x_TE.shape, dtype=dtype)
    for x, scale, y in chunks(x_TE, scale_T1, y_TE):
        y.copy_((x * scale).mul_(weight_E))
    return y_TE


def norm_gradient(dy_TE: Tensor, x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor) -> Tensor:
    """d loss / d x of `normed`."""
    dx_TE = torch.empty_like(x_TE)
    for x, scale, dy, dx in chunks(x_TE, scale_T1, dy_TE, dx_TE):
        slope = dy.float() * weight_E
        along = (slope * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        torch.mul(slope, scale, out=dx).addcmul_(x, along)
    return dx_TE


def gated(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    y_TI = torch.empty_like(gate_TI)
    for gate, up, y in chunks(gate_TI, up_TI, y_TI):
        torch.mul(F.silu(gate), up, out=y)
    return y_TI


def gated_gradient(dy_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` by gate and up."""
    dgate_TI, dup_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
    for gate, up, dy, dgate, dup in chunks(gate_TI, up_TI, dy_TI, dgate_TI, dup_TI):
        torch.mul(dy, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    return dgate_TI, dup_TI
