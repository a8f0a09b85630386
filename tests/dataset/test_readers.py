"""Whatever bytes a file of rows holds, reading it ends in rows or in one clear error; nothing is passed over."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from components.common.errors import InputError
from components.dataset.records import MAX_LINE_BYTES, iter_lines, read_lines, write_lines
from components.prepare.convert import RowDefaults, convert_files
from components.prepare.formats import FORMATS
from components.prepare.sources import ROWS_FILES
from tests.conftest import ROOT
from tests.tools.fuzz_readers import read_everything

ROW = b'{"prompt": "Who?", "chosen": "A model.", "rejected": "Nobody."}\n'
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
DEEPER = b'{"prompt": ' + b'[{"a": ' * 450 + b"0" + b"}]" * 450 + b"}\n"
"""Deep enough for a writer that recurses, which the parser does not refuse."""
BAD: dict[str, tuple[bytes, str]] = {
    "truncated gzip": (gzip.compress(ROW * 1000)[:-20], r"the gzip stream is damaged"),
    "damaged gzip": (gzip.compress(ROW * 1000)[:40] + b"\0" * 40, r"the gzip stream is damaged"),
    "gzip without content": (b"\x1f\x8b", r"rows.jsonl:1: the gzip stream is damaged"),
    "UTF-16": (ROW.decode().encode("utf-16"), r"rows.jsonl:1: .*UTF-16.*; save the file as UTF-8"),
    "UTF-16 without a mark": (ROW.decode().encode("utf-16-be"), r"rows.jsonl:1: NUL byte or UTF-16 at byte 0"),
    "Latin-1": (ROW + '{"chosen": "café"}\n'.encode("latin-1"), r"rows.jsonl:2: not UTF-8 at byte 15 of the line"),
    "NUL byte": (ROW + b'{"chosen": "a\0b"}\n', r"rows.jsonl:2: NUL byte or UTF-16 at byte 13"),
    "half a surrogate pair": (ROW + rb'{"chosen": "\ud800"}' + b"\n", r"rows.jsonl:2: not valid JSON"),
    "deep nesting": (ROW + DEEP, r"rows.jsonl:2: not valid JSON \(depth limit exceeded"),
    "nesting": (ROW + DEEPER, r"rows.jsonl:2: nested more than 100 levels deep"),
    "cut off in a row": (ROW + ROW[:20], r"rows.jsonl:2: not valid JSON"),
    "two objects on a line": (ROW.strip() + ROW, r"rows.jsonl:1: not valid JSON"),
    "NaN": (b'{"score": NaN}\n', r"rows.jsonl:1: not valid JSON"),
    "a list": (ROW + b"[1]\n", r"rows.jsonl:2: expected a JSON object, found list"),
    "a number": (b"7\n", r"rows.jsonl:1: expected a JSON object, found int"),
    "nothing": (b"", r"rows.jsonl: no rows; expected at least one"),
    "blank lines": (b"\n \r\n", r"rows.jsonl: no rows; expected at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_named_with_file_and_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_lines(tmp_path / "rows.jsonl")
    assert "model" not in str(error.value) and len(str(error.value)) < 400, "no text of the data is shown"


def test_a_line_of_a_hundred_megabytes_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    """In a process that may not take 200 MB more than it has: reading the line whole would fail there."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(ROW + b'{"chosen": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    script = (
        "import resource, sys; from pathlib import Path; from components.dataset.records import read_lines\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 90_000_000,) * 2)\n"
        "read_lines(Path(sys.argv[1]))\n"
    )
    words = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"rows.jsonl:2: the line is longer than {MAX_LINE_BYTES >> 20} MiB" in done.stderr


def test_a_folder_a_missing_file_and_a_pipe_are_no_files_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "a folder; expected a JSON-lines file"),
        (tmp_path / "none", "not found"),
        (tmp_path / "pipe", "not a regular file; expected a JSON-lines file"),
    ):
        with pytest.raises(InputError, match=message):
            read_lines(path)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(ROW * 2)
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + ROW.replace(b"\n", b"\r\n") * 2)
    assert read_lines(tmp_path / "windows") == read_lines(tmp_path / "plain")


def test_blank_lines_count_as_lines_but_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"\n" + ROW + b"\n\n" + ROW)
    assert [number for number, _ in iter_lines(tmp_path / "rows")] == [2, 5]


# ---- whatever the bytes are

text = st.text(st.characters(codec="utf-8"), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "conversations",
    "instruction",
    "input",
    "system",
    "history",
    "lang",
    "source",
)
keys = st.sampled_from([*COLUMNS, "completions", "license"])
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values,
            "content": text,
            "from": st.sampled_from(["human", "gpt"]),
            "value": text,
        },
    ),
    max_size=3,
)
rows = st.dictionaries(keys | text, json_values | messages | st.just("\n\nHuman: a\n\nAssistant: b"), max_size=6)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(found=st.lists(rows, min_size=1, max_size=4))
def test_rows_that_are_written_are_read_again(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    write_lines(tmp_path / "rows", found)
    assert read_lines(tmp_path / "rows") == json.loads(json.dumps(found))


@quick
@given(content=st.binary(max_size=200) | st.binary(max_size=60).map(lambda end: ROW + end))
@example(content=BAD["deep nesting"][0])
@example(content=gzip.compress(BAD["deep nesting"][0]))
@example(content=BAD["nesting"][0])
@example(content=b"[" + DEEPER + b"]")
@example(content=b"[" * 100_000)
@example(content=b'[{"chosen": 1}, 2]')
def test_any_bytes_end_in_rows_or_in_one_clear_error(tmp_path: Path, content: bytes) -> None:
    read_everything(content, tmp_path)


@quick
@given(found=st.lists(rows, min_size=1, max_size=5))
def test_every_row_of_any_shape_is_a_pair_or_set_aside(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    """By every format; a list of answers makes more than one pair of a row."""
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in found))
    for format_name, entry in FORMATS.items():
        if entry.kind == "unpaired":
            continue
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        defaults = RowDefaults(format_name, "auto", "MIT", "x", entry.kind)
        try:
            done, _ = convert_files([tmp_path / "rows"], defaults, out, print)
        except InputError as error:
            assert "contains no " in str(error) or "holds the rows" in str(error)
            continue
        assert done.quarantined == len(read_lines(out / "quarantine.jsonl")) if done.quarantined else True
        assert len(read_lines(out / ROWS_FILES[entry.kind])) == done.rows


@pytest.mark.long
def test_a_bounded_fuzz_run_finds_no_crash(tmp_path: Path) -> None:
    """atheris, guided by coverage, for two minutes; its own corpus begins with the bad files of this test."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, (content, _) in enumerate(BAD.values()):
        (corpus / str(number)).write_bytes(content[:4096])
    words = [sys.executable, "-P", str(ROOT / "tests" / "tools" / "fuzz_readers.py"), str(corpus)]
    words += ["-max_total_time=120", "-max_len=4096", "-timeout=20", f"-artifact_prefix={tmp_path}/"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr or "Done" in done.stderr
