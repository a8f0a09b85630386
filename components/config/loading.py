"""Validation of plain values as a typed section; an error is one line with key, expected and found value."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from components.common.errors import InputError
from components.common.secrets import without_query
from components.config.renamed import REFUSED, RENAMED
from components.config.section import Section

S = TypeVar("S", bound=Section)


def validated(kind: type[S], raw: Any, where: str) -> S:
    """Check plain values against a section.

    Args:
        kind: the section's class.
        raw: the values.
        where: their origin, for the message.

    Raises:
        InputError: a value is wrong; the message names the key and, for an unknown one, the nearest valid one.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(kind, entry) for entry in error.errors())) from error


def keys(kind: type[BaseModel]) -> list[str]:
    """The names of a section's fields, as params.yaml spells them."""
    return [field.alias or name for name, field in kind.model_fields.items()]


def _model_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        for name, field in kind.model_fields.items():
            inner = field.annotation
            if part in (name, field.alias) and isinstance(inner, type) and issubclass(inner, BaseModel):
                kind = inner
                break
    return kind


def _explain(kind: type[BaseModel], entry: Any) -> str:
    location = entry["loc"]
    key = ".".join(str(part) for part in location)
    parent = _model_at(kind, location[:-1])
    if entry["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"{key}: renamed; write {RENAMED[key]}"
        if location[-1] in REFUSED:
            return f"{key}: {REFUSED[location[-1]]}"
        near = difflib.get_close_matches(str(location[-1]), keys(parent), n=1, cutoff=0.0)
        return f"{key}: no such key; did you mean {'.'.join([*map(str, location[:-1]), *near])}?"
    problem = entry["msg"].removeprefix("Value error, ")
    problem = f"{problem[0].lower()}{problem[1:]}"
    if isinstance(entry["input"], dict):  # a rule about several fields of a section, which names them itself
        return f"{key}: {problem}" if key else problem
    name = str(location[-1]) if location else ""
    field = next((f for n, f in parent.model_fields.items() if name in (n, f.alias)), None)
    meaning = f" ({field.description})" if field and field.description else ""
    return f"{key}: {problem}, found {without_query(repr(entry['input']))}{meaning}"
