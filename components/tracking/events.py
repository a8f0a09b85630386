"""Progress reports of a stage: JSON Lines events for the program that started it, and readable lines for people on
standard output.

KUBEALIGN_EVENTS names the file that events are appended to; without it (in a pod, say) only the readable lines appear:
`[stage] dpo started`, `[progress] dpo 12/36 loss=0.61 left=3:20`, `[error:2] dpo pairs.jsonl:17: …` (2 is the exit
code). Programs read events and never the readable lines.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.foreign import one_line

EVENTS_VARIABLE = "KUBEALIGN_EVENTS"
"""Environment variable with the path of the file that events are appended to."""
MAX_LINE_BYTES = 1 << 20
"""A longer line is not an event; the reader skips it without keeping it in memory."""

Kind = Literal["started", "finished", "cached", "progress", "note", "error"]


class Event(BaseModel):
    """One thing that happened in a stage."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Kind
    stage: str = Field(min_length=1)
    message: str = ""
    """Text of a note or an error; for progress, the current activity."""
    done: int = Field(default=0, ge=0)
    """Progress: how many of `total` are done."""
    total: int = Field(default=0, ge=0)
    metrics: dict[str, float] = {}
    """Progress: numbers worth watching, such as the loss."""
    seconds_left: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Progress: estimated time to the end of this count."""
    exit_code: int = 0
    """Of an error: the exit code of the stage."""

    def line(self) -> str:
        """The event for people, in one line."""
        if self.kind == "progress":
            return f"[progress] {self.stage} {self.count()} {self.details()}".rstrip()
        if self.kind == "error":
            return f"[error:{self.exit_code}] {self.stage} {self.message}"
        if self.kind == "note":
            return f"[note] {self.stage} {self.message}"
        return f"[stage] {self.stage} {self.kind}"

    def count(self) -> str:
        """Progress as a count, such as `12/36`."""
        return f"{self.done}/{self.total}"

    def details(self) -> str:
        """Progress details beside the count, such as `loss=0.61 left=3:20`."""
        parts = [self.message] if self.message else []
        parts += [f"{name}={_number_text(value)}" for name, value in self.metrics.items()]
        if self.seconds_left is not None:
            parts.append(f"left={int(self.seconds_left) // 60}:{int(self.seconds_left) % 60:02d}")
        return " ".join(parts)


def started(stage: str) -> None:
    """Report that a stage begins its work."""
    emit(Event(kind="started", stage=stage))


def finished(stage: str) -> None:
    """Report that a stage has done its work."""
    emit(Event(kind="finished", stage=stage))


def cached(stage: str) -> None:
    """Report that a stage does not run because its outputs come from the cache."""
    emit(Event(kind="cached", stage=stage))


def note(stage: str, message: str) -> None:
    """Report something worth keeping in the log."""
    emit(Event(kind="note", stage=stage, message=message))


def error(stage: str, message: str, exit_code: int = 1) -> None:
    """Report why a stage failed."""
    emit(Event(kind="error", stage=stage, message=message, exit_code=exit_code))


def progress(
    stage: str, done: int, total: int, message: str, metrics: Mapping[str, float], seconds_left: float | None
) -> None:
    """Report how far a stage is."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    emit(
        Event(
            kind="progress",
            stage=stage,
            done=done,
            total=total,
            message=message,
            metrics=finite,
            seconds_left=seconds_left,
        )
    )


def emit(event: Event) -> None:
    """Print the event for people and append it to the events file; no credential of a URL gets into either."""
    event = event.model_copy(update={"message": one_line(event.message), "stage": one_line(event.stage)})
    print(one_line(event.line()), flush=True)
    path = os.environ.get(EVENTS_VARIABLE)
    if path:
        # The printed line is what counts: a full disk must not hide the failure that it caused.
        with suppress(OSError):
            _append(path, event.model_dump_json(exclude_defaults=True).encode() + b"\n")


def _append(path: str, line: bytes) -> None:
    """Append in a single write, so that lines of several processes cannot mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(file, line)
    finally:
        os.close(file)


class EventReader:
    """Reads a file of events that is still being written to.

    Only complete lines count. A line that is not an event (torn, not UTF-8, of another program, too long) is skipped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._skipping = False

    def read(self) -> list[Event]:
        """The events that were appended since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        self._offset += len(chunk)
        return self.feed(chunk)

    def feed(self, chunk: bytes) -> list[Event]:
        """The events completed by the next bytes of the stream."""
        *lines, rest = (self._rest + chunk).split(b"\n")
        if lines and self._skipping:
            lines, self._skipping = lines[1:], False
        if len(rest) > MAX_LINE_BYTES:
            rest, self._skipping = b"", True
        self._rest = rest
        return [event for line in lines if (event := parse(line)) is not None]


def parse(line: bytes) -> Event | None:
    """The event of a line, or None if it is not one."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None


def _number_text(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
