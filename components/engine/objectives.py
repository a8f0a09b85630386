"""Sequence log-probabilities, the SFT loss and the preference losses: pure functions on tensors, one page.

`LOSSES` is the only table of preference losses: the configuration, training, evaluation and the gate read it, so a new
loss is a row there, a function below it and a test. Configuration and gate do so without torch, which is therefore
imported where it is called. Nothing here knows of models, files or devices.

Shapes: N completion tokens of a batch, S sequences (completions), P pairs, S = 2 P as chosen, rejected, chosen, ...
All log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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


class LossOptions(NamedTuple):
    """Hyperparameters of the preference losses; the names are those of the section `dpo`."""

    beta: float
    """Scale of the rewards, > 0; the regularisation tau for ipo."""
    label_smoothing: float = 0.0
    """Assumed share of swapped labels, in [0, 0.5)."""
    simpo_gamma: float = 0.0
    """Target margin, >= 0."""
    orpo_lambda: float = 0.0
    """Weight of the odds-ratio term, lambda in the paper, >= 0."""


class PairScores(NamedTuple):
    """Scores and rewards of P pairs, float [P] each.

    A score is the log-ratio log pi(y | x) - log pi_ref(y | x), nats; the log-prob alone for a loss without a reference;
    divided by the answer's tokens for a loss per token. A reward is beta times the score.
    """

    chosen_scores_P: Tensor
    rejected_scores_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor
    margins_P: Tensor
    """Reward of chosen minus reward of rejected."""


class Loss(NamedTuple):
    """A preference loss and what it needs."""

    source: str
    """Paper and equation."""
    function: Callable[[PairScores, LossOptions], Tensor]
    """Loss of each pair, float [P]."""
    per_token: bool = False
    """Scores are divided by the tokens of the answer."""
    reference_free: bool = False
    """No log-probs of a reference are needed."""
    value_at_no_learning: float | None = None
    """Loss of a policy that equals its reference; None where it depends on beta or on the model."""
    options: tuple[str, ...] = ()
    """Fields of `LossOptions` that it reads, besides beta."""


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        "DPO, arXiv 2305.18290, equation 7; label smoothing from its authors' note on conservative DPO",
        lambda pairs, options: dpo_sigmoid_loss(pairs.margins_P, options.label_smoothing),
        value_at_no_learning=LN2,
        options=("label_smoothing",),
    ),
    "robust": Loss(
        "robust DPO, arXiv 2403.00409, equation 12",
        lambda pairs, options: robust_dpo_loss(pairs.margins_P, options.label_smoothing),
        value_at_no_learning=LN2,
        options=("label_smoothing",),
    ),
    "hinge": Loss(
        "SLiC-HF, arXiv 2305.10425, with DPO's reward as in RSO, arXiv 2309.06657, equation 8",
        lambda pairs, options: hinge_loss(pairs.margins_P),
        value_at_no_learning=1.0,
    ),
    "ipo": Loss(
        "IPO, arXiv 2310.12036, equation 17",
        lambda pairs, options: ipo_loss(pairs.chosen_scores_P, pairs.rejected_scores_P, options.beta),
        per_token=True,
    ),
    "sigmoid_norm": Loss(
        "DPO, arXiv 2305.18290, equation 7, on log-ratios per token: length-normalised DPO of Tulu 3, arXiv 2411.15124",
        lambda pairs, options: dpo_sigmoid_loss(pairs.margins_P),
        per_token=True,
        value_at_no_learning=LN2,
    ),
    "apo_zero": Loss(
        "APO, arXiv 2408.06266, equation 7",
        lambda pairs, options: apo_zero_loss(pairs.chosen_rewards_P, pairs.rejected_rewards_P),
        value_at_no_learning=1.0,
    ),
    "apo_down": Loss(
        "APO, arXiv 2408.06266, equation 8",
        lambda pairs, options: apo_down_loss(pairs.chosen_rewards_P, pairs.rejected_rewards_P),
        value_at_no_learning=1.0,
    ),
    "simpo": Loss(
        "SimPO, arXiv 2405.14734, equation 6",
        lambda pairs, options: simpo_loss(
            pairs.chosen_scores_P, pairs.rejected_scores_P, options.beta, options.simpo_gamma
        ),
        per_token=True,
        reference_free=True,
        options=("simpo_gamma",),
    ),
    "orpo": Loss(
        "ORPO, arXiv 2403.07691, equations 5 to 7",
        lambda pairs, options: orpo_loss(pairs.chosen_scores_P, pairs.rejected_scores_P, options.orpo_lambda),
        per_token=True,
        reference_free=True,
        options=("orpo_lambda",),
    ),
}


def preference_loss(
    name: str, policy_S: Tensor, reference_S: Tensor, n_tokens_S: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Loss of each pair and the rewards that it compares: r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)).

    The reward is that of DPO, arXiv 2305.18290, section 4, without the partition function, which cancels within a
    pair; per token or without a reference where the loss says so.

    Args:
        name: a key of `LOSSES`.
        policy_S: sequence log-probs under the policy as chosen, rejected, chosen, rejected, ..., float [S], nats.
        reference_S: the same under the frozen reference; not read by a loss without a reference.
        n_tokens_S: tokens of each completion, float [S]; read by losses per token only.
        options: hyperparameters.

    Returns:
        losses [P] and rewards [S].
    """
    loss = LOSSES[name]
    scores_S = policy_S if loss.reference_free else policy_S - reference_S
    if loss.per_token:
        scores_S = scores_S / n_tokens_S
    rewards_S = options.beta * scores_S
    chosen_P, rejected_P = rewards_S.view(-1, 2).unbind(1)
    chosen_scores_P, rejected_scores_P = scores_S.view(-1, 2).unbind(1)
    pairs = PairScores(chosen_scores_P, rejected_scores_P, chosen_P, rejected_P, chosen_P - rejected_P)
    return loss.function(pairs, options), rewards_S


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)) without overflow."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def dpo_sigmoid_loss(margins_P: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log sigmoid(m) - eps log sigmoid(-m), with m the reward margin; ln 2 at m = 0.

    With eps in (0, 0.5] conservative DPO, which assumes that a share eps of the labels is swapped.
    """
    return -(1.0 - label_smoothing) * log_sigmoid(margins_P) - label_smoothing * log_sigmoid(-margins_P)


def robust_dpo_loss(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """(-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps): unbiased when a share eps of labels is swapped.

    eps is in [0, 0.5).
    """
    kept, swapped = -log_sigmoid(margins_P), -log_sigmoid(-margins_P)
    return ((1.0 - label_smoothing) * kept - label_smoothing * swapped) / (1.0 - 2.0 * label_smoothing)


def hinge_loss(margins_P: Tensor) -> Tensor:
    """max(0, 1 - m)."""
    return (1.0 - margins_P).relu()


def ipo_loss(chosen_ratios_P: Tensor, rejected_ratios_P: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 with h the difference of the log-ratios per token; beta is the paper's tau.

    Per token as its authors implement it, so that the target does not depend on the length.
    """
    return (chosen_ratios_P - rejected_ratios_P - 1.0 / (2.0 * beta)) ** 2


