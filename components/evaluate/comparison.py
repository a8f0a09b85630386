"""Metrics from the log-probs of the test pairs: of each model alone, and of the policy against its rivals.

Shapes: P test pairs, B bootstrap resamples, K slices of the test pairs; chosen comes before rejected.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from components.dataset.records import LANGUAGES, Preference
from components.engine.objectives import LOSSES
from components.evaluate.config import EvaluateConfig
from components.gate.results import Comparison, Estimate, McNemar, Metrics, ModelResults, PairResults
from components.gate.rules import FIRST_RIVALS
from components.gate.statistics import (
    DISTRIBUTION_POINTS,
    Floats,
    GroupBootstrap,
    Mask,
    accuracy,
    brier,
    compared_loss,
    fit_scale,
    log_loss,
    mcnemar,
    reliability,
    roc,
    superiority_p,
)
from components.training.scoring import TokenLogps

Rows = dict[str, list[Preference]]
EVAL_SPLITS = ("validation", "test")
SLICES = {"languages": "by_language", "sources": "by_source", "lengths": "by_length"}
"""Kinds of slices by their key in a model's results, and their key in a comparison."""
POWER_Z = 1.645 + 0.842
"""Standard normal quantiles of a one-sided test at 5 % with 80 % power."""
MOST_PAIRS, MANY = 1_000_000, "more than a million"
"""Largest sample size to state, and the wording beyond it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """A model's log-probs of the pairs, and how it was trained.

    Args:
        by_split: log-probs of the validation and test pairs.
        reference: log-probs of the test pairs under the model's reference; None without one, or if it is not known.
        beta: beta of its preference training; None without one, or if it is not known.
        loss: loss of its preference training; empty likewise.
    """

    by_split: Mapping[str, TokenLogps]
    reference: TokenLogps | None = None
    beta: float | None = None
    loss: str = ""


@dataclass(frozen=True)
class _ModelEvaluation:
    """A model's results, and what comparisons need: margin and loss per pair, loss per resample and slice."""

    margins_P: Floats
    loss_P: Floats
    loss_BK: Floats
    calibration_P: Floats
    """Margins of the validation pairs."""
    results: ModelResults


def compare(
    config: EvaluateConfig, threshold: float, regression: float, rows: Rows, scored: Mapping[str, Scored]
) -> PairResults:
    """Evaluate every model on the test pairs, and the policy against its rivals; the models' generation is left None.

    Args:
        config: bootstrap settings.
        threshold: improvement that the policy must exceed, nats; below 0 for non-inferiority.
        regression: largest regression that a language may have, nats.
        rows: validation and test pairs.
        scored: `base`, `policy`, `sft` unless the policy is the SFT model and, if there is one, `incumbent`.
    """
    test = rows["test"]
    settings = (config.bootstrap_resamples, config.confidence)
    bootstrap = GroupBootstrap([row.group for row in test], *settings, config.seed)
    calibration = GroupBootstrap([row.group for row in rows["validation"]], *settings, config.seed + 1)
    lengths_P = scored["base"].by_split["test"].lengths_EC.max(axis=1)
    masks = slices(test, lengths_P)
    base = {split: scored["base"].by_split[split].sums() for split in EVAL_SPLITS}
    models = {name: _evaluate(bootstrap, calibration, masks, test, model, base) for name, model in scored.items()}
    policy = models["policy"]
    rivals = [name for name in ("sft", "incumbent") if name in models]
    comparisons: dict[str, Comparison] = {
        rival: _compare(bootstrap, (threshold, regression), masks, policy, models[rival], rival)
        for rival in (rivals if "sft" in models else ["base", *rivals])
    }
    return {
        "pairs": {split: len(rows[split]) for split in EVAL_SPLITS},
        "groups": {"validation": calibration.n_groups, "test": bootstrap.n_groups},
        "confidence": config.confidence,
        "bootstrap_resamples": config.bootstrap_resamples,
        "seed": config.seed,
        "beta": scored["policy"].beta,
        "loss_type": scored["policy"].loss,
        "models": {name: model.results for name, model in models.items()},
        "comparisons": comparisons,
        "roc": roc(policy.margins_P),
        "held_out": [
            {
                "id": row.id,
                "group": row.group,
                "lang": row.lang,
                "source": row.source,
                "length": int(length),
                "margins": {name: float(model.margins_P[index]) for name, model in models.items()},
            }
            for index, (row, length) in enumerate(zip(test, lengths_P, strict=True))
        ],
        "calibration": [
            {
                "group": row.group,
                "margins": {name: float(model.calibration_P[index]) for name, model in models.items()},
            }
            for index, row in enumerate(rows["validation"])
        ],
    }


