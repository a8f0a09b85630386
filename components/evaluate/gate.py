"""The gate: rules with names and numbers that decide whether a model may become the champion, and why in words."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from components.common.config import GateConfig

Outcome = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Rule:
    """One rule, with the number it looked at and the one it asked for."""

    name: str
    outcome: Outcome
    found: float
    expected: str
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "found": self.found,
            "expected": self.expected,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Evidence:
    """What the held-out pairs say about policy against incumbent; losses in nats.

    `improvement` is how much lower the policy's preference log-loss is, as an estimate {value, low, high, n};
    `by_language` the same per language; `own_loss` the policy's DPO loss with its own beta and reference, None
    where it was trained by a loss whose beta means something else.
    """

    incumbent: str
    improvement: dict[str, float]
    p_value: float
    by_language: dict[str, dict[str, float]]
    own_loss: float | None


def judge(evidence: Evidence, config: GateConfig) -> dict[str, Any]:
    """Apply the rules.

    Returns:
        `passed`, `verdict` (`better`, `no evidence`, `worse` or `refused`), `sentence` and `rules`.
    """
    rules = [_primary(evidence, config), _enough(evidence, config), _own_loss(evidence)]
    rules += [_language(lang, found, config) for lang, found in sorted(evidence.by_language.items())]
    passed = all(rule.outcome != "fail" for rule in rules)
    return {
        "passed": passed,
        "verdict": _verdict(evidence, rules, passed),
        "sentence": _sentence(evidence, rules, passed),
        "incumbent": evidence.incumbent,
        "rules": [rule.as_dict() for rule in rules],
    }


def _primary(evidence: Evidence, config: GateConfig) -> Rule:
    found = evidence.improvement
    ok = evidence.p_value < config.alpha
    sentence = (
        f"log-loss is {found['value']:+.4f} nats better than {evidence.incumbent}"
        f" [{found['low']:+.4f}, {found['high']:+.4f}], one-sided p = {evidence.p_value:.4f}"
    )
    expected = f"p < {config.alpha:g} for an improvement above {config.margin:g} nats"
    return Rule("superiority", "pass" if ok else "fail", evidence.p_value, expected, sentence)


def _enough(evidence: Evidence, config: GateConfig) -> Rule:
    n = int(evidence.improvement["n"])
    outcome: Outcome = "pass" if n >= config.min_pairs else "fail"
    return Rule("min_pairs", outcome, n, f"at least {config.min_pairs}", f"{n} held-out pairs")


def _own_loss(evidence: Evidence) -> Rule:
    if evidence.own_loss is None:
        return Rule("own_loss", "not applicable", math.log(2), "below ln 2 = 0.6931", "trained by a loss per token")
    ok = evidence.own_loss < math.log(2)
    sentence = f"DPO loss on held-out pairs with its own beta and reference is {evidence.own_loss:.4f}"
    return Rule("own_loss", "pass" if ok else "fail", evidence.own_loss, "below ln 2 = 0.6931", sentence)


def _language(lang: str, found: dict[str, float], config: GateConfig) -> Rule:
    # Worse beyond doubt: even the upper end of the interval of the improvement lies below what is allowed.
    ok = found["high"] >= -config.max_language_regression
    sentence = (
        f"{lang}: {found['value']:+.4f} nats [{found['low']:+.4f}, {found['high']:+.4f}], {int(found['n'])} pairs"
    )
    expected = f"not worse by more than {config.max_language_regression:g} nats beyond doubt"
    return Rule(f"no_regression_{lang}", "pass" if ok else "fail", found["high"], expected, sentence)


def _verdict(evidence: Evidence, rules: list[Rule], passed: bool) -> str:
    if passed:
        return "better"
    if evidence.improvement["high"] < 0:
        return "worse"
    return "no evidence" if rules[0].outcome == "fail" else "refused"


def _sentence(evidence: Evidence, rules: list[Rule], passed: bool) -> str:
    if passed:
        return f"The policy is better than {evidence.incumbent} on held-out pairs: {rules[0].sentence}."
    failed = "; ".join(
        f"{rule.name}: {rule.sentence}, expected {rule.expected}" for rule in rules if rule.outcome == "fail"
    )
    verdict = _verdict(evidence, rules, passed)
    opening = {
        "worse": f"The policy is worse than {evidence.incumbent}",
        "no evidence": f"There is no evidence that the policy is better than {evidence.incumbent}",
        "refused": f"The policy is better than {evidence.incumbent}, but a guard rail refuses it",
    }[verdict]
    return f"{opening}. {failed}."
