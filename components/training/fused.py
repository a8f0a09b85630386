"""RMS norms and gated activations as autograd functions that stay in the cache and keep little.

Step by step over a whole row, such element-wise work waits for memory, at every step again. Here it goes through the
row in parts: one part passes all steps before the next. The modules, their names and their saved files stay the
model's own; a module is only served after its own forward pass was seen to give the same.

Shapes: T tokens (all leading dimensions), E and I widths.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PART = 2**17
"""Elements of a part; 512 KiB in fp32."""


def parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of all these tensors [T, any width], one after the other."""
    size = max(1, PART // rows[0].shape[-1])
    return zip(*(torch.split(each, size) for each in rows), strict=True)


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) for a frozen w, rounded once, to `dtype`. Source: arXiv 1910.07467, eq. 4."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x_TE.shape[-1]
        squares_T1 = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True).square_()
        scale_T1 = squares_T1.div_(width).add_(eps).rsqrt_()
        y_TE = torch.empty(x_TE.shape, dtype=dtype)
        for x, scale, y in parts(x_TE, scale_T1, y_TE):
            y.copy_((x * scale).mul_(weight_E))
        ctx.save_for_backward(x_TE, scale_T1, weight_E)
        return y_TE

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TE, scale_T1, weight_E = ctx.saved_tensors
        dx_TE = torch.empty_like(x_TE)
        for x, scale, dy, dx in parts(x_TE, scale_T1, outputs[0], dx_TE):
            slope = dy.float() * weight_E
            along = (slope * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
            torch.mul(slope, scale, out=dx).addcmul_(x, along)
        return dx_TE, None, None, None


class SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up, keeping only the two. Source: arXiv 2002.05202, eq. 5."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        y_TI = torch.empty_like(gate_TI)
        for gate, up, y in parts(gate_TI, up_TI, y_TI):
            torch.mul(F.silu(gate), up, out=y)
        ctx.save_for_backward(gate_TI, up_TI)
        return y_TI

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        dgate_TI, dup_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
        for gate, up, dy, dgate, dup in parts(gate_TI, up_TI, outputs[0], dgate_TI, dup_TI):
            torch.mul(dy, F.silu(gate), out=dup)
            dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return dgate_TI, dup_TI


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a norm; what `RMSNorm` is not for goes the model's own way."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or module.weight.requires_grad:
        own: Tensor = type(module).forward(module, x)
        return own
    dtype = torch.bfloat16 if getattr(module, "rounds", False) else torch.float32
    flat_TE = x.reshape(-1, x.shape[-1])
    y_TE: Tensor = RMSNorm.apply(flat_TE, module.weight.float(), _epsilon(module), dtype)  # type: ignore[no-untyped-call]
    return y_TE.view(x.shape)


def gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of down(silu(gate(x)) * up(x))."""
    if x.device.type != "cpu":
        own: Tensor = type(module).forward(module, x)
        return own
    gate, up = module.gate_proj(x), module.up_proj(x)  # type: ignore[operator]
    y_TI = SwiGLU.apply(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))  # type: ignore[no-untyped-call]
    y: Tensor = module.down_proj(y_TI.view(gate.shape))  # type: ignore[operator]
    return y


def _epsilon(module: nn.Module) -> float | None:
    found: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found


@torch.no_grad()
def speed_up(model: nn.Module) -> None:
    """Let the RMS norms and gated MLPs of `model` compute by the functions above, where these give what they gave."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and _epsilon(module) and getattr(module, "weight", None) is not None:
            forward, width = rms_norm, len(module.weight)  # type: ignore[arg-type]
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            forward, width = gated_mlp, getattr(module.gate_proj, "in_features", 0)
        else:
            continue
        x_TE = torch.randn(3, width, generator=generator)
        x_TE = x_TE if forward is rms_norm else x_TE.to(next(module.parameters()).dtype)
        try:
            own, ours = type(module).forward(module, x_TE), forward(module, x_TE)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        if own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=1e-4, atol=1e-6):
            module.forward = MethodType(forward, module)
