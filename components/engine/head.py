"""Log-probabilities of the completion tokens only, in chunks, without keeping a logit.

A frozen head computes d logp / d hidden in the forward pass, chunk by chunk, so memory is one chunk of logits; on CPUs
by `cpu/head.py`. A trainable head recomputes its chunks in the backward pass instead.

Shapes: N completion tokens, C of them in a chunk, E hidden width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.engine.cpu import head as cpu_head
from components.engine.devices import compiled, on_cpu

CHUNK_TOKENS = 256
"""Rows of logits alive at once under a trainable head; 256 x 49152 fp32 logits are 48 MiB."""
GPU_CHUNK_LOGITS = 2**28
"""Logits alive at once on a GPU: 512 MiB in bf16, and products large enough to run at its full rate."""


def chunk_logps(
    hidden_CE: Tensor, target_C: Tensor, head: nn.Linear, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """Log-probability of each target token, fp32 [C], nats. `softcap` is Gemma's cap on the final logits."""
    bias = None if head.bias is None else head.bias.to(dtype)
    logits_CV = F.linear(hidden_CE.to(dtype), head.weight.to(dtype), bias).float()
    if softcap:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    chosen_C: Tensor = logits_CV.gather(1, target_C[:, None])[:, 0]
    return chosen_C - logits_CV.logsumexp(1)


@compiled
def logps_and_slope(
    logits_CV: Tensor, target_C: Tensor, softcap: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, fp32 [C], and -d logp / d logits, [C, V], in one read of the logits or two."""
    logits = logits_CV.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    top_C1 = logits.amax(1, keepdim=True)
    powers = (logits - top_C1).exp()
    total_C1 = powers.sum(1, keepdim=True)
    logps_C1 = logits.gather(1, target_C[:, None]) - top_C1 - total_C1.log()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target_C[:, None]
    slope = torch.where(is_target, logps_C1.expm1(), powers / total_C1)
    if softcap:
        slope = slope * (1 - (logits / softcap).square())
    return logps_C1[:, 0], slope.to(dtype)


@on_cpu(cpu_head.frozen_logps)
def frozen_logps(
    hidden_NE: Tensor, target_N: Tensor, weight_VE: Tensor, softcap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities, fp32 [N], and if asked for d logp / d hidden, [N, E], one fused kernel between two products.

    d logp / d hidden = (onehot(target) - softmax(logits)) * d softcap @ W is computed while the logits are there.
    """
    size = max(1, GPU_CHUNK_LOGITS // len(weight_VE))
    logps, gradients = [], []
    for hidden_CE, target_C in zip(torch.split(hidden_NE, size), torch.split(target_N, size), strict=True):
        logits_CV = torch.mm(hidden_CE.to(weight_VE.dtype), weight_VE.T)
        logps_C, slope_CV = logps_and_slope(logits_CV, target_C, softcap, weight_VE.dtype)
        del logits_CV
        logps.append(logps_C)
        if with_gradient:
            gradients.append(torch.mm(slope_CV, weight_VE).neg_())
    return torch.cat(logps), torch.cat(gradients).to(hidden_NE.dtype) if with_gradient else None


class FrozenHeadLogps(torch.autograd.Function):
    """`chunk_logps` over all N tokens for a head without trainable parameters; its gradient is made with its value."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, target_N: Tensor, weight_VE: Tensor, softcap: float | None) -> Tensor:
        logps_N, gradient_NE = frozen_logps(hidden_NE, target_N, weight_VE, softcap, ctx.needs_input_grad[0])
        if gradient_NE is not None:
            ctx.save_for_backward(gradient_NE)
        return logps_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NE,) = ctx.saved_tensors
        return gradient_NE * outputs[0][:, None].to(gradient_NE.dtype), None, None, None


def token_logps(
    hidden_NE: Tensor, target_N: Tensor, head: nn.Linear, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """Log-probability of each target token given the hidden state that predicts it.

    Args:
        hidden_NE: final hidden states at the predicting positions, [N, E].
        target_N: token ids, int64 [N].
        head: the output embedding.
        softcap: cap on the final logits (Gemma 2), or None.
        dtype: of the products with the head; sums and logarithms are in fp32.

    Returns:
        fp32 [N], nats.
    """
    with torch.autocast(hidden_NE.device.type, enabled=False):
        if head.bias is None and not head.weight.requires_grad:
            weight_VE = head.weight.to(dtype)
            logps: Tensor = FrozenHeadLogps.apply(hidden_NE, target_N, weight_VE, softcap)
            return logps
        chunks = zip(torch.split(hidden_NE, CHUNK_TOKENS), torch.split(target_N, CHUNK_TOKENS), strict=True)
        return torch.cat(
            [
                checkpoint(chunk_logps, hidden, target, head, softcap, dtype, use_reentrant=False)
                for hidden, target in chunks
            ]
        )
