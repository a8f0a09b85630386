"""Sequence log-probabilities, the SFT loss and the preference losses: pure functions on tensors, one page.

Shapes: N completion tokens of a batch, S sequences (completions), P pairs. All log-probabilities are in nats.
Nothing here knows of models, files or devices.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LN2 = math.log(2.0)
"""The DPO loss of a policy that equals its reference."""


def sequence_logps(token_logps_N: Tensor, sequence_N: Tensor, n_sequences: int) -> Tensor:
    """Sum the token log-probabilities of each completion: log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    In fp64: over the hundreds of tokens of an answer a sum in fp32 loses up to 1e-3 nats, and the losses take small
    differences of such sums.

    Args:
        token_logps_N: log-probability of each completion token, float [N], nats.
        sequence_N: index of the completion that each token belongs to, int64 [N], values in [0, n_sequences).
        n_sequences: number of completions S.

    Returns:
        fp64 [S], nats; 0 for a completion without tokens.
    """
    token_logps_N = token_logps_N.double()
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


def robust_dpo_loss(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """Unbiased under label noise: (-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps).

    Source: robust DPO, arXiv 2403.00409, equation 12.

    Args:
        margins_P: reward of chosen minus reward of rejected, float [P].
        label_smoothing: eps, the share of swapped labels, in [0, 0.5).

    Returns:
        float [P].
    """
    kept, swapped = -F.logsigmoid(margins_P), -F.logsigmoid(-margins_P)
    return ((1.0 - label_smoothing) * kept - label_smoothing * swapped) / (1.0 - 2.0 * label_smoothing)


def hinge_loss(margins_P: Tensor) -> Tensor:
    """max(0, 1 - m). Source: SLiC-HF, arXiv 2305.10425, with DPO's reward as in RSO, arXiv 2309.06657, equation 8."""
    return torch.relu(1.0 - margins_P)


def ipo_loss(chosen_ratios_P: Tensor, rejected_ratios_P: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 with h the difference of the log-ratios per token.

    Source: IPO, arXiv 2310.12036, equation 17, where beta is tau; per token as its authors do, so that the target does
    not depend on the length.

    Args:
        chosen_ratios_P: log pi(y | x) - log pi_ref(y | x) of the chosen answers divided by their tokens, float [P].
        rejected_ratios_P: the same of the rejected answers.
        beta: the regularisation tau, > 0.

    Returns:
        float [P].
    """
    return (chosen_ratios_P - rejected_ratios_P - 1.0 / (2.0 * beta)) ** 2


def apo_zero_loss(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """1 - sigmoid(r_chosen) + sigmoid(r_rejected): raises the chosen answer, lowers the rejected one.

    For chosen answers that are better than the model's own. Source: APO, arXiv 2408.06266, equation 7.
    """
    return 1.0 - torch.sigmoid(chosen_rewards_P) + torch.sigmoid(rejected_rewards_P)


def apo_down_loss(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """sigmoid(r_chosen) + 1 - sigmoid(r_chosen - r_rejected): lowers both, the rejected answer more.

    For chosen answers that are worse than the model's own. Source: APO, arXiv 2408.06266, equation 8.
    """
    return torch.sigmoid(chosen_rewards_P) + 1.0 - torch.sigmoid(chosen_rewards_P - rejected_rewards_P)


def simpo_loss(chosen_logps_P: Tensor, rejected_logps_P: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma) on log-probs per token, without a reference.

    Source: SimPO, arXiv 2405.14734, equation 6.

    Args:
        chosen_logps_P: log pi(y | x) of the chosen answers divided by their tokens, float [P], nats per token.
        rejected_logps_P: the same of the rejected answers.
        beta: scale of the reward, > 0.
        gamma: target margin, >= 0.

    Returns:
        float [P].
    """
    return -F.logsigmoid(beta * (chosen_logps_P - rejected_logps_P) - gamma)


def orpo_loss(chosen_logps_P: Tensor, rejected_logps_P: Tensor, weight: float) -> Tensor:
    """-log p_chosen - weight * log sigmoid(log odds(chosen) - log odds(rejected)), without a reference.

    p = exp(log-prob per token), odds = p / (1 - p). Source: ORPO, arXiv 2403.07691, equations 5 to 7.

    Args:
        chosen_logps_P: log pi(y | x) of the chosen answers divided by their tokens, float [P], < 0, nats per token.
        rejected_logps_P: the same of the rejected answers.
        weight: of the odds-ratio term (lambda in the paper), >= 0.

    Returns:
        float [P].
    """
    chosen_odds_P = chosen_logps_P - torch.log(-torch.expm1(chosen_logps_P))
    rejected_odds_P = rejected_logps_P - torch.log(-torch.expm1(rejected_logps_P))
    return -chosen_logps_P - weight * F.logsigmoid(chosen_odds_P - rejected_odds_P)
