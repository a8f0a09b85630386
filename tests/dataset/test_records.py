"""Rows: a broken one is named with its file and line, and never shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError
from components.dataset.records import Preference, content_id, read_lines, read_rows


def pair(question: str, chosen: str = "yes", rejected: str = "no", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    row = {"id": content_id(messages, chosen, rejected), "group": content_id(messages), "prompt": messages}
    row |= {"lang": "en", "source": "test", "license": "Apache-2.0", "chosen": chosen, "rejected": rejected}
    return row | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows.jsonl:2: not valid JSON"),
        (b"[1]\n", r"rows.jsonl:1: expected a JSON object, found list"),
        (b"\n\n", r"rows.jsonl: no rows"),
        (b'{"a": "\xff"}', r"rows.jsonl:1: not UTF-8 at byte 7"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / "rows.jsonl")


def test_a_row_of_another_schema_is_named_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair("secret words", rejected=" ")) + "\n")
    with pytest.raises(InputError, match=r"row 1: 'rejected'") as error:
        read_rows(tmp_path / "rows.jsonl", Preference)
    assert "secret" not in str(error.value)
