"""The compiled fetch component under KFP's local runner."""

from pathlib import Path

from components.common.files import file_hashes
from components.fetch.component import fetch
from components.orders import Order
from tests.conftest import ROOT
from tests.support.component_kit import run_locally


def test_data_and_model_are_output_artifacts(orders: dict[str, Order], tmp_path: Path) -> None:
    made = run_locally(fetch, tmp_path, order=orders["fetch"].as_json())
    assert file_hashes(made / "dataset" / "preferences") == file_hashes(ROOT / "data" / "preferences")
    assert (made / "base" / "model.safetensors").is_file()
