"""Statistics, comparison, measures of answers, and the report."""

import html
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.config.gate import GateConfig
from components.config.params import load_config
from components.dataset.language import is_refusal
from components.dataset.records import Message, Preference
from components.engine.history import StepRecord
from components.evaluate import answers, comparison
from components.evaluate.comparison import Scored, compare
from components.evaluate.config import EvaluateConfig
from components.evaluate.report_page import markdown, report
from components.gate import statistics
from components.gate.rules import GateContext, apply_gate
from components.gate.statistics import GroupBootstrap
from components.report.markdown import markdown as escaped
from components.training.scoring import TokenLogps
from tests.conftest import ROOT

GATE = load_config(ROOT / "params.yaml").gate.model_copy(update={"min_pairs": 10})
CONFIG = EvaluateConfig(bootstrap_resamples=2000, confidence=0.95, seed=1, generations_per_language=0, max_new_tokens=1)


def rows(n: int) -> list[Preference]:
    made = []
    for i in range(n):
        made.append(
            Preference(
                id=f"{i:016x}",
                group=f"{i // 2:016x}",
                prompt=[Message(role="user", content="question")],
                lang="en" if i % 3 else "zh",
                source="one" if i % 2 else "two",
                license="l",
                chosen="c" * 8,
                rejected="r",
            )
        )
    return made


def token_logps(sums_P2: Any, lengths: tuple[int, int] = (4, 5)) -> TokenLogps:
    """Log-probs whose sums are given, spread evenly over the tokens."""
    lengths_P2 = np.tile(np.array(lengths), (len(sums_P2), 1))
    values = np.repeat((np.asarray(sums_P2) / lengths_P2).ravel(), lengths_P2.ravel())
    return TokenLogps(values.astype(np.float32), lengths_P2)


def scores(n: int, edge: float, seed: int, factor: float = 1.0) -> TokenLogps:
    """Log-probs whose margin has mean `edge` over the base's -50; `factor` scales all rewards."""
    rng = np.random.default_rng(seed)
    rewards = np.stack([rng.normal(edge, 1.0, n), rng.normal(0, 1.0, n)], axis=1)
    return token_logps(-50 + factor * rewards)


def results(
    policy_edge: float,
    sft_edge: float,
    factor: float = 1.0,
    n: int = 120,
    same: bool = False,
    validation: int = 120,
    beta: float = 0.1,
) -> dict[str, Any]:
    """Results of made scores; `factor` scales the policy's rewards, `same` makes the two models one."""
    data = {"validation": rows(validation), "test": rows(n)}
    sizes = {side: len(found) for side, found in data.items()}
    made = {
        name: {side: scores(size, edge, seed + (side == "test"), by) for side, size in sizes.items()}
        for name, edge, seed, by in (("sft", sft_edge, 10, 1.0), ("policy", policy_edge, 20, factor))
    }
    if same:
        made["policy"] = made["sft"]
    base = {side: token_logps(np.full((size, 2), -50.0)) for side, size in sizes.items()}
    scored = {
        "base": Scored(base),
        "sft": Scored(made["sft"], base["test"]),
        "policy": Scored(made["policy"], made["sft"]["test"], beta, "sigmoid"),
    }
    found = compare(CONFIG, GATE.threshold(), GATE.max_language_regression, data, scored)
    return found | {"answers": [], "findings": [], "policy_digest": "p", "facts": {}}


def verdict(found: dict[str, Any], gate: GateConfig = GATE) -> dict[str, Any]:
    return apply_gate(found, GateContext("", 1, True), gate)  # type: ignore[arg-type]


def test_log_loss_brier_and_accuracy_by_hand() -> None:
    margins = np.array([0.0, 2.0, -2.0])
    assert statistics.log_loss(margins, 0.5) == pytest.approx(
        [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.e)]
    )
    assert statistics.brier(margins, math.log(3) / 2) == pytest.approx([1 / 4, 1 / 16, 9 / 16])
    assert statistics.accuracy(margins).tolist() == [0.5, 1.0, 0.0]


