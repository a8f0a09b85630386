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
from components.evaluate.statistics import Floats
from components.gate.results import Finding, PairResults

ERRORS = 2.0
LOST_NATS = 0.01
EARLY_SHARE = 0.25
EARLY_ACCURACY = 0.99
EARLY_STEPS = 3
SATURATED_REWARD = 5.0
"""A pair with a reward margin beyond this has less than 1 % of the gradient of an undecided one, sigmoid(-5)."""
START_NATS = 1.0
"""Log-ratio of an answer before the first update that rounding and dropout do not explain."""
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


def curves(records: Sequence[StepRecord]) -> Curves:
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
    """The pathologies of a training run, problems first; empty if there are none.

    Args:
        records: the steps of dpo.
        evaluation: beta and loss of the policy, and what it writes.
    """
    found = curves(records)
    beta, loss = evaluation["beta"], evaluation["loss_type"]
    checks = [
        _reference_mismatch(found),
        _no_learning(found, loss),
        _leak(found),
        _over_confidence(found, loss),
        _kl_blow_up(found, beta, loss),
        _length_explosion(evaluation),
        _displacement(found),
    ]
    findings = [finding for finding in checks if finding is not None]
    return sorted(findings, key=lambda finding: finding["severity"] != "problem")


def _problem(name: str, evidence: str, advice: str) -> Finding:
    return {"name": name, "severity": "problem", "evidence": evidence, "advice": advice}


def _warning(name: str, evidence: str, advice: str) -> Finding:
    return {"name": name, "severity": "warning", "evidence": evidence, "advice": advice}


def _reference_mismatch(found: Curves) -> Finding | None:
    if "kl" not in found.steps or found.steps["step"][0] != 1:
        return None
    nats = math.sqrt(2.0 * found.steps["kl"][0])
    if nats <= START_NATS:
        return None
    return _problem(
        "reference mismatch",
        f"before the first update the policy's log-probs of an answer differ from the reference's by {nats:.2f} nats"
        f" (root mean square); expected 0, a loss of ln 2, found {found.steps['loss'][0]:.3f}",
        "the reference is not the model that training started from: remove the cache (`kubealign clean cache`), check"
        " that both are the same SFT model in the same precision, and lower dropout",
    )


def _no_learning(found: Curves, loss: str) -> Finding | None:
    if found.above("rewards/accuracies", 0.5) or found.above("rewards/margins", 0.0):
        return None
    accuracy, margin, mean = (found.tail(name)[0] for name in ("rewards/accuracies", "rewards/margins", "loss"))
    advice = "the learning rate is too low or training too short: raise dpo.learning_rate or dpo.epochs; if it stays"
    advice += " so, look whether the labels say anything at all"
    start = LOSSES[loss].value_at_no_learning
    if start is not None and found.above("loss", start + LOST_NATS):
        advice = "the learning rate is too high: lower dpo.learning_rate, by ten at first, or raise dpo.warmup_ratio"
    return _problem(
        "no learning",
        f"over the last third of training the policy ranks {accuracy:.0%} of its own pairs right with a mean margin of"
        f" {margin:.3g}, no better than chance; the loss is {mean:.4f}",
        advice,
    )


def _leak(found: Curves) -> Finding | None:
    """In the first epoch the pairs of a step are new to the policy; validation pairs always are."""
    early = math.ceil(EARLY_SHARE * found.total)
    steps = found.steps["step"]
    accuracy = found.steps["rewards/accuracies"][(steps > early / 2) & (steps <= early) & (steps > 1)]
    validated = found.validated.get("rewards/accuracies", accuracy)
    if len(accuracy) < EARLY_STEPS or min(accuracy.mean(), validated[-1]) < EARLY_ACCURACY:
        return None
    return _problem(
        "accuracy of 1.0 too early",
        f"by step {early} of {found.total} the policy ranks {accuracy.mean():.0%} of the pairs right",
        "something in the answers gives the label away: compare chosen and rejected for a marker, a source, a length or"
        " a format that differs in every pair; or the pairs are too easy to teach anything",
    )


def _over_confidence(found: Curves, loss: str) -> Finding | None:
    """On the validation pairs where there are some, otherwise on the training pairs."""
    if LOSSES[loss].value_at_no_learning != LN2:
        return None
    if "loss" in found.validated:
        value, accuracy = float(found.validated["loss"][-1]), float(found.validated["rewards/accuracies"][-1])
        wrong, where = value > LN2 and accuracy > 0.5, "validation"
    else:
        value, accuracy = found.tail("loss")[0], found.tail("rewards/accuracies")[0]
        wrong, where = found.above("loss", LN2) and found.above("rewards/accuracies", 0.5), "training"
    if not wrong:
        return None
    return _problem(
        "over-confidence",
        f"the loss on {where} pairs ends at {value:.3f}, above the ln 2 = 0.693 of a coin toss, while {accuracy:.0%} of"
        " them are ranked right: the others are wrong by large margins",
        "train less (dpo.epochs, dpo.learning_rate), or soften the labels (dpo.label_smoothing); with"
        " dpo.eval_every_steps above 0 the step with the lowest validation loss is kept, not the last",
    )


def _kl_blow_up(found: Curves, beta: float, loss: str) -> Finding | None:
    if "kl" not in found.steps or LOSSES[loss].per_token:
        return None
    kl, _ = found.tail("kl")
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
        "chosen answers that are longer teach length: balance the lengths in the data, raise dpo.beta, or use"
        " dpo.loss_type=sigmoid_norm, which works per token",
    )


def _displacement(found: Curves) -> Finding | None:
    if not (found.below("rewards/chosen", 0.0) and found.above("rewards/margins", 0.0)):
        return None
    chosen, margin = found.tail("rewards/chosen")[0], found.tail("rewards/margins")[0]
    return _warning(
        "chosen reward falls while the margin grows",
        f"over the last third of training the chosen reward is {chosen:.3f} and the margin {margin:.3f}: good answers"
        " become less likely too, only less so than bad ones (arXiv 2410.08847)",
        "raise dpo.beta, lower dpo.learning_rate, or train more SFT on the chosen answers; drop pairs"
        " whose two answers are nearly the same; dpo.loss_type=apo_zero holds the chosen answer up",
    )
