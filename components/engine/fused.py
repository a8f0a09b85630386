"""RMS norms and gated activations as autograd functions that stay in the cache and keep little.

Step by step over a whole row, such element-wise work waits for memory, at every step again. Here it goes through the
row in parts: one part passes all steps before the next. The modules, their names and their saved files stay the
model's own; a module is only served after its own forward pass was seen to give the same. What is made here is cheap to
make again from what is kept here, and says how (`made`): a linear layer need not keep such an input.

Shapes: T tokens (all leading dimensions), E and I widths.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.engine.compiled import fused

PART = 2**17
"""Elements of a part; 512 KiB in fp32."""


class Made(NamedTuple):
    """How a tensor [T, width] was made: `make(*of)` makes it again."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]


def parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of all these tensors [T, any width], one after the other."""
    size = max(1, PART // rows[0].shape[-1])
    return zip(*(torch.split(each, size) for each in rows), strict=True)


@fused
def normed(x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor, dtype: torch.dtype) -> Tensor:
    """w * x * scale, rounded once."""
    return (x_TE * scale_T1 * weight_E).to(dtype)


@fused
def norm_scale(x_TE: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [T, 1]."""
    return torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + eps)


@fused
def norm_gradient(dy_TE: Tensor, x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor) -> Tensor:
    """d loss / d x of `normed`."""
    slope = dy_TE.float() * weight_E
    along = (slope * x_TE).sum(-1, keepdim=True) * scale_T1.pow(3) / -x_TE.shape[-1]
    return slope * scale_T1 + x_TE * along


@fused
def gated(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (F.silu(gate_TI.float()) * up_TI.float()).to(gate_TI.dtype)


@fused
def gated_gradient(dy_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` by gate and up."""
    gate, up, dy = gate_TI.float(), up_TI.float(), dy_TI.float()
    sigmoid = torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.to(gate_TI.dtype), (dy * gate * sigmoid).to(up_TI.dtype)


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) for a frozen w, rounded once, to `dtype`. Source: arXiv 1910.07467, eq. 4."""

    @staticmethod
    def forward(ctx: Any, x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TE, scale_T1, weight_E)
        return RMSNorm.make(x_TE, scale_T1, weight_E, dtype=dtype)

    @staticmethod
    def scale(x_TE: Tensor, eps: float) -> Tensor:
        """1 / sqrt(mean(x^2) + eps), [T, 1]."""
        if x_TE.is_cuda:
            return norm_scale(x_TE, eps)
        squares_T1: Tensor = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True).square_()
        return squares_T1.div_(x_TE.shape[-1]).add_(eps).rsqrt_()

    @staticmethod
    def make(x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor, dtype: torch.dtype) -> Tensor:
        """The output."""
        if x_TE.is_cuda:
            return normed(x_TE, scale_T1, weight_E, dtype)
        y_TE = torch.empty(x_TE.shape, dtype=dtype)
        for x, scale, y in parts(x_TE, scale_T1, y_TE):
            y.copy_((x * scale).mul_(weight_E))
        return y_TE

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TE, scale_T1, weight_E = ctx.saved_tensors
        if x_TE.is_cuda:
            return norm_gradient(outputs[0], x_TE, scale_T1, weight_E), None, None, None
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
        ctx.save_for_backward(gate_TI, up_TI)
        return SwiGLU.make(gate_TI, up_TI)

    @staticmethod
    def make(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        """The output."""
        if gate_TI.is_cuda:
            return gated(gate_TI, up_TI)
        y_TI = torch.empty_like(gate_TI)
        for gate, up, y in parts(gate_TI, up_TI, y_TI):
            torch.mul(F.silu(gate), up, out=y)
        return y_TI

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        if gate_TI.is_cuda:
            return gated_gradient(outputs[0], gate_TI, up_TI)
        dgate_TI, dup_TI = torch.empty_like(gate_TI), torch.empty_like(up_TI)
        for gate, up, dy, dgate, dup in parts(gate_TI, up_TI, outputs[0], dgate_TI, dup_TI):
            torch.mul(dy, F.silu(gate), out=dup)
            dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        return dgate_TI, dup_TI


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a norm; what `RMSNorm` is not for goes the model's own way."""
    if x.dtype != torch.float32 or module.weight.requires_grad:
        own: Tensor = type(module).forward(module, x)
        return own
    dtype = torch.bfloat16 if getattr(module, "rounds", False) else torch.float32
    flat_TE, weight_E = x.reshape(-1, x.shape[-1]), cast(Tensor, module.weight).float()
    plain_TE = flat_TE.detach()
    scale_T1 = RMSNorm.scale(plain_TE, _epsilon(module))
    y = RMSNorm.apply(flat_TE, scale_T1, weight_E, dtype).view(x.shape)  # type: ignore[no-untyped-call]
    y.made = Made(partial(RMSNorm.make, dtype=dtype), (plain_TE, scale_T1, weight_E))
    made: Tensor = y
    return made


def gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of down(silu(gate(x)) * up(x))."""
    gate, up = module.gate_proj(x), module.up_proj(x)  # type: ignore[operator]
    gate_TI, up_TI = (each.reshape(-1, each.shape[-1]) for each in (gate, up))
    between = SwiGLU.apply(gate_TI, up_TI).view(gate.shape)  # type: ignore[no-untyped-call]
    between.made = Made(SwiGLU.make, (gate_TI.detach(), up_TI.detach()))
    y: Tensor = module.down_proj(between)  # type: ignore[operator]
    return y


def _epsilon(module: nn.Module) -> Any:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
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
        x_TE = torch.randn(3, width, generator=generator).to(next(module.parameters()).device)
        x_TE = x_TE if forward is rms_norm else x_TE.to(next(module.parameters()).dtype)
        try:
            own, ours = type(module).forward(module, x_TE), forward(module, x_TE)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        # A fused kernel rounds to bf16 once, the model's own after each operation.
        rtol = 2e-2 if ours.dtype == torch.bfloat16 else 1e-4
        if own.shape == ours.shape and torch.allclose(own.float(), ours.float(), rtol=rtol, atol=1e-6):
            module.forward = MethodType(forward, module)