def test_the_fitted_scale_solves_the_smoothed_logistic_equation() -> None:
    # Margins 1, 1, 1, -1 with the target 5/6: 4 sigmoid(s) = 1 + 2 * 5/6, so sigmoid(s) = 2/3 and s = ln 2.
    margins = np.array([1.0, 1.0, 1.0, -1.0])
    assert statistics.fit_scale(margins) == pytest.approx(math.log(2), rel=1e-5)
    assert statistics.fit_scale(10 * margins) == pytest.approx(math.log(2) / 10, rel=1e-5)
    # All on the right side: sigmoid(s) = 9/10.
    assert statistics.fit_scale(np.ones(8)) == pytest.approx(math.log(9), rel=1e-5)


def test_scales_of_resamples_are_those_of_the_repeated_pairs() -> None:
    margins, weights = np.array([1.0, -0.5, 2.0]), np.array([[1.0, 0.0, 2.0], [1.0, 3.0, 0.0]])
    unit = np.sqrt(np.mean(margins**2))
    for scale, weight in zip(statistics.fit_scales(margins, weights), weights, strict=True):
        repeated = np.repeat(margins, weight.astype(int))
        slope = np.mean(repeated * (1 / (1 + np.exp(-scale * repeated)) - (weight.sum() + 1) / (weight.sum() + 2)))
        assert slope == pytest.approx(0.0, abs=1e-6) or scale == pytest.approx(1e-4 / unit, rel=1e-3)


def test_a_model_without_information_is_a_coin_toss() -> None:
    margins = np.array([1.0, -1.0] * 20)
    assert statistics.log_loss(margins, statistics.fit_scale(-margins)).mean() == pytest.approx(math.log(2), abs=1e-2)
    assert statistics.fit_scale(np.zeros(4)) == 1.0


def test_intervals_resample_whole_groups() -> None:
    values = np.repeat([0.0, 1.0], 50)
    apart = GroupBootstrap([str(i) for i in range(100)], 4000, 0.95, 0).estimate(values)
    two = GroupBootstrap(["a"] * 50 + ["b"] * 50, 4000, 0.95, 0).estimate(values)
    assert apart["value"] == two["value"] == 0.5
    assert (apart["low"], apart["high"]) == pytest.approx((0.4, 0.6), abs=0.02)
    assert (two["low"], two["high"]) == (0.0, 1.0)


def test_the_interval_of_a_ratio_of_sums_is_that_of_its_resamples() -> None:
    above, below = np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 2.0])
    bootstrap = GroupBootstrap(["a", "b", "c"], 3000, 0.9, 3)
    found = bootstrap.ratio(above, below)
    by_hand = np.concatenate([(w @ above) / (w @ below) for w in bootstrap.weights()])
    assert found["value"] == 9 / 4
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(by_hand, [0.05, 0.95])))
    assert len(by_hand) == 3000 and all(w.sum(axis=1).tolist() == [3.0] * len(w) for w in bootstrap.weights())


def test_the_area_under_the_roc_agrees_with_the_curve_and_with_counting() -> None:
    bootstrap = GroupBootstrap([str(i) for i in range(30)], 1000, 0.95, 0)
    margins = np.random.default_rng(4).normal(0.4, 1.0, 30).round(1)  # with ties
    above = margins[:, None] + margins
    counted = np.mean((above > 0) + 0.5 * (above == 0))
    curve = statistics.roc(margins)
    area = bootstrap.auc(margins)
    assert area["value"] == pytest.approx(counted) == pytest.approx(np.trapezoid(curve["tpr"], curve["fpr"]))
    assert area["low"] < area["value"] < area["high"]
    assert bootstrap.auc(np.arange(1.0, 31.0))["low"] == 1.0 and bootstrap.auc(np.zeros(30))["high"] == 0.5
    assert all(math.isfinite(value) for value in curve["threshold"])
    assert len(statistics.roc(np.random.default_rng(0).normal(size=5000))["fpr"]) == statistics.CURVE_POINTS


