"""Known pathologies of DPO, detected in the training curves and the policy's answers.

A curve counts as above or below a value if its mean over the last third of the steps is, by more than two standard
errors of that mean: steps are small batches and noisy. Rewards are beta times log-ratios to the reference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.engine.history import StepRecord
from components.engine.objectives import LN2, LOSSES
from components.gate.results import Finding, PairResults
from components.gate.statistics import Floats

ERRORS = 2.0
LOST_NATS = 0.01
EARLY_SHARE = 0.25
EARLY_ACCURACY = 0.99
EARLY_STEPS = 3
SATURATED_REWARD = 5.0
"""Reward margin beyond which a pair's gradient, sigmoid(-5), is less than 1 % of its maximum."""
START_NATS = 1.0
"""Log-ratio of an answer before the first update that exceeds the effect of rounding and dropout."""
LONGER = 1.5


@dataclass(frozen=True)
class Curves:
    """DPO's metrics by step; `validated` holds the validation metrics of the steps that ended with a validation."""

    steps: Mapping[str, Floats]
    validated: Mapping[str, Floats]
    total: int

    def tail(self, name: str) -> tuple[float, float]:
        """Mean over the last third of the steps, and its standard error."""
        values = self.steps[name]
        last = values[-max(1, math.ceil(len(values) / 3)) :]
        error = float(last.std(ddof=1) / math.sqrt(len(last))) if len(last) > 1 else 0.0
        return float(last.mean()), error

    def above(self, name: str, bound: float) -> bool:
        """Whether the curve ends above the bound."""
        mean, error = self.tail(name)
        return mean - ERRORS * error > bound

    def below(self, name: str, bound: float) -> bool:
        """Whether the curve ends below the bound."""
        mean, error = self.tail(name)
        return mean + ERRORS * error < bound


def to_curves(records: Sequence[StepRecord]) -> Curves:
    """The curves of a training run."""
    shared = set(records[0].metrics).intersection(*(record.metrics for record in records))
    steps = {name: np.array([record.metrics[name] for record in records]) for name in shared}
    steps["loss"] = np.array([record.loss for record in records])
    steps["step"] = np.array([record.step for record in records])
    validations = [record.validation for record in records if record.validation]
    names = validations[0] if validations else ()
    validated = {name: np.array([validation[name] for validation in validations]) for name in names}
    return Curves(steps, validated, records[-1].total_steps)


def diagnose(records: Sequence[StepRecord], evaluation: PairResults) -> list[Finding]:
    """The pathologies of a training run, problems first; empty if there are none, or no step.

    Args:
        records: the steps of dpo.
        evaluation: the policy's beta and loss, and the metrics of its answers.
    """
    beta, loss = evaluation["beta"], evaluation["loss_type"]
    if beta is None:
        return []
    curves = to_curves(records)
    checks = [
        _reference_mismatch(curves),
        _no_learning(curves, loss),
        _leak(curves),
        _over_confidence(curves, loss),
        _kl_blow_up(curves, beta, loss),
        _length_explosion(evaluation),
        _displacement(curves),
    ]
    findings = [finding for finding in checks if finding is not None]
    return sorted(findings, key=lambda finding: finding["severity"] != "problem")


def _problem(name: str, evidence: str, advice: str) -> Finding:
    return {"name": name, "severity": "problem", "evidence": evidence, "advice": advice}


def _warning(name: str, evidence: str, advice: str) -> Finding:
    return {"name": name, "severity": "warning", "evidence": evidence, "advice": advice}


def _reference_mismatch(curves: Curves) -> Finding | None:
    if "kl" not in curves.steps or curves.steps["step"][0] != 1:
        return None
    nats = math.sqrt(2.0 * curves.steps["kl"][0])
    if nats <= START_NATS:
        return None
    return _problem(
        "reference mismatch",
        f"before the first update the policy's log-probs of an answer differ from the reference's by {nats:.2f} nats"
        f" (root mean square); expected 0, a loss of ln 2, found {curves.steps['loss'][0]:.3f}",
        "the reference is not the model that training started from: remove the cache (`kubealign clean cache`), check"
        " that both are the same SFT model in the same precision, and lower dropout",
    )


def _no_learning(curves: Curves, loss: str) -> Finding | None:
    if curves.above("rewards/accuracies", 0.5) or curves.above("rewards/margins", 0.0):
        return None
    accuracy, margin, mean = (curves.tail(name)[0] for name in ("rewards/accuracies", "rewards/margins", "loss"))
    advice = "the learning rate is too low or training too short: raise dpo.learning_rate or dpo.epochs; if it stays"
    advice += " so, check whether the labels carry any signal"
    start = LOSSES[loss].value_at_no_learning
    if start is not None and curves.above("loss", start + LOST_NATS):
        advice = "the learning rate is too high: lower dpo.learning_rate, tenfold at first, or raise dpo.warmup_ratio"
    return _problem(
        "no learning",
        f"over the last third of training the policy ranks {accuracy:.0%} of its own pairs correctly with a mean"
        f" margin of {margin:.3g}, no better than chance; the loss is {mean:.4f}",
        advice,
    )


