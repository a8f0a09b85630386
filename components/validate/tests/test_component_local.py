"""The compiled validate component under KFP's local runner."""

from pathlib import Path

from components.common.files import read_json, verify_manifest
from components.validate.component import validate
from tests.support.component_kit import Chain, run_locally


def test_clean_rows_and_counts_are_output_artifacts(chain: Chain, tmp_path: Path) -> None:
    made = run_locally(validate, tmp_path, dataset=chain.dataset, base=chain.base)
    counts = read_json(made / "metrics")
    assert verify_manifest(made / "clean") == verify_manifest(chain.clean)
    assert counts["preferences_rows"] == counts["preferences_clean"] == 88
    assert (made / "report").is_file() and (made / "summary").is_file()