def apo_zero_loss(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """1 - sigmoid(r_chosen) + sigmoid(r_rejected): raises the chosen answer, lowers the rejected one.

    For chosen answers that are better than the model's own.
    """
    return 1.0 - chosen_rewards_P.sigmoid() + rejected_rewards_P.sigmoid()


def apo_down_loss(chosen_rewards_P: Tensor, rejected_rewards_P: Tensor) -> Tensor:
    """sigmoid(r_chosen) + 1 - sigmoid(r_chosen - r_rejected): lowers both, the rejected answer more.

    For chosen answers that are worse than the model's own.
    """
    return chosen_rewards_P.sigmoid() + 1.0 - (chosen_rewards_P - rejected_rewards_P).sigmoid()


def simpo_loss(chosen_logps_P: Tensor, rejected_logps_P: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) on log-probs per token."""
    return -log_sigmoid(beta * (chosen_logps_P - rejected_logps_P) - gamma)


def orpo_loss(chosen_logps_P: Tensor, rejected_logps_P: Tensor, weight: float) -> Tensor:
    """-log p_chosen - weight * log sigmoid(log odds(chosen) - log odds(rejected)).

    p = exp(log-prob per token) < 1, odds = p / (1 - p).
    """
    chosen_odds_P = chosen_logps_P - (-chosen_logps_P.expm1()).log()
    rejected_odds_P = rejected_logps_P - (-rejected_logps_P.expm1()).log()
    return -chosen_logps_P - weight * log_sigmoid(chosen_odds_P - rejected_odds_P)