def slices(rows: Sequence[Preference], lengths_P: Any) -> dict[str, Mask]:
    """Masks [P] of all test pairs, `overall`, and of every non-empty slice, `kind/part`.

    Args:
        rows: P pairs.
        lengths_P: tokens of each pair's longer answer, bucketed into thirds of the pairs.
    """
    masks = {"overall": np.ones(len(rows), dtype=bool)}
    masks |= {f"languages/{lang}": np.array([row.lang == lang for row in rows]) for lang in LANGUAGES}
    for source in sorted({row.source for row in rows}):
        masks[f"sources/{source}"] = np.array([row.source == source for row in rows])
    low, high = (int(edge) for edge in np.quantile(lengths_P, [1 / 3, 2 / 3]))
    masks[f"lengths/up to {low} tokens"] = lengths_P <= low
    masks[f"lengths/{low + 1} to {high} tokens"] = (lengths_P > low) & (lengths_P <= high)
    masks[f"lengths/over {high} tokens"] = lengths_P > high
    return {name: mask for name, mask in masks.items() if mask.any()}


def _evaluate(
    bootstrap: GroupBootstrap,
    calibration: GroupBootstrap,
    masks: Mapping[str, Mask],
    rows: Sequence[Preference],
    scored: Scored,
    base: Mapping[str, Floats],
) -> _ModelEvaluation:
    rewards = {split: scored.by_split[split].sums() - base[split] for split in EVAL_SPLITS}
    gaps = {split: rewards[split][:, 0] - rewards[split][:, 1] for split in EVAL_SPLITS}
    scale = fit_scale(gaps["validation"])
    masks_PK = np.stack(list(masks.values()), axis=1).astype(np.float64)
    counts_BK = bootstrap.sums(masks_PK)
    scales_B = calibration.scales(gaps["validation"])
    loss_BK, brier_BK = bootstrap.scaled_sums(gaps["test"], scales_B, masks_PK)
    with np.errstate(invalid="ignore"):  # a resample may have no pair of a slice
        loss_BK, brier_BK = loss_BK / counts_BK, brier_BK / counts_BK
    loss_P, brier_P = compared_loss(gaps["test"], scale), brier(gaps["test"], scale)
    table = bootstrap.table(_columns(scored, rows, rewards["test"]), masks)
    for index, (name, mask) in enumerate(masks.items()):
        n = int(mask.sum())
        loss = bootstrap.interval(loss_P[mask].mean(), loss_BK[:, index], n)
        table[name] = {"preference_log_loss": loss} | table[name]
        table[name]["brier"] = bootstrap.interval(brier_P[mask].mean(), brier_BK[:, index], n)
    policy_P2 = policy_rewards(scored)
    plots = {"fitted": reliability(bootstrap, gaps["test"], scale)}
    if policy_P2 is not None:
        plots["as_trained"] = reliability(bootstrap, policy_P2[:, 0] - policy_P2[:, 1], 1.0)
    results: ModelResults = {
        "scale": scale,
        "overall": table["overall"],
        "languages": _of_kind("languages", table),
        "sources": _of_kind("sources", table),
        "lengths": _of_kind("lengths", table),
        "policy_metrics": None if policy_P2 is None else _policy_metrics(bootstrap, policy_P2),
        "auc": bootstrap.auc(gaps["test"]),
        "reliability": plots,
        "generation": None,
    }
    return _ModelEvaluation(gaps["test"], loss_P, loss_BK, gaps["validation"], results)


