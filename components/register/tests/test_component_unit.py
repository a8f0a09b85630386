"""The function of the register component."""

from pathlib import Path

import pytest

from components.common.files import read_json
from components.register.component import register
from components.tracking import store
from tests.support.component_kit import Chain, assert_refused, call, judged_inputs


def test_it_makes_a_version_with_its_lineage_and_aliases(chain: Chain, runs: dict[str, str], tmp_path: Path) -> None:
    judged = judged_inputs(chain)
    uri, _ = call(register, tmp_path, **judged, **runs)
    result = read_json(tmp_path / "result")
    version = store.client().get_model_version_by_alias("kubealign", "challenger")
    assert uri == result["model_uri"] == f"models:/kubealign/{version.version}"
    assert version.tags["kubealign.lineage"] == result["lineage"] == "lineage"
    assert ("champion" in result["aliases"]) == result["verdict"]["passed"]


def test_a_model_without_a_verdict_is_refused(
    chain: Chain, runs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = judged_inputs(chain) | {"evaluation": tmp_path} | runs
    assert_refused("verdict.json: not found", capsys, register, tmp_path, **wrong)