def test_mcnemars_exact_test_by_hand() -> None:
    policy = np.array([1.0] * 8 + [-1.0] * 2 + [1.0] * 5 + [0.0])
    rival = np.array([-1.0] * 8 + [1.0] * 2 + [1.0] * 5 + [-1.0])
    found = statistics.mcnemar(policy, rival)
    assert (found["policy_only"], found["rival_only"]) == (8, 2)
    assert found["p_value"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert statistics.mcnemar(policy, policy)["p_value"] == 1.0


def test_reliability_shows_what_was_predicted_and_what_came() -> None:
    # Probabilities 3/4 and 9/10; of the first two thirds are right, of the others all.
    margins = np.array([math.log(3)] * 20 + [-math.log(3)] * 10 + [math.log(9)] * 30)
    bootstrap = GroupBootstrap([str(i) for i in range(60)], 1000, 0.95, 0)
    low, high = statistics.reliability(bootstrap, margins, 1.0, bins=2)
    assert (low["predicted"], low["observed"], low["n"]) == pytest.approx((3 / 4, 2 / 3, 30))
    assert (high["predicted"], high["observed"], high["low"]) == pytest.approx((9 / 10, 1.0, 1.0))
    assert low["low"] < 2 / 3 < low["high"]


def test_the_sampled_kl_has_the_expectation_of_the_kl() -> None:
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    one_token = np.ones((3, 1), dtype=np.int64)
    every_answer = [TokenLogps(np.log(p).astype(np.float32), one_token) for p in (policy, reference)]
    expected = float(policy @ comparison.sampled_kl(*every_answer))
    assert expected == pytest.approx(float(policy @ np.log(policy / reference)), rel=1e-5)


def test_divergence_sums_half_the_squared_log_ratio_of_the_tokens() -> None:
    lengths = np.array([[2, 1]])
    model = TokenLogps(np.array([-1.0, -2.0, -3.0], dtype=np.float32), lengths)
    reference = TokenLogps(np.array([-2.0, -2.0, -1.0], dtype=np.float32), lengths)
    assert comparison.divergence(model, reference).tolist() == [[0.5, 2.0]]
    assert model.sums().tolist() == [[-3.0, -3.0]]


def test_raw_rankings_bits_per_byte_and_log_prob_change_by_hand() -> None:
    data = {"validation": rows(4), "test": rows(4)}
    # By its sum the rejected answer (2 tokens, -8) is the likelier one, per token the chosen one (10 tokens, -10).
    model = {side: token_logps([[-10.0, -8.0]] * 4, (10, 2)) for side in data}
    base = {side: token_logps([[-13.0, -8.0]] * 4, (10, 2)) for side in data}
    scored = {"base": Scored(base), "sft": Scored(model, base["test"])}
    scored["policy"] = Scored(model, model["test"], 0.5, "sigmoid")
    found = compare(CONFIG, 0.0, 0.0, data, scored)["models"]
    sft = found["sft"]["overall"]
    assert (sft["raw_accuracy"]["value"], sft["raw_accuracy_per_token"]["value"]) == (0.0, 1.0)
    assert sft["bits_per_byte"]["value"] == pytest.approx(10 / math.log(2) / 8, rel=1e-5)
    assert sft["chosen_logp_change"]["value"] == pytest.approx(3.0, abs=1e-5)
    assert sft["divergence"]["value"] == pytest.approx(10 * 0.5 * 0.3**2 / 2, rel=1e-4)
    assert found["base"]["policy_metrics"] is None and found["sft"]["policy_metrics"] is None
    assert found["policy"]["policy_metrics"]["loss"]["value"] == pytest.approx(math.log(2))
    assert "chosen_logp_change" not in found["base"]["overall"]


def test_own_rewards_are_those_of_the_training_loss() -> None:
    sides = {"test": token_logps([[-10.0, -8.0]], (10, 2))}
    reference = token_logps([[-12.0, -8.0]], (10, 2))
    own = {loss: comparison.policy_rewards(Scored(sides, reference, 0.5, loss)) for loss in ("sigmoid", "ipo", "simpo")}
    assert own["sigmoid"] == pytest.approx(np.array([[1.0, 0.0]]), abs=1e-5)
    assert own["ipo"] == pytest.approx(np.array([[0.1, 0.0]]), abs=1e-5)
    assert own["simpo"] == pytest.approx(np.array([[-0.5, -2.0]]), abs=1e-5)
    assert comparison.policy_rewards(Scored(sides, None, 0.5, "sigmoid")) is None


def test_slices_of_each_kind_hold_every_pair_once() -> None:
    n = 100
    lengths = np.random.default_rng(0).integers(5, 300, n)
    masks = comparison.slices(rows(n), lengths)
    for kind in comparison.SLICES:
        of_kind = [mask for name, mask in masks.items() if name.startswith(f"{kind}/")]
        assert len(of_kind) >= 2 and np.sum(of_kind, axis=0).tolist() == [1] * n
    found = results(1.0, 0.5)
    for kind, key in comparison.SLICES.items():
        parts = found["models"]["policy"][kind]
        assert sum(part["rewards/accuracies"]["n"] for part in parts.values()) == 120
        assert found["comparisons"]["sft"][key].keys() == parts.keys()
        for part in parts.values():
            assert all(one["low"] <= one["high"] for one in part.values())


def test_the_noise_of_the_fitted_scale_is_in_the_intervals() -> None:
    rng = np.random.default_rng(5)
    validation, test = rng.normal(0.5, 1.0, 20), rng.normal(0.5, 1.0, 200)
    bootstrap, calibration = (GroupBootstrap([str(i) for i in range(n)], 2000, 0.95, n) for n in (200, 20))
    scales = calibration.scales(validation)
    fixed = np.full_like(scales, statistics.fit_scale(validation))
    everything = np.ones((200, 1))
    noisy_loss, quiet_loss = (bootstrap.scaled_sums(test, found, everything)[0].std() for found in (scales, fixed))
    assert np.median(scales) == pytest.approx(fixed[0], rel=0.3) and noisy_loss > 1.2 * quiet_loss
    # And compare takes it: by the same pairs, the validation side moves the interval of the log-loss and no other.
    few, many = (results(1.5, 0.2, validation=size)["models"]["policy"]["overall"] for size in (8, 400))
    assert few["preference_log_loss"] != many["preference_log_loss"]
    assert few["rewards/accuracies"] == many["rewards/accuracies"]


def test_a_better_a_worse_and_an_equal_model_are_told_apart_in_words() -> None:
    better, worse, equal = results(2.0, 0.0), results(-0.5, 2.0), results(0.5, 0.5, same=True)
    assert verdict(better)["verdict"] == "better" and verdict(worse)["verdict"] == "worse"
    assert "supports that the policy is better than the SFT model" in better["comparisons"]["sft"]["words"]
    assert "supports that the policy is worse than the SFT model" in worse["comparisons"]["sft"]["words"]
    same = equal["comparisons"]["sft"]
    assert same["improvement"]["value"] == 0.0 and same["p_value"] == 1.0 and "every pair alike" in same["words"]
    assert verdict(equal)["verdict"] == "no evidence"
    unclear = results(0.7, 0.5, n=40)["comparisons"]["sft"]
    assert unclear["improvement"]["low"] < 0 < unclear["improvement"]["high"]
    assert "supports neither" in unclear["words"] and "McNemar" in unclear["words"]
    assert better["comparisons"]["sft"]["mcnemar"]["policy_only"] > 20


def test_how_many_pairs_would_show_a_difference() -> None:
    def told(gain: float) -> str:
        improvement = {"value": gain, "low": -1.0, "high": 1.0, "n": 100}
        mcnemar = {"policy_only": 3, "rival_only": 2, "p_value": 1.0}
        return comparison.words(improvement, mcnemar, 0.1, 100, "sft")

    assert "about 155 pairs would" in told(0.2)
    assert "more than a million pairs would" in told(1e-4)
    assert "more than a million pairs would" in told(5e-324)


@pytest.mark.parametrize(("policy_edge", "sft_edge"), [(2.0, 0.0), (0.5, 0.4), (-0.5, 2.0)])
def test_scaling_all_rewards_changes_no_verdict(policy_edge: float, sft_edge: float) -> None:
    # Of one model, since of both it would prove little; with a beta that keeps its own loss below ln 2 either way.
    one, ten = (results(policy_edge, sft_edge, factor, beta=0.01) for factor in (1.0, 10.0))
    assert verdict(one)["verdict"] == verdict(ten)["verdict"] and verdict(one)["passed"] == verdict(ten)["passed"]
    first, second = (found["comparisons"]["sft"] for found in (one, ten))
    assert first["improvement"] == pytest.approx(second["improvement"], abs=1e-5)
    assert first["p_value"] == pytest.approx(second["p_value"], abs=2e-3)
    assert one["models"]["policy"]["scale"] == pytest.approx(10 * ten["models"]["policy"]["scale"], rel=1e-4)
    # The statistic without a scale is not so: the test above can fail.
    raw = [found["models"]["policy"]["policy_metrics"]["loss"]["value"] for found in (one, ten)]
    assert abs(raw[0] - raw[1]) > 1e-3


def test_a_language_that_regresses_has_a_small_p_value_there() -> None:
    data = {"validation": rows(120), "test": rows(120)}
    good, bad = scores(120, 2.0, 1), scores(120, 0.0, 2)
    zh = np.array([row.lang == "zh" for row in data["test"]])
    mixed = token_logps(np.where(zh[:, None], bad.sums(), good.sums()))
    base = {side: token_logps(np.full((120, 2), -50.0)) for side in data}
    policy, sft = {"validation": good, "test": mixed}, {"validation": good, "test": good}
    scored = {"base": Scored(base), "sft": Scored(sft), "policy": Scored(policy, good, 0.1, "sigmoid")}
    found = compare(CONFIG, 0.0, 0.0, data, scored)["comparisons"]["sft"]
    assert found["regression_p"]["zh"] < 0.01 and found["regression_p"]["en"] == 1.0


def test_repetition_language_and_refusal_by_hand() -> None:
    assert answers.repetition([1, 2, 3, 4]) == 0.0 and answers.repetition([1, 2]) == 0.0
    # Runs of four: 1212, 2121, 1212, 2121, 1212.
    assert answers.repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(1 - 2 / 5)
    assert answers.speaks("今天天气很好, thank you", "zh") and not answers.speaks("The weather is fine 好", "zh")
    assert answers.speaks("The weather", "en") and not answers.speaks("天气很好啊", "en")
    assert answers.speaks("42", "en") and answers.speaks("42", "zh")
    for text in (
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I",
        "很抱歉，我无法回答",
        "I’m unable",
    ):
        assert is_refusal(text), text
    for text in ("Sure! Here is a list", "当然可以，这是答案", "The sky is blue. " * 20 + "I'm sorry"):
        assert not is_refusal(text), text


def test_measures_of_answers_by_hand() -> None:
    said = [
        answers.Answer([5, 6, 2], "hello", True),
        answers.Answer([2], "", True),
        answers.Answer([1, 2, 1, 2, 1, 2, 1, 2], "抱歉抱歉", False),
    ]
    bootstrap = GroupBootstrap(["a", "b", "c"], 1000, 0.95, 0)
    found = {name: one["value"] for name, one in answers.measure(bootstrap, said, ["en", "en", "en"]).items()}
    assert found == pytest.approx(
        {
            "tokens": 4.0,
            "repetition": 0.2,
            "language_match": 0.5,
            "refusal": 1 / 3,
            "empty": 1 / 3,
            "unfinished": 1 / 3,
        }
    )
    twice = answers.Answers([answers.Answer(a.tokens * 2, a.text, a.finished) for a in said], said)
    ratio = answers.generation(bootstrap, twice, ["en"] * 3, answers.Answers(said, said), None)["length_ratio"]
    assert ratio == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0, "n": 3})
    silent = answers.measure(bootstrap, [answers.Answer([2], "", True)] * 3, ["en"] * 3)
    assert "language_match" not in silent and silent["empty"]["value"] == 1.0


