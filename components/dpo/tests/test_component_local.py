"""The compiled dpo component under KFP's local runner."""

from pathlib import Path

from components.common.files import read_json, verify_manifest
from components.dpo.component import dpo
from tests.support.component_kit import Chain, run_locally


def test_the_policy_and_its_metrics_are_output_artifacts(chain: Chain, tmp_path: Path) -> None:
    made = run_locally(dpo, tmp_path, dataset=chain.clean, base=chain.base, sft_model=chain.sft_model)
    verify_manifest(made / "policy")
    training = read_json(made / "policy" / "training.json")
    assert (
        training["metrics"]["validation_rewards/margins"] == read_json(made / "metrics")["validation_rewards/margins"]
    )
