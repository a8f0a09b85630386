"""LoRA layers in one autograd function: y = x W^T + s x A^T B^T with nothing kept that is not needed.

peft's own layers make a scaled copy of the update, add it, and keep the input once per adapter and in two dtypes; here
the update is accumulated into the output in place, adapters that are active together share their matrix products, and
the input is kept once. The modules, their names and their saved files stay peft's. Source: LoRA, arXiv 2106.09685.

Shapes: T tokens (all leading dimensions), I inputs, O outputs, R rank of the active adapters together.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class LoraFunction(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for frozen W and b, computed in one dtype."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        xa_TR = torch.mm(x_TI, a_RI.T)
        # The small update first: added to a product in bf16 it would be rounded away, this way both are rounded once.
        y_TO = torch.mm(xa_TR, b_OR.T) if bias_O is None else torch.addmm(bias_O, xa_TR, b_OR.T)
        y_TO.addmm_(x_TI, weight_OI.T)
        ctx.save_for_backward(x_TI, xa_TR, weight_OI, a_RI, b_OR)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, xa_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        (dy_TO,) = outputs
        wants_x, _, _, wants_a, wants_b = ctx.needs_input_grad
        dxa_TR = torch.mm(dy_TO, b_OR)
        dx_TI = torch.mm(dxa_TR, a_RI).addmm_(dy_TO, weight_OI) if wants_x else None
        da_RI = torch.mm(dxa_TR.T, x_TI) if wants_a else None
        db_OR = torch.mm(dy_TO.T, xa_TR) if wants_b else None
        return dx_TI, None, None, da_RI, db_OR


def lora_linear(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of a peft LoRA layer; what `LoraFunction` does not cover goes peft's own way.

    Covered are plain linear layers whose active adapters have no bias, no variant (DoRA and others) and no dropout at
    work. Under autocast everything is computed in its dtype, as autocast would.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    covered = not (args or kwargs or layer.disable_adapters or layer.merged) and all(
        name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and not (layer.training and getattr(layer.lora_dropout[name], "p", 0.0))
        for name in names
    )
    if not names or not covered:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    base = layer.base_layer
    with torch.autocast(device, enabled=False):
        a_RI = torch.cat([layer.lora_A[name].weight.to(dtype) for name in names])
        b_OR = torch.cat([(layer.lora_B[name].weight * layer.scaling[name]).to(dtype) for name in names], dim=1)
        bias = None if base.bias is None else base.bias.to(dtype)
        flat_TI = x.to(dtype).reshape(-1, x.shape[-1])
        y_TO = LoraFunction.apply(flat_TI, base.weight.to(dtype), bias, a_RI, b_OR)  # type: ignore[no-untyped-call]
    output: Tensor = y_TO.view(*x.shape[:-1], -1)
    return output


def speed_up(model: nn.Module) -> None:
    """Let the LoRA layers over plain, unquantised linear layers of `model` compute by `lora_linear`."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(lora_linear, module)
