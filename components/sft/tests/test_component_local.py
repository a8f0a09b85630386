"""The compiled sft component under KFP's local runner."""

from pathlib import Path

from components.common.files import read_json, verify_manifest
from components.sft.component import sft
from tests.support.component_kit import Chain, run_locally


def test_the_adapter_and_the_losses_are_output_artifacts(chain: Chain, tmp_path: Path) -> None:
    made = run_locally(sft, tmp_path, dataset=chain.clean, base=chain.base)
    verify_manifest(made / "sft_model")
    training = read_json(made / "sft_model" / "training.json")
    assert training["metrics"]["validation_loss"] == read_json(made / "metrics")["validation_loss"]
