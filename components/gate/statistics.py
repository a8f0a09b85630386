"""Preference statistics with intervals: a proper scoring rule for the implicit reward, and the paired group bootstrap.

A model's implicit reward is measured against one common frozen reference, the base model: log pi(y|x) - log base(y|x),
in nats. Models differ in how large their rewards are (beta, epochs), so each gets one scale, fitted on the validation
pairs, before held-out pairs are scored at half of it. That scale is itself uncertain: every resample of the test pairs
comes with a resample of the validation pairs and the scale that fits it.

Shapes: P pairs, G prompt groups, B bootstrap resamples, K slices (masks over pairs), M metrics.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from components.gate.results import Estimate, McNemar, Metrics, ReliabilityBin, RocCurve

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
SCALE_BOUNDS = (1e-4, 1e2)
"""Bounds in units of the inverse typical margin; an uninformative model ends at the lower one, with a loss of ln 2."""
SCALE_HALVINGS = 24
COMPARED = 0.5
"""Models are compared at this share of their fitted scale, as a bettor stakes half of what looks best (half-Kelly).

The gain of margins m over a coin toss grows with the scale s as s E[m]/2 - s^2 E[m^2]/8, and its noise as s: half of
the best scale keeps three quarters of the gain at half of the noise, and a fit that is too high by chance costs
little. At the fitted scale itself, detecting a better model takes about twice as many pairs. Source: Thorp, "The Kelly
criterion in blackjack, sports betting, and the stock market" (2006), on fractional Kelly.
"""
RESAMPLE_BLOCK = 500
DISTRIBUTION_POINTS = np.arange(1, 1000) / 1000
CURVE_POINTS = 500
"""Most points of a ROC curve, so that reports and Kubeflow's metadata stay small."""


def log_loss(margins_P: Floats, scale: float | Floats = 1.0) -> Floats:
    """Preference log-loss of each pair, -log sigmoid(scale * margin), nats; ln 2 is a coin toss."""
    return np.logaddexp(0.0, -scale * margins_P)


def compared_loss(margins_P: Floats, scale: float | Floats) -> Floats:
    """The log-loss in which models are compared: at `COMPARED` of the fitted scale, one or one per resample [B, 1]."""
    return log_loss(margins_P, COMPARED * scale)


def brier(margins_P: Floats, scale: float | Floats = 1.0) -> Floats:
    """Brier score of each pair, (1 - sigmoid(scale * margin))^2; 1/4 is a coin toss.

    The predicted event is that the chosen answer is preferred, so the outcome is always 1.
    """
    from scipy.special import expit

    squares_P: Floats = expit(-scale * margins_P) ** 2
    return squares_P


def accuracy(margins_P: Floats) -> Floats:
    """1 where the chosen answer has the higher reward, one half for a tie."""
    return np.where(margins_P > 0, 1.0, np.where(margins_P == 0, 0.5, 0.0))


def fit_scale(margins_P: Floats) -> float:
    """The scale above 0 that fits the margins best; multiplying all margins by c divides it by c."""
    return float(fit_scales(margins_P, np.ones((1, len(margins_P))))[0])


def fit_scales(margins_P: Floats, weights_BP: Floats) -> Floats:
    """The best scale of each weighting of the pairs, [B]: lowest mean log-loss with smoothed targets.

    The target probability of n pairs is (n + 1) / (n + 2) instead of 1, so that margins of which all have the right
    sign do not fit an infinite scale. Source: Platt, "Probabilistic outputs for support vector machines" (1999),
    section 2.2. The slope of the loss rises with the scale, so bisection (on its logarithm) finds where it is 0.
    """
    from scipy.special import expit

    unit = float(np.sqrt(np.mean(margins_P**2)))
    n_B = weights_BP.sum(axis=1)
    if unit == 0.0:
        return np.ones_like(n_B)
    relative_P = margins_P / unit
    target_B1 = ((n_B + 1.0) / (n_B + 2.0))[:, None]
    low_B, high_B = (np.full_like(n_B, math.log(bound)) for bound in SCALE_BOUNDS)
    for _ in range(SCALE_HALVINGS):
        middle_B = 0.5 * (low_B + high_B)
        excess_BP = expit(np.exp(middle_B)[:, None] * relative_P) - target_B1
        too_high_B = (weights_BP * excess_BP) @ relative_P > 0.0
        low_B, high_B = np.where(too_high_B, low_B, middle_B), np.where(too_high_B, middle_B, high_B)
    scales_B: Floats = np.exp(0.5 * (low_B + high_B)) / unit
    return scales_B


