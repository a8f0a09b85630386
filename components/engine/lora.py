"""LoRA layers in one autograd function: y = x W^T + s x A^T B^T with nothing kept that is not needed.

peft's own layers make a scaled copy of the update, add it, and keep the input once per adapter and in two dtypes; here
the update is accumulated into the output in place, adapters that are active together share their matrix products, and
the input is kept once. Layers that read the same input (query, key and value; gate and up) are computed together: one
thin product reads the input, and the input's gradient is summed up in place. An input that `fused.py` made is not kept
but made again in the backward pass. The modules, their names and their saved files stay peft's. Source: LoRA, arXiv
2106.09685.

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
from torch.nn import functional as F

from components.engine.fused import Made

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that it gives the same input."""


class Waiting(threading.local):
    """What was computed for siblings that have not asked for it yet: layer -> (input, output, whether for a gradient).

    Of each thread its own, as several may run the model at the same time.
    """

    def __init__(self) -> None:
        self.outputs: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor, bool]] = WeakKeyDictionary()


waiting = Waiting()


class LoraFunction(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for frozen W and b, for each of some layers of one input, computed in its dtype.

    Arguments: the input, of what it was made (None to keep it), and W [O, I] in any dtype, b [O] or None, A [R, I] and
    B [O, R] of the first layer, of the second, ...
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, made: Made | None, *layers: Any) -> tuple[Tensor, ...]:
        weights, biases, a_parts, b_parts = (layers[first::4] for first in range(4))
        a_SI = a_parts[0] if len(a_parts) == 1 else torch.cat(a_parts)
        xa_TS = torch.mm(x_TI, a_SI.T)
        ctx.ranks = [len(a_RI) for a_RI in a_parts]
        outputs = []
        for weight_OI, bias_O, b_OR, xa_TR in zip(
            weights, biases, b_parts, torch.split(xa_TS, ctx.ranks, 1), strict=True
        ):
            # The small update first: added to a product in bf16 it would be rounded away; so both are rounded once.
            y_TO = torch.mm(xa_TR, b_OR.T) if bias_O is None else torch.addmm(bias_O, xa_TR, b_OR.T)
            outputs.append(y_TO.addmm_(x_TI, weight_OI.T.to(y_TO.dtype)))
        ctx.make, kept = (made.make, made.of) if made else (None, (x_TI,))
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
        x_TI = ctx.make(*kept) if ctx.make else kept[0]
        da_parts = torch.split(torch.mm(dxa_TS.T, x_TI), ctx.ranks)
        gradients: list[Tensor | None] = [dx_TI, None]
        for number, (dy_TO, xa_TR) in enumerate(zip(outputs, torch.split(xa_TS, ctx.ranks, 1), strict=True)):
            _, _, wants_a, wants_b = ctx.needs_input_grad[2 + 4 * number : 6 + 4 * number]
            db_OR = torch.mm(dy_TO.T, xa_TR) if wants_b else None
            gradients += [None, None, da_parts[number] if wants_a else None, db_OR]
        return tuple(gradients)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b in fp32 for frozen W and b in any dtype: no copy of them in fp32 outlives a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return F.linear(x, weight_OI.float(), None if bias_O is None else bias_O.float())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return outputs[0] @ weight_OI.float(), None, None


def lora_linear(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of a peft LoRA layer; what `LoraFunction` does not cover goes peft's own way.

    Under autocast everything is computed in its dtype, as autocast would. What a sibling needs of the same input is
    computed here too, and waits for it.
    """
    found = waiting.outputs.pop(layer, None)
    if args or kwargs or not _covered(layer):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    if found is not None and found[0] is x and found[2] == torch.is_grad_enabled():
        return found[1]
    layers = [layer, *(each for each in layer.siblings if each is not layer and _covered(each))]
    outputs = _compute(layers, x)
    for each, computed in zip(layers[1:], outputs[1:], strict=True):
        waiting.outputs[each] = x, computed, torch.is_grad_enabled()
    return outputs[0]


def _covered(layer: LoraLinear) -> bool:
    """Whether the layer has active adapters, and these no bias, no variant (DoRA and others), no dropout at work."""
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
    """The layers' outputs of one input."""
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
        made = getattr(x, "made", None) if x.dtype == dtype else None
        outputs = LoraFunction.apply(flat_TI, made, *arguments)  # type: ignore[no-untyped-call]
    return [y_TO.view(*x.shape[:-1], -1) for y_TO in outputs]


def frozen_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of a frozen linear layer in fp32."""
    y: Tensor = FrozenLinear.apply(x.float(), module.weight, module.bias)  # type: ignore[no-untyped-call]
    return y


def compute_in_fp32(model: nn.Module) -> None:
    """Let a frozen model in bf16 compute in fp32; only the weights of its linear layers and embeddings stay in bf16.

    Every product makes an fp32 copy of the one weight that it reads, which takes little beside the product itself.
    """
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.forward = MethodType(frozen_linear, module)
        elif kind is not nn.Embedding:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()


def speed_up(model: nn.Module) -> None:
    """Let the LoRA layers over plain, unquantised linear layers of `model` compute by `lora_linear`."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for name, module in children.items():
            if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
                names = next((each for each in SIBLINGS if name in each), (name,))
                candidates = (children.get(each) for each in names)
                siblings = [each for each in candidates if type(each) is LoraLinear]
                # Past nn.Module, which would take them for children.
                vars(module)["siblings"] = [each for each in siblings if type(each.base_layer) is nn.Linear]
                module.forward = MethodType(lora_linear, module)
