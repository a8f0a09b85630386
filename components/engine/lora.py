"""LoRA layers in one autograd function: y = x W^T + s x A^T B^T with nothing kept that is not needed.

peft's own layers add a scaled copy of the update and keep the input once per adapter and in two dtypes. Here the update
is accumulated into the output in place, active adapters share their matrix products, and the input is kept once. Layers
that read the same input (query, key and value; gate and up) are computed together: one thin product reads the input,
and the input's gradient is summed in place. An input that comes from `fused.py` is recomputed in the backward pass
instead of kept. Modules, their names and their saved files stay peft's. Source: LoRA, arXiv 2106.09685.

Shapes: T tokens (all leading dimensions), I inputs, O outputs of a layer, R rank of its active adapters together, S sum
of R over the layers.
"""

import threading
from collections.abc import Sequence
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from components.engine.fused import Recompute

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that get the same input from it."""


class SiblingOutputs(threading.local):
    """Outputs precomputed for sibling layers (q/k/v, gate/up) that share an input.

    layer -> (input, output, whether computed with gradients). Per thread, as several may run the model at once.
    """

    def __init__(self) -> None:
        self.outputs: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, bool]] = WeakKeyDictionary()


sibling_outputs = SiblingOutputs()


class LoraFunction(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for frozen W and b, for one or more layers of one input, computed in its dtype.

    Arguments: the input, how to recompute it (None to keep it), then W [O, I] in any dtype, b [O] or None, A [R, I] and
    B [O, R] of the first layer, of the second, ...
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, recompute: Recompute | None, *layers: Any) -> tuple[Tensor, ...]:
        weights, biases, a_parts, b_parts = (layers[first::4] for first in range(4))
        a_SI = a_parts[0] if len(a_parts) == 1 else torch.cat(a_parts)
        xa_TS = torch.mm(x_TI, a_SI.T)
        ctx.ranks = [len(a_RI) for a_RI in a_parts]
        outputs = []
        for weight_OI, bias_O, b_OR, xa_TR in zip(
            weights, biases, b_parts, torch.split(xa_TS, ctx.ranks, 1), strict=True
        ):
            # The small update first: added to a bf16 product it would be rounded away; this way both are rounded once.
            y_TO = torch.mm(xa_TR, b_OR.T) if bias_O is None else torch.addmm(bias_O, xa_TR, b_OR.T)
            outputs.append(y_TO.addmm_(x_TI, weight_OI.T.to(y_TO.dtype)))
        ctx.recompute, kept = recompute or (None, (x_TI,))
        ctx.save_for_backward(xa_TS, a_SI, *weights, *b_parts, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        xa_TS, a_SI, *rest = ctx.saved_tensors
        n = len(outputs)
        weights, b_parts, kept = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dxa_TS = torch.empty_like(xa_TS)
        for dxa_TR, dy_TO, b_OR in zip(torch.split(dxa_TS, ctx.ranks, 1), outputs, b_parts, strict=True):
            torch.mm(dy_TO, b_OR, out=dxa_TR)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = torch.mm(dxa_TS, a_SI)
            for dy_TO, weight_OI in zip(outputs, weights, strict=True):
                dx_TI.addmm_(dy_TO, weight_OI.to(dy_TO.dtype))
        x_TI = ctx.recompute(*kept) if ctx.recompute else kept[0]
        da_parts = torch.split(torch.mm(dxa_TS.T, x_TI), ctx.ranks)
        gradients: list[Tensor | None] = [dx_TI, None]
        for index, (dy_TO, xa_TR) in enumerate(zip(outputs, torch.split(xa_TS, ctx.ranks, 1), strict=True)):
            _, _, wants_a, wants_b = ctx.needs_input_grad[2 + 4 * index : 6 + 4 * index]
            db_OR = torch.mm(dy_TO.T, xa_TR) if wants_b else None
            gradients += [None, None, da_parts[index] if wants_a else None, db_OR]
        return tuple(gradients)


def lora_linear(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of a peft LoRA layer; cases that `LoraFunction` does not cover use peft's own forward.

    Under autocast everything is computed in its dtype. Outputs of siblings of the same input are computed along.
    """
    ready = sibling_outputs.outputs.pop(layer, None)
    if args or kwargs or not _covered(layer):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    if ready is not None and ready[0] is x and ready[2] == torch.is_grad_enabled():
        return ready[1]
    layers = [layer, *(sibling for sibling in layer.siblings if sibling is not layer and _covered(sibling))]
    outputs = _compute(layers, x)
    for sibling, output in zip(layers[1:], outputs[1:], strict=True):
        sibling_outputs.outputs[sibling] = x, output, torch.is_grad_enabled()
    return outputs[0]


def _covered(layer: LoraLinear) -> bool:
    """Whether the layer has active adapters without bias, variant (DoRA and others) or active dropout."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return (
        bool(names)
        and not (layer.disable_adapters or layer.merged)
        and all(
            name not in layer.lora_variant
            and layer.lora_B[name].bias is None
            and not (layer.training and getattr(layer.lora_dropout[name], "p", 0.0))
            for name in names
        )
    )


def _compute(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """Outputs of these layers for one input."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    arguments: list[Tensor | None] = []
    with torch.autocast(device, enabled=False):
        for layer in layers:
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            base = layer.base_layer
            arguments += [
                base.weight,
                None if base.bias is None else base.bias.to(dtype),
                torch.cat([layer.lora_A[name].weight.to(dtype) for name in names]),
                torch.cat([(layer.lora_B[name].weight * layer.scaling[name]).to(dtype) for name in names], dim=1),
            ]
        flat_TI = x.to(dtype).reshape(-1, x.shape[-1])
        recompute = getattr(x, "recompute", None) if x.dtype == dtype else None
        outputs = LoraFunction.apply(flat_TI, recompute, *arguments)  # type: ignore[no-untyped-call]
    return [y_TO.view(*x.shape[:-1], -1) for y_TO in outputs]


def patch_lora(model: nn.Module) -> None:
    """Replace `forward` of LoRA layers over plain, unquantised linear layers by `lora_linear`."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for name, module in children.items():
            if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
                names = next((group for group in SIBLINGS if name in group), (name,))
                candidates = (children.get(sibling) for sibling in names)
                siblings = [candidate for candidate in candidates if type(candidate) is LoraLinear]
                # Bypasses nn.Module.__setattr__, which would register them as children.
                vars(module)["siblings"] = [layer for layer in siblings if type(layer.base_layer) is nn.Linear]
                module.forward = MethodType(lora_linear, module)