class GroupBootstrap:
    """Bootstrap over whole prompt groups; all statistics of one instance share its resamples and so are paired."""

    def __init__(self, groups: Sequence[str], resamples: int, confidence: float, seed: int) -> None:
        names, self._group_P = np.unique(np.asarray(groups), return_inverse=True)
        self.n_groups = len(names)
        self.resamples, self._confidence, self._seed = resamples, confidence, seed

    def weights(self) -> Iterator[Floats]:
        """How often each pair is in each resample, float64 [at most RESAMPLE_BLOCK, P] at a time; always the same."""
        for counts_BG in self._counts():
            yield counts_BG[:, self._group_P]

    def _counts(self) -> Iterator[Floats]:
        """How often each group is in each resample, float64 [at most RESAMPLE_BLOCK, G] at a time."""
        rng = np.random.default_rng(self._seed)
        for first in range(0, self.resamples, RESAMPLE_BLOCK):
            n = min(RESAMPLE_BLOCK, self.resamples - first)
            counts_BG = rng.multinomial(self.n_groups, np.full(self.n_groups, 1.0 / self.n_groups), size=n)
            yield counts_BG.astype(np.float64)

    def studentized_p(self, gain_PE: Floats, threshold: float) -> Floats:
        """One-sided p-values of "the mean gain is at most `threshold`" by the bootstrap-t, one per column, [E].

        The share of resamples whose t-statistic, about the sample's own mean, reaches the sample's about the threshold.
        Losses are skewed, and a percentile interval is overconfident in the tails of skewed means: with 100 pairs it
        may allow twice the nominal rate of wrong promotions. Source: Hall, Annals of Statistics 16 (1988), pp. 927-953.
        """
        size_G = np.bincount(self._group_P, minlength=self.n_groups).astype(np.float64)
        sum_GE = np.zeros((self.n_groups, gain_PE.shape[1]))
        np.add.at(sum_GE, self._group_P, gain_PE)
        mean_E = sum_GE.sum(axis=0) / size_G.sum()
        error_E = np.sqrt(((sum_GE - mean_E * size_G[:, None]) ** 2).sum(axis=0)) / size_G.sum()
        reached_E = np.zeros(gain_PE.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            t_E = (mean_E - threshold) / error_E
            for counts_BG in self._counts():
                n_B1 = (counts_BG @ size_G)[:, None]
                mean_BE = counts_BG @ sum_GE / n_B1
                square_BE = counts_BG @ sum_GE**2 - 2.0 * mean_BE * (counts_BG @ (sum_GE * size_G[:, None]))
                square_BE += mean_BE**2 * (counts_BG @ size_G**2)[:, None]
                t_BE = (mean_BE - mean_E) * n_B1 / np.sqrt(np.maximum(square_BE, 0.0))
                # A resample without spread is uninformative, and counts against the policy.
                reached_E += (~(t_BE < t_E)).sum(axis=0)
        return (1.0 + reached_E) / (1.0 + self.resamples)

    def p_value(self, gain_P: Floats, gain_B: Floats, threshold: float) -> float:
        """One-sided p-value of "the mean gain is at most `threshold`", of each pair's gain and each resample's mean.

        The larger of two p-values with different blind spots: the percentile's ignores skew, the bootstrap-t's ignores
        the uncertainty of the scale.
        """
        return max(superiority_p(gain_B, threshold), float(self.studentized_p(gain_P[:, None], threshold)[0]))

    def sums(self, values_PM: Floats) -> Floats:
        """Sum of each column over each resample, [B, M]."""
        return np.concatenate([weights_BP @ values_PM for weights_BP in self.weights()])

    def scales(self, margins_P: Floats) -> Floats:
        """The scale that fits each resample of these pairs, [B]."""
        return np.concatenate([fit_scales(margins_P, weights_BP) for weights_BP in self.weights()])

    def scaled_sums(self, margins_P: Floats, scales_B: Floats, masks_PK: Floats) -> tuple[Floats, Floats]:
        """Sums of log-loss (as compared) and Brier score over each resample, with its scale, and slice: [B, K] each."""
        losses, squares, first = [], [], 0
        for weights_BP in self.weights():
            scale_B1 = scales_B[first : first + len(weights_BP), None]
            losses.append((weights_BP * compared_loss(margins_P, scale_B1)) @ masks_PK)
            squares.append((weights_BP * brier(margins_P, scale_B1)) @ masks_PK)
            first += len(weights_BP)
        return np.concatenate(losses), np.concatenate(squares)

    def interval(self, value: float, values_B: Floats, n: int) -> Estimate:
        """An estimate with the percentile interval of its resampled values; resamples without a value do not count."""
        tail = (1.0 - self._confidence) / 2.0
        known_B = values_B[np.isfinite(values_B)]
        bounds = np.quantile(known_B, [tail, 1.0 - tail]) if len(known_B) else np.array([value, value])
        return {"value": float(value), "low": float(bounds[0]), "high": float(bounds[1]), "n": n}

    def estimate(self, values_P: Floats, mask_P: Mask | None = None) -> Estimate:
        """Mean with its interval; with a mask, over the masked pairs."""
        return self.ratio(values_P, np.ones_like(values_P), mask_P)

    def ratio(self, values_P: Floats, weights_P: Floats, mask_P: Mask | None = None) -> Estimate:
        """Sum of the values over the sum of the weights, with its interval."""
        masks = {"": np.ones(len(values_P), dtype=bool) if mask_P is None else mask_P}
        return self.table({"": (values_P, weights_P)}, masks)[""][""]

    def table(self, columns: Mapping[str, tuple[Floats, Floats]], masks: Mapping[str, Mask]) -> dict[str, Metrics]:
        """`ratio` for each slice and column, {slice: {column: estimate}}; a ratio of zero weight is left out."""
        pairs = [(slice_, name) for slice_ in masks for name in columns]
        numerator_PC = np.stack([columns[name][0] * masks[slice_] for slice_, name in pairs], axis=1)
        denominator_PC = np.stack([columns[name][1] * masks[slice_] for slice_, name in pairs], axis=1)
        ratios_BC = _divide(self.sums(numerator_PC), self.sums(denominator_PC))
        values_C = _divide(numerator_PC.sum(axis=0), denominator_PC.sum(axis=0))
        tables: dict[str, Metrics] = {slice_: {} for slice_ in masks}
        for index, (slice_, name) in enumerate(pairs):
            if math.isnan(values_C[index]):
                continue
            n = int(masks[slice_].sum())
            tables[slice_][name] = self.interval(float(values_C[index]), ratios_BC[:, index], n)
        return tables

    def auc(self, margins_P: Floats) -> Estimate:
        """Area under `roc` with its interval: the share of ordered pairs i, j with margin i above minus margin j."""
        order = np.argsort(margins_P, kind="stable")
        ordered_P = margins_P[order]
        below, up_to = (np.searchsorted(ordered_P, -ordered_P, side=side) for side in ("left", "right"))

        def areas(weights_BP: Floats) -> Floats:
            weights_BP = weights_BP[:, order]
            total_B1 = weights_BP.sum(axis=1, keepdims=True)
            before_BP = np.concatenate([np.zeros_like(total_B1), weights_BP.cumsum(axis=1)], axis=1)
            beaten_BP = total_B1 - 0.5 * (before_BP[:, below] + before_BP[:, up_to])
            areas_B: Floats = (weights_BP * beaten_BP).sum(axis=1) / total_B1[:, 0] ** 2
            return areas_B

        values_B = np.concatenate([areas(weights_BP) for weights_BP in self.weights()])
        return self.interval(float(areas(np.ones((1, len(margins_P))))[0]), values_B, len(margins_P))


def superiority_p(improvement_B: Floats, threshold: float) -> float:
    """One-sided p-value of "the improvement is at most `threshold`": the share of resamples in which it is.

    A model that equals its incumbent has p = 1 at the threshold 0, since that holds in every resample.
    """
    return float((1 + np.count_nonzero(improvement_B <= threshold)) / (1 + len(improvement_B)))


def mcnemar(policy_P: Floats, rival_P: Floats) -> McNemar:
    """McNemar's exact test on which of two models ranks pairs correctly: binomial, two-sided.

    Source: McNemar, Psychometrika 12 (1947). It assumes independent pairs, which those of one prompt group are not.
    """
    policy_only = int(np.count_nonzero((policy_P > 0) & (rival_P < 0)))
    rival_only = int(np.count_nonzero((policy_P < 0) & (rival_P > 0)))
    n = policy_only + rival_only
    from scipy.stats import binomtest

    p_value = float(binomtest(policy_only, n, 0.5).pvalue) if n else 1.0
    return {"policy_only": policy_only, "rival_only": rival_only, "p_value": p_value}


def roc(margins_P: Floats) -> RocCurve:
    """ROC curve of the margin, with each pair once as it is and once with chosen and rejected swapped.

    With this symmetry the area under the curve is the probability that a correct margin exceeds a swapped one.
    """
    scores = np.concatenate([margins_P, -margins_P])
    labels = np.concatenate([np.ones_like(margins_P), np.zeros_like(margins_P)])
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    last = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    true_rate = np.append(0.0, np.cumsum(labels)[last] / labels.sum())
    false_rate = np.append(0.0, np.cumsum(1 - labels)[last] / (1 - labels).sum())
    thresholds = np.append(scores[0] + 1.0, scores[last])
    points = np.unique(np.linspace(0, len(thresholds) - 1, min(CURVE_POINTS, len(thresholds))).astype(int))
    return {
        "fpr": false_rate[points].tolist(),
        "tpr": true_rate[points].tolist(),
        "threshold": thresholds[points].tolist(),
    }


def reliability(bootstrap: GroupBootstrap, margins_P: Floats, scale: float, bins: int = 5) -> list[ReliabilityBin]:
    """Reliability of the probabilities sigmoid(scale * |margin|) of the answer that the model prefers, lowest first.

    Args:
        margins_P: chosen reward minus rejected reward.
        scale: factor on the margins.
        bins: number of bins with equally many pairs; equal probabilities stay together.

    Returns:
        for each bin the mean predicted probability, the observed share of correct preferences with its interval, n.
    """
    from scipy.special import expit

    predicted_P, right_P = expit(scale * np.abs(margins_P)), accuracy(margins_P)
    edges = np.unique(np.quantile(predicted_P, np.linspace(0.0, 1.0, bins + 1)))
    bin_P = np.clip(np.searchsorted(edges, predicted_P, side="right") - 1, 0, max(0, len(edges) - 2))
    masks = {str(index): bin_P == index for index in np.unique(bin_P)}
    plot: list[ReliabilityBin] = []
    for name, observed in bootstrap.table({"right": (right_P, np.ones_like(right_P))}, masks).items():
        right = observed["right"]
        plot.append(
            {
                "predicted": float(predicted_P[masks[name]].mean()),
                "observed": right["value"],
                "low": right["low"],
                "high": right["high"],
                "n": right["n"],
            }
        )
    return plot


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    quotient: Floats = np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
    return quotient
