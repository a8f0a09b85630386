"""Sequence log-probabilities, the SFT loss and the preference losses: pure functions on tensors, one page.

Shapes: N completion tokens of a batch, S sequences (completions), P pairs. All log-probabilities are in nats.
Nothing here knows of models, files or devices.
"""

import math

import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2.0)
"""The DPO loss of a policy that equals its reference."""


def sequence_logps(token_logps_N: Tensor, sequence_N: Tensor, n_sequences: int) -> Tensor:
    """Sum the token log-probabilities of each completion: log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    Args:
        token_logps_N: log-probability of each completion token, float [N], nats.
        sequence_N: index of the completion that each token belongs to, int64 [N], values in [0, n_sequences).
        n_sequences: number of completions S.

    Returns:
        float [S], nats; 0 for a completion without tokens.
    """
    return token_logps_N.new_zeros(n_sequences).index_add(0, sequence_N, token_logps_N)


def sft_loss(token_logps_N: Tensor, n_tokens: int) -> Tensor:
    """Negative log-likelihood of the completion tokens, divided by the tokens of the whole global batch.

    Micro-batches of one optimiser step pass the same `n_tokens`, so that their losses add up to the loss of the step.

    Args:
        token_logps_N: log-probability of each completion token of this micro-batch, float [N], nats.
        n_tokens: completion tokens in the global batch, > 0.

    Returns:
        scalar, nats per token.
    """
    return -token_logps_N.sum() / n_tokens


def rewards(policy_logps_S: Tensor, reference_logps_S: Tensor, beta: float) -> Tensor:
    """Implicit reward of each completion: r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x)).

    Source: DPO, arXiv 2305.18290, section 4, with the partition function left out (it cancels within a pair).

    Args:
        policy_logps_S: sequence log-probabilities under the policy, float [S], nats.
        reference_logps_S: the same under the frozen reference, float [S], nats.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        float [S].
    """
    return beta * (policy_logps_S - reference_logps_S)


def dpo_sigmoid_loss(margins_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss for each pair: -(1 - eps) log sigmoid(m) - eps log sigmoid(-m), with m the reward margin.

    Source: DPO, arXiv 2305.18290, equation 7; with eps > 0 the conservative loss of its authors' note, which assumes
    that a share eps of the labels is swapped.

    Args:
        margins_P: reward of chosen minus reward of rejected, float [P].
        label_smoothing: eps in [0, 0.5].

    Returns:
        float [P]; ln 2 where the margin is 0.
    """
    return -(1.0 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)
