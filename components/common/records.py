"""What a row is (a preference pair or an instruction), and how JSON-lines files of rows are read and written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.errors import InputError
from components.common.files import digest, replacing

SPLITS = ("train", "validation", "test")
LANGUAGES = ("en", "zh")
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


class Row(BaseModel):
    """What preferences and instructions have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$", description="content hash of the prompt and the answers")
    group: str = Field(pattern=r"^[0-9a-f]{16}$", description="prompts that are the same or nearly so share it")
    prompt: list[Message] = Field(min_length=1)
    lang: Literal["en", "zh"]
    source: Text
    license: Text


class Preference(Row):
    """A prompt with the answer that was preferred and the one that was not."""

    chosen: Text
    rejected: Text


class Instruction(Row):
    """A prompt with the answer to learn."""

    response: Text


RowT = TypeVar("RowT", bound=Row)


def content_id(prompt: list[dict[str, str]], *answers: str) -> str:
    """16 hexadecimal digits that name a row by what it says."""
    return digest([prompt, *answers])[:16]


def read_lines(path: Path) -> list[Any]:
    """Read a JSON-lines file without looking at what its objects mean.

    Raises:
        InputError: missing, empty, not UTF-8, or a line that is no JSON object; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; `dvc repro` makes the data, `dvc pull` fetches it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error}); expected one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows; expected at least one")
    return rows


def read_rows(path: Path, kind: type[RowT]) -> list[RowT]:
    """Read a JSON-lines file of rows of one kind.

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
    """The first problem of a row, without its text: the field and what was expected."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"'{'.'.join(map(str, first['loc']))}': {first['msg']}"


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines to a file that appears whole; keys keep their order, so equal rows give equal bytes."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            value = row.model_dump() if isinstance(row, BaseModel) else row
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
