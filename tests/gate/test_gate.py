"""The gate: every rule by its numbers, and by simulation how often it is wrong."""

import copy
from typing import Any

import numpy as np
import pytest

from components.common.errors import InputError
from components.config.gate import GateConfig
from components.config.loading import validated
from components.config.params import load_config
from components.gate import statistics
from components.gate.rules import GateContext, alpha_for_decision, apply_gate
from components.gate.statistics import GroupBootstrap, compared_loss, fit_scale, superiority_p
from tests.conftest import ROOT

GATE = load_config(ROOT / "params.yaml").gate
FIRST = GateContext(incumbent="", decision_index=1, data_clean=True)
PAIRS, RESAMPLES = 100, 10_000
SHARED = 10
"""Pairs that share a prompt with another, two by two; about as in the embedded data."""


def estimate(value: float, n: int = PAIRS, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def results(p_value: float = 0.001, gain: float = 0.1, **changed: Any) -> Any:
    """The parts of evaluation.json that the gate reads, of a policy that passes unless something is changed."""
    written = {
        "greedy": {"repetition": estimate(0.1)},
        "length_ratio": estimate(1.1),
        "kl": estimate(5.0),
    }
    languages = {"en": estimate(gain, 60), "zh": estimate(gain, 40)}
    comparison = {
        "improvement": estimate(gain),
        "p_value": p_value,
        "by_language": languages,
        "regression_p": {"en": 0.9, "zh": 0.9},
    }
    models: dict[str, Any] = {name: {"generation": copy.deepcopy(written)} for name in ("sft", "policy", "incumbent")}
    models["policy"]["policy_metrics"] = {"loss": estimate(0.6)}
    found = {
        "bootstrap_resamples": RESAMPLES,
        "beta": 0.1,
        "loss_type": "sigmoid",
        "models": models,
        "comparisons": {"sft": comparison, "incumbent": copy.deepcopy(comparison)},
        "policy_digest": "p",
    }
    return found | changed


def outcome(found: dict[str, Any], rule: str) -> str:
    return {each["name"]: each["outcome"] for each in found["rules"]}[rule]


def test_a_better_model_passes_every_rule_of_the_shipped_gate() -> None:
    found = apply_gate(results(), FIRST, GATE)
    assert found["passed"] and found["verdict"] == "better"
    assert {rule["outcome"] for rule in found["rules"]} == {"pass"}
    names = [rule["name"] for rule in found["rules"]]
    assert names == [
        "superiority",
        "min_pairs",
        "policy_loss",
        "kl",
        "length_ratio",
        "repetition",
        "no_regression_en",
        "no_regression_zh",
        "committed_data",
    ]


@pytest.mark.parametrize(
    ("rule", "path", "value"),
    [
        ("policy_loss", ("models", "policy", "policy_metrics", "loss", "value"), 0.6932),
        ("kl", ("models", "policy", "generation", "kl", "value"), 50.1),
        ("length_ratio", ("models", "policy", "generation", "length_ratio", "value"), 2.1),
        ("length_ratio", ("models", "policy", "generation", "length_ratio", "value"), 0.4),
        ("repetition", ("models", "policy", "generation", "greedy", "repetition", "value"), 0.26),
        ("no_regression_zh", ("comparisons", "sft", "regression_p", "zh"), 0.02),
        ("min_pairs", ("comparisons", "sft", "improvement", "n"), 49),
    ],
)
def test_a_guard_rail_refuses_a_better_model_and_says_why(rule: str, path: tuple[str, ...], value: float) -> None:
    found = results()
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    judged = apply_gate(found, FIRST, GATE)
    assert judged["verdict"] == "refused" and not judged["passed"]
    assert [each["name"] for each in judged["rules"] if each["outcome"] == "fail"] == [rule]
    assert rule in judged["sentence"] and "guard rail" in judged["sentence"]


def test_a_language_that_is_worse_within_noise_does_not_refuse() -> None:
    found = results()
    found["comparisons"]["sft"]["by_language"]["zh"] = estimate(-0.04, 40)
    found["comparisons"]["sft"]["regression_p"]["zh"] = 0.2
    assert apply_gate(found, FIRST, GATE)["passed"]


def test_data_that_no_commit_records_is_refused_unless_the_rule_is_off() -> None:
    edited = GateContext("", 1, data_clean=False)
    assert apply_gate(results(), edited, GATE)["verdict"] == "refused"
    relaxed = GATE.model_copy(update={"require_committed_data": False})
    found = apply_gate(results(), edited, relaxed)
    assert found["passed"] and outcome(found, "committed_data") == "not applicable"


def test_rules_without_their_numbers_are_not_applicable_and_say_so() -> None:
    found = results(loss_type="ipo")
    found["models"]["policy"]["generation"] = None
    judged = apply_gate(found, FIRST, GATE)
    assert judged["passed"]
    for rule in ("policy_loss", "kl", "length_ratio", "repetition"):
        assert outcome(judged, rule) == "not applicable"


def test_the_sft_model_alone_has_to_beat_the_base_by_the_rules_that_concern_it() -> None:
    found = results(beta=None, loss_type="")
    found["models"]["base"] = found["models"].pop("sft")
    found["models"]["policy"]["policy_metrics"] = None
    found["comparisons"]["base"] = found["comparisons"].pop("sft")
    judged = apply_gate(found, FIRST, GATE)
    assert judged["passed"] and "better than the base model" in judged["sentence"]
    for rule in ("policy_loss", "kl", "length_ratio"):
        assert outcome(judged, rule) == "not applicable"
    assert outcome(judged, "repetition") == "pass"
    found["models"]["policy"]["generation"]["greedy"]["repetition"] = estimate(0.9)
    assert outcome(apply_gate(found, FIRST, GATE), "repetition") == "fail"
    against = apply_gate(found, GateContext("models:/m/3", 1, True), GATE)
    assert "the champion models:/m/3" in against["sentence"] and outcome(against, "kl") == "not applicable"


def test_no_evidence_worse_and_better_are_told_apart() -> None:
    assert apply_gate(results(p_value=0.3, gain=0.01), FIRST, GATE)["verdict"] == "no evidence"
    worse = apply_gate(results(p_value=1.0, gain=-0.2), FIRST, GATE)
    assert worse["verdict"] == "worse" and "is worse than the SFT model" in worse["sentence"]
    against = apply_gate(results(), GateContext("models:/m/3", 1, True), GATE)
    assert "better than the champion models:/m/3" in against["sentence"]


def test_every_further_decision_on_a_test_set_has_a_stricter_level_and_all_together_alpha() -> None:
    assert [alpha_for_decision(0.05, use) for use in (1, 2, 3)] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert sum(alpha_for_decision(0.05, use) for use in range(1, 100_000)) == pytest.approx(0.05, abs=1e-6)
    found = results(p_value=0.01)
    assert apply_gate(found, FIRST, GATE)["passed"]
    second = apply_gate(found, GateContext("", 2, True), GATE)
    assert second["verdict"] == "no evidence" and second["alpha_for_decision"] == pytest.approx(0.05 / 6)


def test_a_level_that_the_resamples_cannot_show_is_named() -> None:
    found = results(p_value=1 / (RESAMPLES + 1))
    assert apply_gate(found, GateContext("", 20, True), GATE)["passed"]
    worn_out = apply_gate(found, GateContext("", 25, True), GATE)
    assert not worn_out["passed"] and "use a new test set" in worn_out["sentence"]


def test_non_inferiority_needs_a_margin_and_says_not_worse() -> None:
    raw = GATE.model_dump() | {"test": "non-inferiority"}
    with pytest.raises(InputError, match="non-inferiority needs a margin above 0"):
        validated(GateConfig, raw, "params.yaml")
    gate = validated(GateConfig, raw | {"margin": 0.02}, "params.yaml")
    assert gate.threshold() == -0.02 and GATE.threshold() == 0.0
    found = apply_gate(results(p_value=0.01, gain=-0.005), FIRST, gate)
    assert found["verdict"] == "not worse" and "at most 0.02 nats worse than" in found["sentence"]
    assert found["rules"][0]["name"] == "non-inferiority"


def simulated(gains_PE: Any, uses: list[int], gate: GateConfig, rng: Any) -> list[bool]:
    """Whether the gate promotes each evaluation: gains of the pairs [pairs, evaluations], uses of the test set."""
    groups = [str(number // 2 if number < SHARED else number) for number in range(PAIRS)]
    bootstrap = GroupBootstrap(groups, RESAMPLES, 0.95, int(rng.integers(1 << 30)))
    means_BE = bootstrap.sums(gains_PE) / len(gains_PE)
    studentized_E = bootstrap.studentized_p(gains_PE, gate.threshold())
    promoted = []
    for use, gain, means_B, t in zip(uses, gains_PE.mean(axis=0), means_BE.T, studentized_E, strict=True):
        found = results(p_value=max(superiority_p(means_B, gate.threshold()), float(t)), gain=float(gain))
        promoted.append(apply_gate(found, GateContext("", use, True), gate)["passed"])
    return promoted


def equal_gains(rng: Any, histories: int, decisions: int = 1) -> Any:
    """Gains of policies that are as good as their rival, [pairs, histories x decisions]: skewed, heavy-tailed, mean 0.

    The policies of a history meet the same rival on the same pairs, so what the rival loses is common to them.
    """
    rivals = np.repeat(rng.gamma(2.0, 1.0, (PAIRS, histories)), decisions, axis=1)
    own = rng.gamma(2.0, 1.0, (PAIRS, histories * decisions))
    gains = 0.1 * (rivals + own - 4.0)
    gains[1:SHARED:2] = 0.5 * (gains[1:SHARED:2] + gains[0:SHARED:2])
    return gains


@pytest.mark.parametrize("skew", [1.0, -1.0])
@pytest.mark.parametrize(("test", "margin"), [("superiority", 0.0), ("non-inferiority", 0.05)])
def test_equal_models_are_promoted_in_at_most_5_percent_of_1000_evaluations(
    test: str, margin: float, skew: float
) -> None:
    """In non-inferiority mode at the margin: the policy is worse by just what is not tolerated any more."""
    rng = np.random.default_rng(7)
    gate = GATE.model_copy(update={"test": test, "margin": margin})
    gains = skew * equal_gains(rng, 1000) + gate.threshold()
    share = np.mean(simulated(gains, [1] * 1000, gate, rng))
    assert share <= 0.05
    # The test is not simply deaf: a real improvement of half a standard deviation is seen.
    assert np.mean(simulated(gains[:, :100] + 0.1, [1] * 100, gate, rng)) > 0.5


def evaluated(policy: float, rival: float, times: int, validation: int, test: int) -> float:
    """Share of evaluations that promote, of models whose margins, heavy-tailed, have these means in deviations.

    Everything is drawn anew each time, and scales are fitted, as in `comparison.compare`.
    """
    rng = np.random.default_rng(5)
    bootstrap, calibration = (GroupBootstrap([str(i) for i in range(n)], 1000, 0.95, n) for n in (test, validation))
    everything = np.ones((test, 1))
    promoted = 0
    for _ in range(times):
        means, losses = [], []
        for edge in (rival, policy):
            fitted, margins = (rng.normal(edge, 1.0, n) * np.exp(rng.normal(0.0, 0.6, n)) for n in (validation, test))
            sums = bootstrap.scaled_sums(margins, calibration.scales(fitted), everything)[0]
            means.append(sums[:, 0] / test)
            losses.append(compared_loss(margins, fit_scale(fitted)))
        gain = losses[0] - losses[1]
        p_value = bootstrap.p_value(gain, means[0] - means[1], 0.0)
        found = results(p_value=p_value, gain=float(gain.mean()))
        promoted += apply_gate(found, GateContext("", 1, True), GATE)["passed"]
    return promoted / times


@pytest.mark.parametrize("edge", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("validation", "test"), [(48, 127), (20, 60)])
@pytest.mark.parametrize("times", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_equal_models_of_fitted_scales_are_promoted_in_at_most_5_percent(
    times: int, validation: int, test: int, edge: float
) -> None:
    assert evaluated(edge, edge, times, validation, test) <= 0.05


def test_half_the_fitted_scale_finds_more_better_models(monkeypatch: pytest.MonkeyPatch) -> None:
    half = evaluated(0.47, 0.0, 200, 48, 127)
    monkeypatch.setattr(statistics, "COMPARED", 1.0)
    whole = evaluated(0.47, 0.0, 200, 48, 127)
    assert half > 0.6 and half > 1.5 * whole


@pytest.mark.parametrize(
    ("skew", "histories"), [(-1.0, 300), *(pytest.param(skew, 2000, marks=pytest.mark.long) for skew in (1.0, -1.0))]
)
def test_over_20_decisions_on_one_test_set_at_most_5_percent_of_histories_promote_wrongly(
    skew: float, histories: int
) -> None:
    rng = np.random.default_rng(11)
    decisions = 20
    uses = list(range(1, decisions + 1)) * histories
    wrong = 0
    for _ in range(histories // 100):
        gains = skew * equal_gains(rng, 100, decisions)
        promoted = simulated(gains, uses[: 100 * decisions], GATE, rng)
        wrong += int(np.reshape(promoted, (100, decisions)).any(axis=1).sum())
    assert wrong / histories <= 0.05


def test_without_the_correction_20_decisions_promote_wrongly_far_more_often() -> None:
    """What the spending protects from: the same histories, each decision tested as if it were the first."""
    rng = np.random.default_rng(11)
    promoted = simulated(equal_gains(rng, 100, 20), [1] * 2000, GATE, rng)
    assert np.reshape(promoted, (100, 20)).any(axis=1).mean() > 0.15
