"""The known pathologies of DPO are recognised, each from curves that show it, and a healthy training shows none."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.engine.history import StepRecord
from components.evaluate.diagnosis import diagnose

LN2 = math.log(2)
STEPS = 60


def history(validation: dict[str, float] | None = None, **curves: Any) -> list[StepRecord]:
    """Records of a healthy training, but for the metrics that are given, as functions of the share that is done."""
    rng = np.random.default_rng(0)
    healthy = {
        "loss": lambda done: LN2 - 0.2 * done,
        "rewards/accuracies": lambda done: 0.5 + 0.25 * min(1.0, 2 * done),
        "rewards/margins": lambda done: 1.2 * done,
        "rewards/chosen": lambda done: 0.5 * done,
        "rewards/rejected": lambda done: -0.7 * done,
        "kl": lambda done: 20 * done,
    }
    records = []
    for step in range(1, STEPS + 1):
        done = (step - 1) / (STEPS - 1)
        found = {name: float(curve(done)) for name, curve in (healthy | curves).items()}
        noisy = {name: value + 0.02 * rng.normal() * (step > 1) for name, value in found.items()}
        loss = noisy.pop("loss")
        accuracy = min(1.0, max(0.0, noisy["rewards/accuracies"]))
        metrics = noisy | {
            "kl": abs(noisy["kl"]),
            "rewards/accuracies": accuracy if found["rewards/accuracies"] < 1 else 1.0,
        }
        records.append(StepRecord(step, STEPS, loss, 1e-3, 1.0, 9, 0.1, 1.0, metrics))
    if validation:
        records[-1] = replace(records[-1], validation=records[-1].metrics | validation)
    return records


def evaluation(length_ratio: tuple[float, float, float] | None = None, loss: str = "sigmoid") -> dict[str, Any]:
    written = None
    if length_ratio:
        value, low, high = length_ratio
        ratio = {"value": value, "low": low, "high": high, "n": 16}
        written = {"length_ratio": ratio, "greedy": {"unfinished": {"value": 0.5}}}
    return {"beta": 0.1, "loss_type": loss, "models": {"policy": {"generation": written}}}


def names(records: list[StepRecord], found: dict[str, Any] | None = None) -> list[str]:
    return [finding["name"] for finding in diagnose(records, found or evaluation())]


def test_a_healthy_training_shows_nothing() -> None:
    fine = evaluation((1.1, 0.9, 1.3))
    assert names(history({"loss": 0.6, "rewards/accuracies": 0.7}), fine) == []


@pytest.mark.parametrize(
    ("name", "curves"),
    [
        ("chosen reward falls while the margin grows", {"rewards/chosen": lambda done: -done}),
        ("over-confidence", {"loss": lambda done: LN2 + 0.5 * done}),
        ("KL blow-up", {"kl": lambda done: 5000 * done}),
        ("accuracy of 1.0 too early", {"rewards/accuracies": lambda done: 0.5 if done < 0.05 else 1.0}),
        (
            "no learning",
            {"loss": lambda done: LN2, "rewards/accuracies": lambda done: 0.5, "rewards/margins": lambda done: 0.0},
        ),
        ("reference mismatch", {"kl": lambda done: 20.0}),
    ],
)
def test_each_pathology_is_recognised_alone(name: str, curves: dict[str, Any]) -> None:
    found = diagnose(history(**curves), evaluation())
    assert [finding["name"] for finding in found] == [name]
    assert found[0]["evidence"] and found[0]["advice"] and found[0]["severity"] in ("problem", "warning")


def test_over_confidence_on_validation_pairs_is_recognised() -> None:
    assert names(history({"loss": 0.9, "rewards/accuracies": 0.7})) == ["over-confidence"]
    # Wrong about most pairs is not over-confidence but no model.
    assert names(history({"loss": 0.9, "rewards/accuracies": 0.4})) == []
    # ln 2 means nothing to a loss per token.
    assert names(history({"loss": 0.9, "rewards/accuracies": 0.7}), evaluation(loss="ipo")) == []


def test_length_explosion_needs_evidence() -> None:
    assert names(history(), evaluation((2.5, 1.8, 3.2))) == ["length explosion"]
    assert names(history(), evaluation((2.5, 0.8, 6.0))) == []


def test_easy_pairs_late_in_training_are_no_leak() -> None:
    late = {"rewards/accuracies": lambda done: 0.6 if done < 0.4 else 1.0}
    assert names(history(**late)) == []
    early = {"rewards/accuracies": lambda done: 0.5 if done < 0.05 else 1.0}
    assert names(history({"loss": 0.5, "rewards/accuracies": 0.8}, **early)) == []


def test_too_low_and_too_high_a_learning_rate_get_different_advice() -> None:
    still = {"rewards/accuracies": lambda done: 0.5, "rewards/margins": lambda done: 0.0}
    low = diagnose(history(loss=lambda done: LN2, **still), evaluation())[0]
    high = diagnose(history(loss=lambda done: LN2 + done, **still), evaluation())[0]
    assert "too low" in low["advice"] and "too high" in high["advice"]