def _of_kind(kind: str, parts: Mapping[str, T]) -> dict[str, T]:
    return {name.partition("/")[2]: values for name, values in parts.items() if name.startswith(f"{kind}/")}


def _columns(scored: Scored, rows: Sequence[Preference], rewards_P2: Floats) -> dict[str, tuple[Floats, Floats]]:
    """Value and weight of each pair, for every metric that is a ratio of sums."""
    test = scored.by_split["test"]
    logps_P2 = test.sums()
    per_token_P2 = logps_P2 / test.lengths_EC
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    ones_P = np.ones(len(rows))
    bytes_P = np.array([float(len(row.chosen.encode())) for row in rows])
    columns = {
        "rewards/accuracies": (accuracy(margins_P), ones_P),
        "rewards/margins": (margins_P, ones_P),
        "rewards/chosen": (rewards_P2[:, 0], ones_P),
        "rewards/rejected": (rewards_P2[:, 1], ones_P),
        "raw_accuracy": (accuracy(logps_P2[:, 0] - logps_P2[:, 1]), ones_P),
        "raw_accuracy_per_token": (accuracy(per_token_P2[:, 0] - per_token_P2[:, 1]), ones_P),
        "bits_per_byte": (-logps_P2[:, 0] / math.log(2), bytes_P),
    }
    if scored.reference is not None:
        change_P2 = logps_P2 - scored.reference.sums()
        columns["chosen_logp_change"] = (change_P2[:, 0], ones_P)
        columns["divergence"] = (divergence(test, scored.reference).mean(axis=1), ones_P)
    return columns


def divergence(model: TokenLogps, reference: TokenLogps) -> Floats:
    """Distance of a model from its reference on given answers, nats per answer [E, C].

    Half the squared log-ratio of each token, summed: the estimator k2 of KL(model || reference) in J. Schulman,
    "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html, 2020). The answers are the data's and not the
    model's, so it is a measure of distance rather than an estimate of that KL; see `sampled_kl` for one.
    """
    ratio_N = model.values_N.astype(np.float64) - reference.values_N
    return model.sums_of(0.5 * ratio_N**2)


def sampled_kl(model: TokenLogps, reference: TokenLogps) -> Floats:
    """KL(model || reference) of whole answers that the model itself sampled, nats per answer [E].

    (r - 1) - log r with r = reference / model for each token, summed: the estimator k3 of J. Schulman's note, which is
    unbiased and never negative. Answers are cut at their length limit.
    """
    log_r_N = reference.values_N.astype(np.float64) - model.values_N
    kl_E: Floats = model.sums_of(np.expm1(log_r_N) - log_r_N)[:, 0]
    return kl_E


def policy_rewards(scored: Scored) -> Floats | None:
    """Rewards of chosen and rejected as the model's own training defines them, [P, 2]; None if that is not known."""
    if scored.beta is None or scored.loss not in LOSSES:
        return None
    loss = LOSSES[scored.loss]
    test = scored.by_split["test"]
    scores_P2 = test.sums()
    if not loss.reference_free:
        if scored.reference is None:
            return None
        scores_P2 = scores_P2 - scored.reference.sums()
    if loss.per_token:
        scores_P2 = scores_P2 / test.lengths_EC
    return scored.beta * scores_P2


def _policy_metrics(bootstrap: GroupBootstrap, rewards_P2: Floats) -> Metrics:
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    columns = {"loss": log_loss(margins_P), "rewards/accuracies": accuracy(margins_P), "rewards/margins": margins_P}
    columns |= {"rewards/chosen": rewards_P2[:, 0], "rewards/rejected": rewards_P2[:, 1], "brier": brier(margins_P)}
    return {name: bootstrap.estimate(values) for name, values in columns.items()}


