"""The compiled resolve component under KFP's local runner."""

import json
from pathlib import Path

from components.common.files import folder_digest
from components.resolve.component import resolve
from tests.support.component_kit import run_locally


def test_every_order_is_an_output_parameter(tiny_model: Path, tmp_path: Path) -> None:
    made = run_locally(resolve, tmp_path, base_model=str(tiny_model))
    found = json.loads((made / "executor_output.json").read_text())["parameterValues"]
    assert set(found) == set(resolve.component_spec.outputs)
    assert json.loads(found["order_fetch"])["facts"]["base_digest"] == folder_digest(tiny_model)
