"""The function of the fetch component."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from components.common.files import file_hashes, verify_manifest
from components.dataset.chat import load_tokenizer
from components.fetch.component import fetch
from components.orders import Order
from tests.conftest import ROOT
from tests.support.component_kit import assert_refused, call
from tests.support.dated_templates import LLAMA_3_2


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


def test_a_template_that_reads_the_clock_is_brought_with_the_day_of_the_order(
    orders: dict[str, Order], tmp_path: Path
) -> None:
    """So whoever renders it, transformers on a server too, gives the prompts that are trained and judged."""
    given = orders["fetch"]
    assert given.facts["template_date"] == "2024-07-26"
    for name, day in (("shipped", "2024-07-26"), ("other", "2025-01-31")):
        dated = replace(
            given,
            facts=given.facts | {"template_date": day, "template_digest": "d"},
            origin=given.origin | {"template": LLAMA_3_2},
        )
        call(fetch, tmp_path / name, order=dated.as_json())
        tokenizer = load_tokenizer(tmp_path / name / "base")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert f"Today Date: {date.fromisoformat(day):%d %b %Y}\n" in text


def test_data_that_is_not_what_was_resolved_is_refused(
    orders: dict[str, Order], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = orders["fetch"]
    other = replace(given, facts=given.facts | {"preferences_digest": "0" * 32 + ".dir"}).as_json()
    assert_refused("data/preferences changed while the run was starting", capsys, fetch, tmp_path, order=other)
