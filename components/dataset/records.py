"""Rows (preference pairs and instructions), and reading and writing them as JSON lines."""

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from components.common.documents import JsonObject
from components.common.errors import InputError
from components.common.files import replacing
from components.common.foreign import NAME_MEANING, NAME_PATTERN, shown

SPLITS = ("train", "validation", "test")
LANGUAGES = ("en", "zh")
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""What pages and messages show of a row, where its texts are never shown."""
NAMES = ("source", "license")
NO_NAME = "(no name)"
_NAME = TypeAdapter(Name)
MAX_LINE_BYTES = 16 << 20
"""Longest accepted line: a longer one means that the file is of another kind, and would exhaust memory."""
MAX_DEPTH = 100
GZIP_MAGIC = b"\x1f\x8b"
NO_DATA = "`dvc repro` makes the data, `dvc pull` fetches it"
"""What to do where there is none."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


class Row(BaseModel):
    """Fields shared by preferences and instructions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$", description="content hash of the prompt and the answers")
    group: str = Field(pattern=r"^[0-9a-f]{16}$", description="shared by prompts that are the same or near-duplicates")
    prompt: list[Message] = Field(min_length=1)
    lang: Literal["en", "zh"]
    source: Name
    license: Name


class Preference(Row):
    """A prompt with its chosen and its rejected answer."""

    chosen: Text
    rejected: Text


class Instruction(Row):
    """A prompt with the answer to learn."""

    response: Text


RowT = TypeVar("RowT", bound=Row)


def content_id(prompt: list[dict[str, str]], *answers: str) -> str:
    """Content hash of a row, 16 hexadecimal digits."""
    text = orjson.dumps([prompt, *answers], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()[:16]


def line_of(row: Any) -> bytes:
    """A row as a line of a file; keys keep their order, so equal rows give equal bytes."""
    return orjson.dumps(row) + b"\n"


def iter_lines(path: Path) -> Iterator[tuple[int, JsonObject]]:
    """Iterate over the objects of a JSON Lines file, plain or gzip, with their line numbers, which count blank lines.

    Raises:
        InputError: as `raw_lines` and `parse_line`.
    """
    for number, line in raw_lines(path):
        yield number, parse_line(path, number, line)


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Iterate over the raw non-blank lines of a file, with their numbers.

    Raises:
        InputError: no such file, a truncated gzip stream, a line that is too long.
    """
    number = 0
    with open_rows(path) as file:

        def readline(size: int) -> bytes:
            nonlocal number
            number += 1
            try:
                return file.readline(size)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise InputError(
                    f"{path}:{number}: the gzip stream is damaged or truncated here ({error}); copy the file again"
                ) from error

        yield from lines_of(path, readline)


def lines_of(path: Path, readline: Callable[[int], bytes]) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines that a function reads, with their numbers.

    Args:
        path: of the file, for messages.
        readline: called with the most bytes to read; an empty line is the end.

    Raises:
        InputError: a line is too long.
    """
    number = 0
    while line := readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_LINE_BYTES:
            raise InputError(
                f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object a line"
            )
        if line.strip():
            yield number, line


def parse_line(path: Path, number: int, line: bytes) -> JsonObject:
    """Parse one line as a JSON object.

    Raises:
        InputError: not UTF-8, or not a JSON object; names file and line, never shows text.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: {json_problem(line, error)}") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and is_too_deep(row):
        raise InputError(f"{path}:{number}: nested more than {MAX_DEPTH} levels deep; a row is a flat object")
    return row


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [entry for entries in inner for entry in entries if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def read_lines(path: Path) -> list[Any]:
    """Read a JSON-lines file without checking a schema.

    Raises:
        InputError: as `iter_lines`, or the file has no row.
    """
    rows = [row for _, row in iter_lines(path)]
    if not rows:
        raise InputError(f"{path}: no rows; expected at least one")
    return rows


def open_rows(path: Path) -> IO[bytes]:
    """Open a file of rows for reading; gzip is detected from its first bytes."""
    if not path.exists():
        raise InputError(f"{path}: not found; {NO_DATA}")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}; expected a JSON-lines file")
    with path.open("rb") as file:
        start = file.read(2)
    return cast(IO[bytes], gzip.open(path, "rb")) if start == GZIP_MAGIC else path.open("rb")


def json_problem(line: bytes, error: ValueError) -> str:
    """Explain why a line could not be parsed and what to do, without its text."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line:
        return f"NUL byte or UTF-16 at byte {max(line.find(0), 0)} of the line; save the file as UTF-8"
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 at byte {wrong.start} of the line; save the file as UTF-8"
    place = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
    return f"not valid JSON{place}; expected one object per line"


def read_rows(path: Path, kind: type[RowT]) -> list[RowT]:
    """Read a JSON-lines file of rows of one schema.

    Raises:
        InputError: as `read_lines`, or a row that does not fit the schema; names file, row and field.
    """
    rows = []
    for number, raw in enumerate(read_lines(path), start=1):
        try:
            rows.append(kind.model_validate(raw))
        except ValidationError as error:
            raise InputError(f"{path}: row {number}: {schema_problem(error)}") from error
    return rows


def schema_problem(error: ValidationError) -> str:
    """First schema violation of a row: the field and what was expected; the value of a name, but none of a text."""
    first = error.errors(include_url=False)[0]
    name = first["loc"][0]
    if name in NAMES and isinstance(first["input"], str):
        return f"'{name}' is '{shown(first['input'])}'; expected {NAME_MEANING}"
    return f"'{shown('.'.join(map(str, first['loc'])))}': {first['msg']}"


def check_names(row: JsonObject, where: str) -> None:
    """Check the source and the licence of a row that is shown by them.

    Args:
        row: the row.
        where: file and line, for the message.

    Raises:
        InputError: one of them is missing or no name.
    """
    for name in NAMES:
        if not is_name(row.get(name)):
            raise InputError(f"{where}: '{name}' is '{shown(row.get(name))}'; expected {NAME_MEANING}")


def name_of(value: object) -> str:
    """A row's language, source or licence, to count and show rows by; NO_NAME for one that the schema refuses."""
    return value if isinstance(value, str) and is_name(value) else NO_NAME


def is_name(value: object) -> bool:
    """Whether a value can be a source or licence."""
    try:
        _NAME.validate_python(value)
    except ValidationError:
        return False
    return True


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines atomically."""
    with replacing(path) as staging, staging.open("wb") as file:
        for row in rows:
            file.write(line_of(row.model_dump() if isinstance(row, BaseModel) else row))
