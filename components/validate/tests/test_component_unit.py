"""The function of the validate component."""

import json
import shutil
from pathlib import Path

import pytest

from components.dataset.records import read_lines
from components.validate.component import validate
from tests.support.component_kit import Chain, assert_refused, call


def test_a_bad_row_is_set_aside_and_counted(chain: Chain, tmp_path: Path) -> None:
    dataset = tmp_path / "data"
    shutil.copytree(chain.dataset, dataset)
    path = dataset / "preferences" / "train.jsonl"
    row, *others = read_lines(path)
    row["chosen"] = ""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (row, *others)))
    _, made = call(validate, tmp_path, dataset=dataset, base=chain.base)
    assert [line["row"]["id"] for line in read_lines(tmp_path / "clean" / "quarantine.jsonl")] == [row["id"]]
    assert len(read_lines(tmp_path / "clean" / "preferences" / "train.jsonl")) == len(others)
    assert made["metrics"].metadata["preferences_quarantined"] == 1
    assert (tmp_path / "report").read_text().startswith("<!") and (tmp_path / "summary").read_text().startswith("#")


def test_a_line_that_is_not_json_is_refused_by_file_and_line(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "data"
    shutil.copytree(chain.dataset, dataset)
    (dataset / "preferences" / "test.jsonl").write_text('{"prompt": [\n')
    assert_refused("test.jsonl:1: not valid JSON", capsys, validate, tmp_path, dataset=dataset, base=chain.base)
