"""Log-probabilities of the completion tokens only, in chunks, without keeping a logit.

A frozen head makes d logp / d hidden already in the forward pass, chunk by chunk, so the memory is one chunk of logits.
A trainable head recomputes its chunks in the backward pass instead.

Shapes: N completion tokens, C of them in a chunk, R of these in the cache, E hidden width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.engine.compiled import fused

CHUNK_TOKENS = 256
"""Rows of logits alive at once on a CPU; 256 x 49152 fp32 logits are 48 MiB."""
GPU_CHUNK_LOGITS = 2**28
"""Logits alive at once on a GPU: 512 MiB in bf16, and products large enough to run at its full rate."""
CACHED_LOGITS = 2**19
"""Logits that go through softmax together on a CPU; 2 MiB in fp32, so that its passes stay in the cache."""


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


@fused
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


class FrozenHeadLogps(torch.autograd.Function):
    """`chunk_logps` over all N tokens for a head without trainable parameters.

    d logp / d hidden = (onehot(target) - softmax(logits)) * d softcap @ W is made while the logits are there. Softmax
    is taken apart: torch's own kernel for CPUs adds up a row's exponentials one after the other, which over a
    vocabulary of 49152 loses up to 4e-5 nats, where a pairwise sum loses 1e-6.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, target_N: Tensor, weight_VE: Tensor, softcap: float | None) -> Tensor:
        if hidden_NE.is_cuda:
            return FrozenHeadLogps.on_gpu(ctx, hidden_NE, target_N, weight_VE, softcap)
        # One set of buffers for all chunks: fresh ones of this size would cost more in page faults than the product.
        n_vocabulary = len(weight_VE)
        product_CV = hidden_NE.new_empty(min(CHUNK_TOKENS, len(hidden_NE)), n_vocabulary, dtype=weight_VE.dtype)
        rows = max(1, CACHED_LOGITS // n_vocabulary)
        logit_RV = hidden_NE.new_empty(min(rows, len(product_CV)), n_vocabulary, dtype=torch.float32)
        logps_N = torch.empty(len(hidden_NE), dtype=torch.float32, device=hidden_NE.device)
        gradient_NE = torch.empty_like(hidden_NE) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden_NE), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            low_CV = product_CV[: len(target_N[chunk])]
            torch.mm(hidden_NE[chunk].to(low_CV.dtype), weight_VE.T, out=low_CV)
            parts = zip(*(torch.split(each, rows) for each in (low_CV, target_N[chunk], logps_N[chunk])), strict=True)
            for low_RV, target_R, found_R in parts:
                logit = logit_RV[: len(low_RV)].copy_(low_RV)
                if softcap:
                    bent_RV = logit.div_(softcap).tanh_().clone()
                    logit.mul_(softcap)
                logit.sub_(logit.amax(1, keepdim=True))
                target_R1 = target_R[:, None]
                target_logit_R1 = logit.gather(1, target_R1)
                total_R1 = logit.exp_().sum(1, keepdim=True)
                torch.sub(target_logit_R1, total_R1.log(), out=found_R[:, None])
                if gradient_NE is not None:
                    residual = logit.mul_(total_R1.reciprocal_()).scatter_(1, target_R1, found_R.expm1()[:, None])
                    if softcap:
                        residual.mul_(1 - bent_RV.square_())
                    low_RV.copy_(residual)
            if gradient_NE is not None:
                gradient_NE[chunk] = torch.mm(low_CV, weight_VE).neg_()
        if gradient_NE is not None:
            ctx.save_for_backward(gradient_NE)
        return logps_N

    @staticmethod
    def on_gpu(ctx: Any, hidden_NE: Tensor, target_N: Tensor, weight_VE: Tensor, softcap: float | None) -> Tensor:
        """The same by larger chunks, with one fused kernel between the two products."""
        size = max(CHUNK_TOKENS, GPU_CHUNK_LOGITS // len(weight_VE))
        logps, gradients = [], []
        for hidden_CE, target_C in zip(torch.split(hidden_NE, size), torch.split(target_N, size), strict=True):
            logits_CV = torch.mm(hidden_CE.to(weight_VE.dtype), weight_VE.T)
            logps_C, slope_CV = logps_and_slope(logits_CV, target_C, softcap, weight_VE.dtype)
            del logits_CV
            logps.append(logps_C)
            if ctx.needs_input_grad[0]:
                gradients.append(torch.mm(slope_CV, weight_VE).neg_())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).to(hidden_NE.dtype))
        return torch.cat(logps)

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