def _compare(
    bootstrap: GroupBootstrap,
    limits: tuple[float, float],
    masks: Mapping[str, Mask],
    policy: _ModelEvaluation,
    rival: _ModelEvaluation,
    name: str,
) -> Comparison:
    threshold, regression = limits
    gain_P, gain_BK = rival.loss_P - policy.loss_P, rival.loss_BK - policy.loss_BK
    gains: dict[str, Estimate] = {
        part: bootstrap.interval(gain_P[mask].mean(), gain_BK[:, index], int(mask.sum()))
        for index, (part, mask) in enumerate(masks.items())
    }
    improvement, ranked = gains["overall"], mcnemar(policy.margins_P, rival.margins_P)
    error = float(np.std(gain_BK[:, 0]))
    return {
        "improvement": improvement,
        "threshold": threshold,
        "p_value": bootstrap.p_value(gain_P, gain_BK[:, 0], threshold),
        "distribution": np.quantile(gain_BK[:, 0], DISTRIBUTION_POINTS).tolist(),
        "regression_p": {
            part.partition("/")[2]: superiority_p(-gain_BK[np.isfinite(gain_BK[:, index]), index], regression)
            for index, part in enumerate(masks)
            if part.startswith("languages/")
        },
        "by_language": _of_kind("languages", gains),
        "by_source": _of_kind("sources", gains),
        "by_length": _of_kind("lengths", gains),
        "accuracy": bootstrap.estimate(accuracy(policy.margins_P) - accuracy(rival.margins_P)),
        "mcnemar": ranked,
        "words": words(improvement, ranked, error, bootstrap.n_groups, name),
    }


RIVALS = FIRST_RIVALS | {"incumbent": "the incumbent champion"}


def words(improvement: Estimate, ranked: McNemar, error: float, n_groups: int, rival: str) -> str:
    """Sentences that say what the evidence supports, which may be nothing.

    Args:
        improvement: improvement of the policy over the rival, nats.
        ranked: pairs that only one of the two ranks correctly.
        error: standard error of the improvement, nats.
        n_groups: prompt groups of the test pairs.
        rival: `sft`, `base` or `incumbent`.
    """
    gain, low, high = improvement["value"], improvement["low"], improvement["high"]
    pairs, who = improvement["n"], RIVALS[rival]
    where = f"on {pairs} held-out pairs of {n_groups} prompt groups"
    interval = f"[{low:+.4f}, {high:+.4f}]"
    if low == high == 0.0:
        text = f"The policy and {who} score every pair alike {where}: nothing distinguishes them."
    elif low > 0.0:
        text = f"The evidence supports that the policy is better than {who}: its log-loss is lower by {gain:.4f} nats"
        text += f" {interval} {where}."
    elif high < 0.0:
        text = f"The evidence supports that the policy is worse than {who}: its log-loss is higher by {-gain:.4f} nats"
        text += f" {interval} {where}."
    else:
        text = f"The evidence supports neither model: {where} the log-loss of the policy is"
        text += f" {abs(gain):.4f} nats {'lower' if gain >= 0 else 'higher'} than that of {who}, and the data"
        text += f" are compatible with anything in {interval}."
        if gain > 0.0:
            # Compare before dividing: a tiny difference would need infinitely many pairs.
            few = POWER_Z * error * math.sqrt(pairs) < gain * math.sqrt(MOST_PAIRS)
            needed = f"about {max(math.ceil(pairs * (POWER_Z * error / gain) ** 2), pairs + 1)}" if few else MANY
            text += f" If the difference is real, {needed} pairs would detect it with 80 % power."
    text += f" Of the pairs that only one of them ranks correctly, {ranked['policy_only']} are the policy's and"
    text += f" {ranked['rival_only']} are the other's (McNemar's exact test, two-sided p = {ranked['p_value']:.3f})."
    return text
