"""bf16 weights on hardware without bf16: the base stays in bf16 and computes in fp32.

Shapes: I inputs, O outputs of a layer.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b in fp32 for frozen W and b in any dtype; no fp32 copy of them outlives a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return F.linear(x, weight_OI.float(), None if bias_O is None else bias_O.float())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return outputs[0] @ weight_OI.float(), None, None


def frozen_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Forward pass of a frozen linear layer in fp32."""
    y: Tensor = FrozenLinear.apply(x.float(), module.weight, module.bias)  # type: ignore[no-untyped-call]
    return y


def compute_in_fp32(model: nn.Module) -> None:
    """Make a frozen bf16 model compute in fp32; only weights of linear layers and embeddings stay in bf16.

    Each product copies the one weight that it reads to fp32, which costs little beside the product itself.
    """
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.forward = MethodType(frozen_linear, module)
        elif kind is not nn.Embedding:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()