def test_the_fixed_prompts_do_not_depend_on_the_order_of_the_rows() -> None:
    made = rows(40)
    asked = answers.fixed_prompts(made, 3)
    assert asked == answers.fixed_prompts(made[::-1], 3)
    assert [row.lang for row in asked] == ["en"] * 3 + ["zh"] * 3
    assert len({row.group for row in asked[:3]}) == 3


def written(value: float) -> dict[str, Any]:
    one = {"value": value, "low": value, "high": value, "n": 2}
    kinds = dict.fromkeys(("tokens", "repetition", "language_match", "refusal", "empty", "unfinished"), one)
    return {"prompts": 2, "greedy": kinds, "sampled": kinds, "length_ratio": one, "kl": one}


def page_of(found: dict[str, Any], steps: int = 3) -> tuple[str, dict[str, Any]]:
    metrics = {
        "rewards/margins": 0.1,
        "rewards/accuracies": 0.5,
        "rewards/chosen": 0.0,
        "rewards/rejected": -0.1,
        "kl": 0.2,
    }
    losses = [0.7 - i / 10 / steps for i in range(steps)]
    records = [StepRecord(i, steps, loss, 1e-3, 1.0, 9, 0.1, 1.0, metrics) for i, loss in enumerate(losses)]
    records[-1] = replace(records[-1], validation={"loss": 0.6} | metrics)
    summary = {"rows": 9, "quarantined": 3, "too_long": 2, "splits": {"train": {"en": 4, "zh": 2}}}
    summary |= {"sources": {"made": {"license": "CC BY-NC 4.0", "rows": 6}}}
    judged = verdict(found)
    validation = {"preferences": summary, "instructions": summary}
    return report(found, judged, {"sft": records, "dpo": records}, validation), judged


