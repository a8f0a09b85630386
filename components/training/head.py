"""Log-probabilities of the completion tokens only, in chunks, without keeping a logit.

A frozen head makes d logp / d hidden already in the forward pass, chunk by chunk, so the memory is one chunk of logits.
A trainable head recomputes its chunks in the backward pass instead.

Shapes: N completion tokens, C of them in a chunk, E hidden width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
"""Rows of logits alive at once; 256 x 49152 fp32 logits are 48 MiB."""


def chunk_logps(hidden_CE: Tensor, target_C: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """Log-probability of each target token, fp32 [C], nats. `softcap` is Gemma's cap on the final logits."""
    logits_CV: Tensor = head(hidden_CE).float()
    if softcap:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    chosen_C: Tensor = logits_CV.gather(1, target_C[:, None])[:, 0]
    return chosen_C - logits_CV.logsumexp(1)


class FrozenHeadLogps(torch.autograd.Function):
    """`chunk_logps` over all N tokens for a head without trainable parameters.

    d logp / d hidden = (onehot(target) - softmax(logits)) * d softcap @ W is made while the logits are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, target_N: Tensor, head: nn.Linear, softcap: float | None) -> Tensor:
        logps_N = torch.empty(len(hidden_NE), dtype=torch.float32, device=hidden_NE.device)
        gradient_NE = torch.empty_like(hidden_NE) if ctx.needs_input_grad[0] else None
        for first in range(0, len(hidden_NE), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            target_C1 = target_N[chunk, None]
            low_CV = head(hidden_NE[chunk])
            logits_CV = low_CV.float()
            slope_CV = None
            if softcap:
                logits_CV = logits_CV.div(softcap).tanh_()
                slope_CV = 1 - logits_CV * logits_CV if gradient_NE is not None else None
                logits_CV.mul_(softcap)
            normaliser_C1 = logits_CV.logsumexp(1, keepdim=True)
            logps_N[chunk] = (logits_CV.gather(1, target_C1) - normaliser_C1)[:, 0]
            if gradient_NE is not None:
                residual_CV = logits_CV.sub_(normaliser_C1).exp_().neg_()
                residual_CV.scatter_add_(1, target_C1, torch.ones_like(normaliser_C1))
                if slope_CV is not None:
                    residual_CV.mul_(slope_CV)
                gradient_NE[chunk] = residual_CV.to(low_CV.dtype) @ head.weight.to(low_CV.dtype)
        if gradient_NE is not None:
            ctx.save_for_backward(gradient_NE)
        return logps_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NE,) = ctx.saved_tensors
        return gradient_NE * outputs[0][:, None].to(gradient_NE.dtype), None, None, None


def token_logps(hidden_NE: Tensor, target_N: Tensor, head: nn.Linear, softcap: float | None) -> Tensor:
    """Log-probability of each target token given the hidden state that predicts it.

    Args:
        hidden_NE: final hidden states at the predicting positions, [N, E].
        target_N: token ids, int64 [N].
        head: the output embedding; without bias when frozen, as in every supported model.
        softcap: cap on the final logits (Gemma 2), or None.

    Returns:
        fp32 [N], nats.
    """
    if any(parameter.requires_grad for parameter in head.parameters()):
        pieces = [
            checkpoint(chunk_logps, hidden, target, head, softcap, use_reentrant=False)
            for hidden, target in zip(
                torch.split(hidden_NE, CHUNK_TOKENS), torch.split(target_N, CHUNK_TOKENS), strict=True
            )
        ]
        return torch.cat(pieces)
    logps: Tensor = FrozenHeadLogps.apply(hidden_NE, target_N, head, softcap)  # type: ignore[no-untyped-call]
    return logps
