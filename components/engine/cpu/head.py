"""Log-probabilities under a frozen head on CPUs: softmax in cache-sized parts of one reused chunk of logits.

Shapes: N completion tokens, C of them in a chunk, R of these in the cache, E hidden width, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Rows of logits alive at once; 256 x 49152 fp32 logits are 48 MiB."""
CACHED_LOGITS = 2**19
"""Logits that go through softmax together; 2 MiB in fp32, so that all passes over them hit the cache."""


def frozen_logps(
    hidden_NE: Tensor, target_N: Tensor, weight_VE: Tensor, softcap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities, fp32 [N], and if asked for d logp / d hidden, [N, E].

    Softmax is done by hand: torch's own CPU kernel sums a row's exponentials sequentially, which over a vocabulary of
    49152 loses up to 4e-5 nats, where a pairwise sum loses 1e-6.
    """
    # One set of buffers for all chunks: fresh ones of this size would cost more in page faults than the product.
    n_vocabulary = len(weight_VE)
    product_CV = hidden_NE.new_empty(min(CHUNK_TOKENS, len(hidden_NE)), n_vocabulary, dtype=weight_VE.dtype)
    rows = max(1, CACHED_LOGITS // n_vocabulary)
    logit_RV = hidden_NE.new_empty(min(rows, len(product_CV)), n_vocabulary, dtype=torch.float32)
    logps_N = torch.empty(len(hidden_NE), dtype=torch.float32, device=hidden_NE.device)
    gradient_NE = torch.empty_like(hidden_NE) if with_gradient else None
    for first in range(0, len(hidden_NE), CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        low_CV = product_CV[: len(target_N[chunk])]
        torch.mm(hidden_NE[chunk].to(low_CV.dtype), weight_VE.T, out=low_CV)
        parts = zip(*(torch.split(tensor, rows) for tensor in (low_CV, target_N[chunk], logps_N[chunk])), strict=True)
        for low_RV, target_R, logps_R in parts:
            logps_and_residual(low_RV, target_R, logps_R, logit_RV[: len(low_RV)], softcap, with_gradient)
        if gradient_NE is not None:
            gradient_NE[chunk] = torch.mm(low_CV, weight_VE).neg_()
    return logps_N, gradient_NE


def logps_and_residual(
    low_RV: Tensor, target_R: Tensor, logps_R: Tensor, buffer_RV: Tensor, softcap: float | None, with_gradient: bool
) -> None:
    """Write log-probs to `logps_R` and, if asked for, -d logp / d logits over the logits `low_RV`, in place."""
    logit = buffer_RV.copy_(low_RV)
    if softcap:
        bent_RV = logit.div_(softcap).tanh_().clone()
        logit.mul_(softcap)
    logit.sub_(logit.amax(1, keepdim=True))
    target_R1 = target_R[:, None]
    target_logit_R1 = logit.gather(1, target_R1)
    total_R1 = logit.exp_().sum(1, keepdim=True)
    torch.sub(target_logit_R1, total_R1.log(), out=logps_R[:, None])
    if with_gradient:
        residual = logit.mul_(total_R1.reciprocal_()).scatter_(1, target_R1, logps_R.expm1()[:, None])
        if softcap:
            residual.mul_(1 - bent_RV.square_())
        low_RV.copy_(residual)
