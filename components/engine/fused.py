"""RMS norms and gated activations as fused autograd functions that keep little for the backward pass.

On a GPU each is one compiled kernel; on a CPU `cpu/elementwise.py` computes the same in cache-sized chunks. Modules,
their names and their saved files stay the model's own, and a module is patched only after its own forward pass was seen
to give the same values. Their outputs are cheap to recompute from what is kept here and say how (`Recompute`), so the
linear layer that reads one need not keep it.

Shapes: T tokens (all leading dimensions), E and I widths.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.engine.cpu import elementwise
from components.engine.devices import compiled, on_cpu


class Recompute(NamedTuple):
    """How to recompute a tensor [T, width]: `fn(*inputs)`."""

    fn: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


@on_cpu(elementwise.normed)
@compiled
def normed(x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor, dtype: torch.dtype) -> Tensor:
    """w * x * scale, rounded once."""
    return (x_TE * scale_T1 * weight_E).to(dtype)


@on_cpu(elementwise.norm_scale)
@compiled
def norm_scale(x_TE: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [T, 1]."""
    return torch.rsqrt(x_TE.square().mean(-1, keepdim=True) + eps)


@on_cpu(elementwise.norm_gradient)
@compiled
def norm_gradient(dy_TE: Tensor, x_TE: Tensor, scale_T1: Tensor, weight_E: Tensor) -> Tensor:
    """d loss / d x of `normed`."""
    slope = dy_TE.float() * weight_E
    along = (slope * x_TE).sum(-1, keepdim=True) * scale_T1.pow(3) / -x_TE.shape[-1]
    return slope * scale_T1 + x_TE * along


@on_cpu(elementwise.gated)
@compiled
def gated(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (F.silu(gate_TI.float()) * up_TI.float()).to(gate_TI.dtype)


@on_cpu(elementwise.gated_gradient)
@compiled
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
        return normed(x_TE, scale_T1, weight_E, dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return norm_gradient(outputs[0], *ctx.saved_tensors), None, None, None


class SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up, keeping only the two. Source: arXiv 2002.05202, eq. 5."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        return gated(gate_TI, up_TI)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        return gated_gradient(outputs[0], *ctx.saved_tensors)


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Forward pass of a norm; cases that `RMSNorm` does not cover use the model's own forward."""
    if x.dtype != torch.float32 or module.weight.requires_grad:
        original: Tensor = type(module).forward(module, x)
        return original
    dtype = torch.bfloat16 if getattr(module, "rounds", False) else torch.float32
    flat_TE, weight_E = x.reshape(-1, x.shape[-1]), cast(Tensor, module.weight).float()
    plain_TE = flat_TE.detach()
    scale_T1 = norm_scale(plain_TE, _epsilon(module))
    y: Tensor = RMSNorm.apply(flat_TE, scale_T1, weight_E, dtype).view(x.shape)  # type: ignore[no-untyped-call]
    y.recompute = Recompute(partial(normed, dtype=dtype), (plain_TE, scale_T1, weight_E))  # type: ignore[attr-defined]
    return y


def gated_mlp(module: nn.Module, x: Tensor) -> Tensor:
    """Forward pass of down(silu(gate(x)) * up(x))."""
    gate, up = module.gate_proj(x), module.up_proj(x)  # type: ignore[operator]
    gate_TI, up_TI = (projection.reshape(-1, projection.shape[-1]) for projection in (gate, up))
    product = SwiGLU.apply(gate_TI, up_TI).view(gate.shape)  # type: ignore[no-untyped-call]
    product.recompute = Recompute(gated, (gate_TI.detach(), up_TI.detach()))
    y: Tensor = module.down_proj(product)  # type: ignore[operator]
    return y


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def patch_norms_and_mlps(model: nn.Module) -> None:
    """Replace `forward` of RMS norms and gated MLPs by the functions above, where these reproduce its values."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        takes = len(inspect.signature(type(module).forward).parameters)
        if takes != 2:  # a norm with a gate, as Mamba 2 and Granite 4 have, computes something else
            continue
        if "RMSNorm" in type(module).__name__ and _epsilon(module) and getattr(module, "weight", None) is not None:
            forward, width = rms_norm, len(module.weight)  # type: ignore[arg-type]
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            forward, width = gated_mlp, getattr(module.gate_proj, "in_features", 0)
        else:
            continue
        x_TE = torch.randn(3, width, generator=generator).to(next(module.parameters()).device)
        x_TE = x_TE if forward is rms_norm else x_TE.to(next(module.parameters()).dtype)
        try:
            original, ours = type(module).forward(module, x_TE), forward(module, x_TE)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        # A fused kernel rounds to bf16 once, the model's own after each operation.
        rtol = 2e-2 if ours.dtype == torch.bfloat16 else 1e-4
        if original.shape == ours.shape and torch.allclose(original.float(), ours.float(), rtol=rtol, atol=1e-6):
            module.forward = MethodType(forward, module)