def _leak(curves: Curves) -> Finding | None:
    """In the first epoch the policy has not seen a step's pairs before; it never sees validation pairs."""
    early = math.ceil(EARLY_SHARE * curves.total)
    steps = curves.steps["step"]
    accuracy = curves.steps["rewards/accuracies"][(steps > early / 2) & (steps <= early) & (steps > 1)]
    validated = curves.validated.get("rewards/accuracies", accuracy)
    if len(accuracy) < EARLY_STEPS or min(accuracy.mean(), validated[-1]) < EARLY_ACCURACY:
        return None
    return _problem(
        "accuracy of 1.0 too early",
        f"by step {early} of {curves.total} the policy ranks {accuracy.mean():.0%} of the pairs correctly",
        "something in the answers leaks the label: compare chosen and rejected for a marker, a source, a length or"
        " a format that differs in every pair; or the pairs are too easy to teach anything",
    )


def _over_confidence(curves: Curves, loss: str) -> Finding | None:
    """Checked on the validation pairs if there are any, else on the training pairs."""
    if LOSSES[loss].value_at_no_learning != LN2:
        return None
    if "loss" in curves.validated:
        value, accuracy = float(curves.validated["loss"][-1]), float(curves.validated["rewards/accuracies"][-1])
        overconfident, where = value > LN2 and accuracy > 0.5, "validation"
    else:
        value, accuracy = curves.tail("loss")[0], curves.tail("rewards/accuracies")[0]
        overconfident, where = curves.above("loss", LN2) and curves.above("rewards/accuracies", 0.5), "training"
    if not overconfident:
        return None
    return _problem(
        "over-confidence",
        f"the loss on {where} pairs ends at {value:.3f}, above the ln 2 = 0.693 of a coin toss, while {accuracy:.0%} of"
        " them are ranked correctly: the others are wrong by large margins",
        "train less (dpo.epochs, dpo.learning_rate), or soften the labels (dpo.label_smoothing); with"
        " dpo.eval_every_steps above 0 the step with the lowest validation loss is kept instead of the last",
    )


def _kl_blow_up(curves: Curves, beta: float, loss: str) -> Finding | None:
    if "kl" not in curves.steps or LOSSES[loss].per_token:
        return None
    kl, _ = curves.tail("kl")
    reward = beta * math.sqrt(2.0 * kl)
    if reward <= SATURATED_REWARD:
        return None
    return _problem(
        "KL blow-up",
        f"the policy's log-probs of an answer end {reward / beta:.0f} nats from the reference's (root mean square), a"
        f" reward of {reward:.1f}: beyond {SATURATED_REWARD:g} the loss is saturated and the drift teaches nothing",
        "raise dpo.beta or lower dpo.learning_rate and dpo.epochs",
    )


def _length_explosion(evaluation: PairResults) -> Finding | None:
    generation = evaluation["models"]["policy"]["generation"]
    ratio = generation["length_ratio"] if generation else None
    if generation is None or ratio is None or ratio["value"] < LONGER or ratio["low"] <= 1.0:
        return None
    cut = generation["greedy"]["unfinished"]["value"]
    return _problem(
        "length explosion",
        f"the policy's answers are {ratio['value']:.2f} times as long as the SFT model's [{ratio['low']:.2f},"
        f" {ratio['high']:.2f}]; {cut:.0%} reach the limit",
        "longer chosen answers teach length: balance the lengths in the data, raise dpo.beta, or use"
        " dpo.loss_type=sigmoid_norm, which normalizes by length",
    )


def _displacement(curves: Curves) -> Finding | None:
    if not (curves.below("rewards/chosen", 0.0) and curves.above("rewards/margins", 0.0)):
        return None
    chosen, margin = curves.tail("rewards/chosen")[0], curves.tail("rewards/margins")[0]
    return _warning(
        "chosen reward falls while the margin grows",
        f"over the last third of training the chosen reward is {chosen:.3f} and the margin {margin:.3f}: good answers"
        " become less likely too, though less so than bad ones (arXiv 2410.08847)",
        "raise dpo.beta, lower dpo.learning_rate, or train more SFT on the chosen answers; drop pairs"
        " whose two answers are nearly the same; dpo.loss_type=apo_zero keeps the chosen answer likely",
    )
