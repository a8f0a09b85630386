"""The compiled evaluate component under KFP's local runner."""

from pathlib import Path

from components.common.files import read_json, verify_manifest
from components.evaluate.component import evaluate
from tests.support.component_kit import Chain, run_locally


def test_verdict_report_and_curve_are_output_artifacts(chain: Chain, tmp_path: Path) -> None:
    models = {"base": chain.base, "sft_model": chain.sft_model, "policy": chain.policy}
    made = run_locally(evaluate, tmp_path, dataset=chain.clean, **models)
    verdict = read_json(made / "evaluation" / "verdict.json")
    assert verdict["policy_digest"] == verify_manifest(chain.policy)
    assert read_json(made / "metrics")["gate_passed"] == verdict["passed"]
    assert all((made / name).is_file() for name in ("report", "summary", "roc"))
