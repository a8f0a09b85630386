"""Statistics, gate and report."""

import math
import re

import numpy as np
import pytest

from components.common.config import EvaluateConfig, GateConfig
from components.common.records import Message, Preference
from components.evaluate import statistics
from components.evaluate.gate import Evidence, judge
from components.evaluate.page import markdown, report
from components.evaluate.stage import compare

GATE = GateConfig(alpha=0.05, margin=0.0, min_pairs=10, max_language_regression=0.0)
CONFIG = EvaluateConfig(bootstrap=2000, confidence=0.95, seed=1, answers=0, max_new_tokens=1)


def rows(n: int) -> list[Preference]:
    made = []
    for i in range(n):
        made.append(
            Preference(
                id=f"{i:016x}",
                group=f"{i // 2:016x}",
                prompt=[Message(role="user", content="question")],
                lang="en" if i % 3 else "zh",
                source="s",
                license="l",
                chosen="c",
                rejected="r",
            )
        )
    return made


def scores(n: int, edge: float, seed: int) -> np.ndarray:
    """Log-probs whose margin has mean `edge` over the base's zeros."""
    rng = np.random.default_rng(seed)
    return np.stack([-50 + rng.normal(edge, 1.0, n), -50 + rng.normal(0, 1.0, n)], axis=1)


def evidence(policy_edge: float, sft_edge: float, factor: float = 1.0, same: bool = False) -> dict[str, object]:
    n = 120
    data = {"validation": rows(n), "test": rows(n)}
    made = {
        name: {side: -50 + factor * (scores(n, edge, seed + (side == "test")) + 50) for side in data}
        for name, edge, seed in (("sft", sft_edge, 10), ("policy", policy_edge, 20))
    }
    if same:
        made["policy"] = made["sft"]
    base = {side: np.full((n, 2), -50.0) for side in data}
    return compare(CONFIG, GATE.margin, data, {"base": base, **made}, beta=0.1)


def verdict(found: dict[str, object], gate: GateConfig = GATE) -> dict[str, object]:
    comparison = found["comparisons"]["sft"]  # type: ignore[index]
    return judge(
        Evidence(
            "the SFT model",
            comparison["improvement"],
            comparison["p_value"],
            comparison["by_language"],
            found["own"]["loss"]["value"],  # type: ignore[index]
        ),
        gate,
    )


def test_log_loss_and_accuracy_by_hand() -> None:
    margins = np.array([0.0, 2.0, -2.0])
    assert statistics.log_loss(margins, 0.5) == pytest.approx(
        [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.e)]
    )
    assert statistics.accuracy(margins).tolist() == [0.5, 1.0, 0.0]


def test_the_fitted_scale_solves_the_logistic_equation() -> None:
    # Margins 1, 1, 1, -1: the best scale has sigmoid(s) = 3/4, s = ln 3.
    margins = np.array([1.0, 1.0, 1.0, -1.0])
    assert statistics.fit_scale(margins) == pytest.approx(math.log(3), rel=1e-3)
    assert statistics.fit_scale(10 * margins) == pytest.approx(math.log(3) / 10, rel=1e-3)


def test_a_model_without_information_is_a_coin_toss() -> None:
    margins = np.array([1.0, -1.0] * 20)
    assert statistics.log_loss(margins, statistics.fit_scale(margins)).mean() == pytest.approx(math.log(2), abs=1e-4)
    assert statistics.fit_scale(np.zeros(4)) == 1.0


def test_intervals_resample_whole_groups() -> None:
    values = np.repeat([0.0, 1.0], 50)
    apart = statistics.GroupBootstrap([str(i) for i in range(100)], 4000, 0.95, 0).estimate(values)
    two = statistics.GroupBootstrap(["a"] * 50 + ["b"] * 50, 4000, 0.95, 0).estimate(values)
    assert apart.value == two.value == 0.5
    assert (apart.low, apart.high) == pytest.approx((0.4, 0.6), abs=0.02)
    assert (two.low, two.high) == (0.0, 1.0)


