"""JSON documents that one step writes and another reads: plain JSON on disk, validated against their type when read.

A document is a TypedDict; the file that declares it defines every number. A file that is damaged, or written by another
version of kubealign with other fields, is rejected when it is read.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from components.common.errors import InputError

JsonObject = dict[str, Any]
"""An unvalidated JSON object, such as a line of a user's file or an answer of a server."""
Document = TypeVar("Document")
UnknownFields = Literal["forbid", "ignore"]


def read_document(path: Path, kind: type[Document], unknown: UnknownFields = "forbid") -> Document:
    """Read a JSON file as a document.

    Args:
        path: the file.
        kind: the document's type.
        unknown: `ignore` drops fields that the type lacks, for documents that outlive the version that wrote them.

    Raises:
        InputError: the file is missing, or as in `parse_document`.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; run the step that writes it") from error
    return parse_document(text, kind, str(path), unknown)


def parse_document(text: str | bytes, kind: type[Document], where: str, unknown: UnknownFields = "forbid") -> Document:
    """Read a document from JSON text.

    Args:
        text: the JSON.
        kind: the document's type.
        where: where the text comes from, for the message.
        unknown: as in `read_document`.

    Raises:
        InputError: not JSON, or a field is missing, unknown or of another type; names the field, never its value.
    """
    try:
        document: Document = _adapter(cast(Any, kind)).validate_json(text, strict=True, extra=unknown)
    except ValidationError as error:
        raise InputError(
            f"{where}: {_first_problem(error)}; the document is damaged or was written by another version of kubealign:"
            " run the step that writes it again"
        ) from error
    return document


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_problem(error: ValidationError) -> str:
    """The first problem, with the path of its field, such as `models.policy.scale: missing`."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    text = {"missing": "missing", "extra_forbidden": "unknown"}.get(problem["type"], problem["msg"])
    return f"{field}: {text}" if field else text
