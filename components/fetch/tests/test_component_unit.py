"""The function of the fetch component."""

from dataclasses import replace
from pathlib import Path

import pytest

from components.common.files import file_hashes, verify_manifest
from components.fetch.component import fetch
from components.orders import Order
from tests.conftest import ROOT
from tests.support.component_kit import assert_refused, call


def test_it_brings_the_data_unchanged_and_the_model_with_a_manifest(orders: dict[str, Order], tmp_path: Path) -> None:
    _, made = call(fetch, tmp_path, order=orders["fetch"].as_json())
    facts = orders["fetch"].facts | orders["fetch"].origin
    for name in ("preferences", "instructions"):
        assert file_hashes(tmp_path / "dataset" / name) == file_hashes(ROOT / "data" / name)
    verify_manifest(tmp_path / "base")
    assert made["base"].metadata == {"reference": facts["base_reference"], "digest": facts["base_digest"]}
    assert made["dataset"].metadata == {
        "data_commit": facts["data_commit"],
        "data/preferences": facts["preferences_digest"],
        "data/instructions": facts["instructions_digest"],
    }


def test_data_that_is_not_what_was_resolved_is_refused(
    orders: dict[str, Order], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = orders["fetch"]
    other = replace(given, facts=given.facts | {"preferences_digest": "0" * 32 + ".dir"}).as_json()
    assert_refused("data/preferences changed while the run was starting", capsys, fetch, tmp_path, order=other)
