"""Preference statistics with intervals: a proper score of the implicit reward, and the paired bootstrap over groups.

A model's implicit reward is measured against one common frozen reference, the base model: log pi(y|x) - log base(y|x),
in nats. Models differ in how large their rewards are (beta, epochs), so each gets one scale, fitted on the validation
pairs, before held-out pairs are scored (DESIGN, decision 7).

Shapes: P pairs, G prompt groups, B bootstrap resamples.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Floats = NDArray[np.float64]
SCALE_BOUNDS = (1e-4, 1e2)
"""Per nat of log-ratio margin; a model without information ends at the lower bound, where its loss is ln 2."""
RESAMPLE_BLOCK = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pairs with its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """As plain values for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def text(self, digits: int = 3) -> str:
        """`0.612 [0.570, 0.655]`."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def log_loss(margins_P: Floats, scale: float = 1.0) -> Floats:
    """Preference log-loss of each pair, -log sigmoid(scale * margin), nats; ln 2 is a coin toss."""
    return np.logaddexp(0.0, -scale * margins_P)


def accuracy(margins_P: Floats) -> Floats:
    """1 where the chosen answer has the higher reward, one half for a tie."""
    return np.where(margins_P > 0, 1.0, np.where(margins_P == 0, 0.5, 0.0))


def fit_scale(margins_P: Floats) -> float:
    """The scale above 0 with the lowest mean log-loss; multiplying all margins by c divides it by c.

    The search is over the logarithm, around the inverse of the typical margin, so it does not depend on units.
    """
    unit = float(np.sqrt(np.mean(margins_P**2)))
    if unit == 0.0:
        return 1.0
    low, high = (math.log(bound) for bound in SCALE_BOUNDS)
    found = minimize_scalar(
        lambda exponent: float(log_loss(margins_P / unit, math.exp(exponent)).mean()),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(found.x) / unit


class GroupBootstrap:
    """Resamples of whole prompt groups, the same for everything that is computed with it, hence paired."""

    def __init__(self, groups: list[str], resamples: int, confidence: float, seed: int) -> None:
        _, self._group_P = np.unique(np.asarray(groups), return_inverse=True)
        self._n_groups = int(self._group_P.max()) + 1
        self._resamples, self._confidence, self._seed = resamples, confidence, seed

    def means(self, values_P: Floats, mask_P: NDArray[np.bool_] | None = None) -> Floats:
        """Mean of the values in each resample, float64 [B]; with a mask, of the pairs it names."""
        weight = np.ones_like(values_P) if mask_P is None else mask_P.astype(np.float64)
        sums_G = np.bincount(self._group_P, values_P * weight, self._n_groups)
        counts_G = np.bincount(self._group_P, weight, self._n_groups)
        rng = np.random.default_rng(self._seed)
        blocks = []
        for first in range(0, self._resamples, RESAMPLE_BLOCK):
            n = min(RESAMPLE_BLOCK, self._resamples - first)
            drawn_BG = rng.integers(0, self._n_groups, size=(n, self._n_groups))
            counts_B = counts_G[drawn_BG].sum(axis=1)
            blocks.append(sums_G[drawn_BG].sum(axis=1) / np.where(counts_B > 0, counts_B, np.nan))
        return np.concatenate(blocks)

    def estimate(self, values_P: Floats, mask_P: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean with percentile interval."""
        means_B = self.means(values_P, mask_P)
        tail = (1.0 - self._confidence) / 2.0
        low, high = np.nanquantile(means_B, [tail, 1.0 - tail])
        picked = values_P if mask_P is None else values_P[mask_P]
        return Estimate(float(picked.mean()), float(low), float(high), len(picked))

    def superiority_p(self, improvement_P: Floats, margin: float) -> float:
        """One-sided p-value of "the mean improvement is at most `margin`": the share of resamples that say so.

        A model that equals its incumbent has p = 1, since every resample says so.
        """
        means_B = self.means(improvement_P)
        return float((1 + np.count_nonzero(means_B <= margin)) / (1 + len(means_B)))


def roc(margins_P: Floats) -> dict[str, list[float]]:
    """ROC of the margin: each pair once as it is and once turned round; false and true positive rates, thresholds.

    With this symmetry the area under the curve is the probability that a right margin exceeds a wrong one.
    """
    scores = np.concatenate([margins_P, -margins_P])
    labels = np.concatenate([np.ones_like(margins_P), np.zeros_like(margins_P)])
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    true_rate = np.append(0.0, np.cumsum(labels)[last] / labels.sum())
    false_rate = np.append(0.0, np.cumsum(1 - labels)[last] / (1 - labels).sum())
    thresholds = np.append(scores[0] + 1.0, scores[last])
    return {"fpr": false_rate.tolist(), "tpr": true_rate.tolist(), "threshold": thresholds.tolist()}


def area_under(curve: dict[str, list[float]]) -> float:
    """Area under a ROC by the trapezoid rule."""
    return float(np.trapezoid(curve["tpr"], curve["fpr"]))


def describe(
    bootstrap: GroupBootstrap,
    margins_P: Floats,
    chosen_P: Floats,
    rejected_P: Floats,
    scale: float,
    mask_P: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """The held-out metrics of one model, each with its interval.

    Args:
        margins_P, chosen_P, rejected_P: rewards against the common base, nats.
        scale: from `fit_scale` on the validation pairs.
    """
    metrics = {
        "preference_log_loss": log_loss(margins_P, scale),
        "reward_accuracy": accuracy(margins_P),
        "reward_margin": margins_P,
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
    }
    return {name: bootstrap.estimate(values, mask_P).as_dict() for name, values in metrics.items()}
