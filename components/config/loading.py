"""Settings as they are written: params.yaml, overrides and the JSON of KFP parameters become typed sections.

A wrong value ends in one line that names the key, what was expected and what was found.
"""

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from components.common.errors import InputError
from components.config.sections import FORM_FIELDS, Config, Section
from components.tracking.store import without_credentials

S = TypeVar("S", bound=Section)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read params.yaml and apply `section.key=value` overrides.

    Raises:
        InputError: the file or an override is wrong; the message names the key and the nearest valid one.
    """
    raw = _read(path)
    for override in overrides or []:
        _override(raw, override)
    return validated(Config, raw, str(path))


def load_section(path: Path, name: str) -> Any:
    """One section of a configuration file, which need not have others.

    Raises:
        InputError: the file has no such section, or a value in it is wrong.
    """
    kind: Any = next(field.annotation for key, field in Config.model_fields.items() if name == (field.alias or key))
    raw = _read(path)
    if name not in raw:
        raise InputError(f"{path}: no section {name}; add it")
    return validated(kind, raw[name], f"{path}: {name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; run this in the project's folder or name it with --project") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected sections ({', '.join(_keys(Config))}), found {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    name, _, field = key.strip().partition(".")
    if not equals or not field:
        raise InputError(f"--set {override}: expected section.key=value, such as dpo.beta=0.2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from error
    target = raw.setdefault(name, {})
    *parents, last = field.split(".")
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else target
    if not isinstance(target, dict):
        raise InputError(f"--set {override}: {key} is not inside a section")
    target[last] = _like(target.get(last), value, text)


def _like(old: Any, value: Any, text: str) -> Any:
    """The new value, read as the old one was: a tag 1.2 stays text, and 5e-7, which YAML 1.1 calls text, a number."""
    if isinstance(old, str) and not isinstance(value, str):
        return text
    if isinstance(old, int | float) and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def validated(kind: type[S], raw: Any, where: str) -> S:
    """Check plain values against a section; errors become one line that a person can act on."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(kind, entry) for entry in error.errors())) from error


def section(kind: type[S], text: str, **form: Any) -> S:
    """A stage's section from its JSON text and the form fields that were taken out of it.

    Raises:
        InputError: a field is given both in the JSON and on the form, or a value is wrong.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InputError(f"{kind.__name__}: the section is not valid JSON: {error}") from error
    both = sorted(raw.keys() & form.keys())
    if both:
        raise InputError(f"{kind.__name__}: {both[0]} is a field of its own; take it out of the section's JSON")
    return validated(kind, raw | form, kind.__name__)


def pipeline_arguments(config: Config) -> dict[str, Any]:
    """The arguments of a pipeline run: each form field, and each section as JSON text without its form fields."""
    sections = config.sections()
    form = {name: sections[name_of].pop(key) for name, (name_of, key) in FORM_FIELDS.items()}
    names = [name for name in sections if name not in ("prepare", "cluster")]
    return form | {f"{name}_section": json.dumps(sections[name], sort_keys=True) for name in names}


def _keys(kind: type[BaseModel]) -> list[str]:
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
    key = ".".join(str(part) for part in location) or "the shares"
    parent = _model_at(kind, location[:-1])
    if entry["type"] == "extra_forbidden":
        valid = _keys(parent)
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.0)
        return f"{key}: no such key; did you mean {'.'.join([*map(str, location[:-1]), *near])}?"
    if entry["type"] == "missing":
        return f"{key}: missing; add it"
    name = str(location[-1]) if location else ""
    field = next((f for n, f in parent.model_fields.items() if name in (n, f.alias)), None)
    meaning = f" ({field.description})" if field and field.description else ""
    found = without_credentials(repr(entry["input"]))
    said = entry["msg"].removeprefix("Value error, ")
    return f"{key}: {said[0].lower()}{said[1:]}, found {found}{meaning}"