def test_the_report_is_self_contained_escaped_and_follows_its_input() -> None:
    found = results(1.5, 0.2)
    text = {"base": "b", "sft": "s", "policy": "<b>p</b>"}
    found["answers"] = [
        {"lang": "zh", "prompt": "<script>alert(1)</script>你好", "chosen": "c", "greedy": text, "sampled": text}
    ]
    for model in found["models"].values():
        model["generation"] = written(0.25)
    found["facts"] = {"lineage": "abc123"}
    found["findings"] = [{"name": "KL blow-up", "severity": "problem", "evidence": "far <off>", "advice": "raise beta"}]
    page, judged = page_of(found)
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "你好" in page and "<b>p</b>" not in page
    known = ("w3.org", "matplotlib.org", "purl.org", "creativecommons")
    assert not [url for url in re.findall(r"https?://[^\s\"'<)]+", page) if not any(name in url for name in known)]
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", page), "nothing is loaded or linked from elsewhere"
    assert "abc123" in page and "CC BY-NC 4.0" in page and page.count("<svg") == 9 and "far &lt;off&gt;" in page
    policy = found["models"]["policy"]["overall"]["rewards/accuracies"]
    assert f"{policy['value']:.3f} [{policy['low']:.3f},\u00a0{policy['high']:.3f}]" in page
    assert found["comparisons"]["sft"]["words"] in html.unescape(page)
    titles = re.findall(r"<h2>([^<]*)</h2>", page)
    assert titles == [
        "Is it better",
        "How sure are we",
        "Where is it worse",
        "What does it say",
        "What was it trained on",
        "How do I reproduce it",
    ]
    assert escaped(judged["sentence"]) in markdown(found, judged) and "KL blow-up" in markdown(found, judged)


def test_the_report_of_a_long_training_and_many_pairs_stays_small() -> None:
    page, _ = page_of(results(1.0, 0.5, n=400), steps=5000)
    assert len(page.encode()) < 1_000_000
