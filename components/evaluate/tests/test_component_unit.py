"""The function of the evaluate component."""

from pathlib import Path

import pytest

from components.common.files import read_json, verify_manifest
from components.evaluate.component import evaluate
from components.report.markdown import markdown
from tests.support.component_kit import Chain, assert_refused, call, order


def test_it_writes_numbers_verdict_and_report_on_that_very_policy(chain: Chain, tmp_path: Path) -> None:
    models = {"base": chain.base, "sft_model": chain.sft_model, "policy": chain.policy}
    _, made = call(evaluate, tmp_path, dataset=chain.clean, **models)
    found = read_json(tmp_path / "evaluation" / "evaluation.json")
    verdict = read_json(tmp_path / "evaluation" / "verdict.json")
    assert verdict["policy_digest"] == verify_manifest(chain.policy)
    assert markdown(verdict["sentence"]) in (tmp_path / "summary").read_text()
    metrics = made["metrics"].metadata
    assert metrics["gate_passed"] == verdict["passed"]
    assert metrics["rewards/accuracies"] == found["models"]["policy"]["overall"]["rewards/accuracies"]["value"]
    assert len(made["roc"].metadata["confidenceMetrics"]) == len(found["roc"]["fpr"])
    assert (tmp_path / "report").read_text().startswith("<!")


def test_a_level_that_is_no_level_is_refused(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"base": chain.base, "sft_model": chain.sft_model, "policy": chain.policy}
    wrong = {"order": order("evaluate", {"gate": {"alpha": 5.0}}), "dataset": chain.clean, **models}
    assert_refused("alpha: input should be less than 0.5, found 5", capsys, evaluate, tmp_path, **wrong)