def test_roc_of_a_perfect_and_of_a_useless_margin() -> None:
    perfect = statistics.roc(np.array([1.0, 2.0, 3.0]))
    assert statistics.area_under(perfect) == 1.0
    useless = statistics.roc(np.zeros(5))
    assert statistics.area_under(useless) == 0.5
    assert all(math.isfinite(value) for value in perfect["threshold"])


def test_a_better_model_passes_and_the_words_say_so() -> None:
    found = verdict(evidence(2.0, 0.0))
    assert found["passed"] and found["verdict"] == "better"
    assert "is better than the SFT model" in str(found["sentence"])


def test_the_same_model_gives_no_evidence() -> None:
    found = evidence(0.5, 0.5, same=True)
    assert found["comparisons"]["sft"]["improvement"]["value"] == 0.0  # type: ignore[index]
    assert found["comparisons"]["sft"]["p_value"] == 1.0  # type: ignore[index]
    assert verdict(found)["verdict"] == "no evidence" and not verdict(found)["passed"]


def test_a_worse_model_is_called_worse() -> None:
    found = verdict(evidence(-0.5, 2.0))
    assert found["verdict"] == "worse" and not found["passed"]


def test_too_few_pairs_refuse_a_better_model() -> None:
    found = verdict(evidence(2.0, 0.0), GATE.model_copy(update={"min_pairs": 500}))
    assert found["verdict"] == "refused" and not found["passed"]
    assert "min_pairs: 120 held-out pairs, expected at least 500" in str(found["sentence"])


def test_scaling_all_rewards_changes_no_verdict() -> None:
    one, ten = evidence(1.0, 0.3), evidence(1.0, 0.3, factor=10.0)
    assert verdict(one)["verdict"] == verdict(ten)["verdict"]
    small, large = (found["comparisons"]["sft"]["improvement"]["value"] for found in (one, ten))  # type: ignore[index]
    assert small == pytest.approx(large, abs=1e-4)


def test_a_language_that_gets_worse_beyond_doubt_refuses() -> None:
    found = evidence(2.0, 0.0)
    found["comparisons"]["sft"]["by_language"]["zh"] = {"value": -0.2, "low": -0.3, "high": -0.1, "n": 40}  # type: ignore[index]
    judged = verdict(found)
    assert judged["verdict"] == "refused" and "no_regression_zh" in str(judged["sentence"])


def test_the_report_is_self_contained_escaped_and_follows_its_input() -> None:
    found = evidence(1.5, 0.2) | {
        "answers": [{"lang": "zh", "prompt": "<script>alert(1)</script>你好", "base": "b", "sft": "s", "policy": "p"}],
        "facts": {"lineage": "abc123"},
        "loss": "sigmoid",
    }
    metrics = {"reward_margin": 0.1, "reward_accuracy": 0.5, "chosen_reward": 0.0, "rejected_reward": -0.1}
    steps = [{"step": i, "loss": 0.7 - i / 10, "metrics": metrics} for i in range(3)]
    counts = {"preferences": {"rows": 9, "quarantined": 3, "too_long": 2, "splits": {"train": {"en": 4, "zh": 2}}}}
    judged = verdict(found)
    page = report(found, judged, {"sft": steps, "dpo": steps}, counts)
    assert "<script" not in page and "&lt;script&gt;" in page and "你好" in page
    outside = [url for url in re.findall(r"https?://[^\s\"'<)]+", page) if "w3.org" not in url]
    links = re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", page)
    assert not [
        url for url in outside if "matplotlib.org" not in url and "purl.org" not in url and "creativecommons" not in url
    ]
    assert not links, "nothing is loaded or linked from elsewhere"
    assert "abc123" in page and page.count("<svg") == 6
    policy = found["models"]["policy"]["overall"]["reward_accuracy"]  # type: ignore[index]
    assert f"{policy['value']:.3f} [{policy['low']:.3f}, {policy['high']:.3f}]" in page
    assert str(judged["sentence"]) in markdown(found, judged)
    assert len(page.encode()) < 1_000_000
