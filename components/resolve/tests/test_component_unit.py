"""The function of the resolve component."""

from pathlib import Path

import pytest
import yaml

from components.common.files import folder_digest
from components.resolve.component import resolve
from tests.conftest import ROOT
from tests.support.component_kit import assert_refused, call, resolved_orders


def test_it_returns_the_digests_that_dvc_recorded_and_those_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    orders = resolved_orders(call(resolve, tmp_path, base_model=str(tiny_model))[0])
    recorded = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"].values()
    md5 = {out["path"]: out["md5"] for stage in recorded for out in stage["outs"]}
    facts, origin = orders["fetch"].facts, orders["fetch"].origin
    assert origin["data_commit"] == "workspace" and orders["evaluate"].facts["incumbent"] == ""
    assert facts["preferences_digest"] == md5["data/preferences"]
    assert facts["instructions_digest"] == md5["data/instructions"]
    assert origin["base_reference"] == str(tiny_model) and facts["base_digest"] == folder_digest(tiny_model)


def test_a_base_model_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused("model.base=no/such/folder: no such folder", capsys, resolve, tmp_path, base_model="no/such/folder")
