"""What steps report and programs read: one JSON event a line, whatever else gets in between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.common.errors import InputError
from components.tracking import events
from components.tracking.errors import report_errors
from components.tracking.events import EVENTS_VARIABLE, MAX_LINE_BYTES, Event, EventReader, parse
from components.tracking.run import StageRun

EVENTS = st.builds(
    Event,
    kind=st.sampled_from(["started", "finished", "cached", "progress", "note", "error"]),
    stage=st.sampled_from(["sft", "dpo"]),
    message=st.text(st.characters(exclude_categories=["Cs"])),
    done=st.integers(0, 2**40),
    total=st.integers(0, 2**40),
    metrics=st.dictionaries(st.sampled_from(["loss", "margin"]), st.floats(allow_nan=False, allow_infinity=False)),
    seconds_left=st.none() | st.floats(0, 1e9),
    exit_code=st.integers(0, 255),
)
NOISE = st.one_of(
    st.binary().map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from(
        [
            b"\x1b[96m'sft'\x1b[0m cache hit",
            b"12%|###   |\r13%|###   |\r",
            b"[error:1] sft not an event",
            b'{"kind": "error", "stage": "sft", "message": "torn',
            b'{"kind": "surprise", "stage": "sft"}',
            b'{"kind": "progress", "stage": "sft", "done": -1}',
            b'{"kind": "progress", "stage": "sft", "seconds_left": 1e999}',
            b"[" * 5000,
            b"\xff\xfe\x00",
            b"null",
            b"",
        ]
    ),
).filter(lambda line: parse(line) is None)


@pytest.fixture
def events_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events.jsonl"
    path.touch()
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    return path


@given(lines=st.lists(EVENTS | NOISE), data=st.data())
def test_every_event_is_read_whatever_stands_between_and_wherever_the_stream_is_cut(
    lines: list[Event | bytes], data: st.DataObject
) -> None:
    encoded = [line if isinstance(line, bytes) else line.model_dump_json().encode() for line in lines]
    stream = b"".join(line + b"\n" for line in encoded)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = EventReader(Path("unused"))
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == [line for line in lines if isinstance(line, Event)]


def test_an_endless_line_is_skipped_and_not_kept_in_memory() -> None:
    reader = EventReader(Path("unused"))
    event = Event(kind="note", stage="sft", message="after it")
    for _ in range(40):
        assert reader.feed(b"x" * (MAX_LINE_BYTES // 4)) == []
        assert len(reader._rest) <= MAX_LINE_BYTES
    assert reader.feed(b'x{"kind":"note","stage":"sft"}\n' + event.model_dump_json().encode() + b"\n") == [event]


def test_a_reader_gives_each_event_once_while_the_file_grows(events_file: Path) -> None:
    reader = EventReader(events_file)
    assert reader.read() == []
    events.started("sft")
    assert [event.kind for event in reader.read()] == ["started"]
    events.note("sft", "one")
    events.error("sft", "two", 2)
    assert [(event.kind, event.message, event.exit_code) for event in reader.read()] == [
        ("note", "one", 0),
        ("error", "two", 2),
    ]
    assert reader.read() == []


def test_lines_of_many_processes_do_not_mix(events_file: Path) -> None:
    program = (
        "import sys; from components.tracking import events\nfor i in range(200): events.note(sys.argv[1], 'x' * 9000)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-P", "-c", program, f"rank{rank}"], stdout=subprocess.DEVNULL)
        for rank in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    found = [event.stage for event in EventReader(events_file).read() if event.message == "x" * 9000]
    assert {stage: found.count(stage) for stage in set(found)} == {"rank0": 200, "rank1": 200, "rank2": 200}


def test_progress_is_typed_for_programs_and_a_line_for_people(
    events_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run = StageRun("dpo", None, "")
    run.progress(1, 36, metrics={"loss": float("nan")})
    run.progress(12, 36, "pairs", {"loss": 0.61004, "tokens_per_s": 12345.6})
    _, event = EventReader(events_file).read()
    assert (event.done, event.total, event.message) == (12, 36, "pairs")
    assert event.metrics == {"loss": 0.61004, "tokens_per_s": 12345.6}
    assert event.seconds_left == pytest.approx(10 / 11 * 24)
    assert capsys.readouterr().out.splitlines() == [
        "[progress] dpo 1/36",
        "[progress] dpo 12/36 pairs loss=0.61 tokens_per_s=12346 left=0:21",
    ]


def test_a_failure_is_one_line_and_one_event_without_credentials(
    events_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, report_errors("fetch"):
        raise InputError("s3://me:secret@host/x\nis not there")
    assert stop.value.code == 2
    assert capsys.readouterr().out == "[stage] fetch started\n[error:2] fetch s3://***@host/x is not there\n"
    with pytest.raises(SystemExit), report_errors("fetch"):
        raise RuntimeError("no answer from https://me:secret@host")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "[error:1] fetch RuntimeError: no answer from https://***@host"
    assert printed.count("[error:") == 1 and "Traceback" in printed and "secret" not in printed
    errors = [event for event in EventReader(events_file).read() if event.kind == "error"]
    assert [(event.message, event.exit_code) for event in errors] == [
        ("s3://***@host/x is not there", 2),
        ("RuntimeError: no answer from https://***@host", 1),
    ]


def test_a_path_that_is_not_utf8_and_an_events_file_that_is_gone_hide_no_failure(
    events_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events.error("fetch", os.fsdecode(b"/data/\xff.jsonl: not found"))
    (event,) = EventReader(events_file).read()
    assert event.message == "/data/?.jsonl: not found"
    events_file.unlink()
    events.error("fetch", "still printed")
    assert capsys.readouterr().out.splitlines()[-1] == "[error:1] fetch still printed"
