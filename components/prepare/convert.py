"""Convert a team's own files to pairs or instructions; rows that cannot be such are quarantined with the reason."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import orjson
from pydantic import ValidationError

from components.common.documents import JsonObject
from components.common.errors import InputError, RowError
from components.common.files import replacing, sha256_file
from components.common.foreign import shown
from components.dataset.language import guess_language
from components.dataset.records import LANGUAGES, Instruction, Preference, line_of, schema_problem
from components.prepare.files import Located, read_rows
from components.prepare.formats import FORMATS, convert, detect, language_of
from components.prepare.pairs import Example
from components.prepare.sources import ROWS_FILES, Added, SourceKind

QUARANTINE = "quarantine.jsonl"
DETECTION_ROWS = 20
"""First rows of a file, which must have the same format."""
LOG_EVERY = 50_000
SAMPLES = 3
"""Converted rows kept to be shown."""
AUTO = "auto"
PLACEHOLDER = {"id": "0" * 16, "group": "0" * 16}
"""Fields that `prepare` fills in later."""
GROUP = "together"
"""Field of a converted row whose value rows of one side of the split share."""


@dataclass(frozen=True)
class RowDefaults:
    """How rows are read, and values for those that do not name their own.

    Args:
        format: a key of `FORMATS`; empty to detect it.
        language: `en`, `zh` or `auto`; also for rows whose own language is neither.
        licence: terms of use.
        source: name of the source.
        kind: what the rows shall be.
        ignored: columns that are no part of the conversation.
        group: column whose value rows of one conversation or document share; empty if there is none.
    """

    format: str
    language: str
    licence: str
    source: str
    kind: SourceKind = "preferences"
    ignored: tuple[str, ...] = ()
    group: str = ""


@dataclass
class Converted:
    """Result of a conversion.

    `sources` are those that the rows name; `reasons` counts quarantined rows by reason and `notes` converted ones about
    which something was assumed, both with the first location in `first`; `samples` are the first rows as they will be
    trained.
    """

    kind: SourceKind = "preferences"
    formats: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    rows: int = 0
    quarantined: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    samples: list[JsonObject] = field(default_factory=list)


def convert_files(
    files: list[Path], defaults: RowDefaults, out: Path, log: Callable[[str], None]
) -> tuple[Converted, Added]:
    """Write the rows and OUT/quarantine.jsonl; every row of the files ends up in one of them.

    Args:
        files: in any kind that `files.read_rows` reads.
        defaults: how to read them.
        out: existing folder.
        log: called with a progress message from time to time.

    Raises:
        InputError: a file cannot be read to its end, has no known format, or has no usable row at all.
    """
    done = Converted(defaults.kind)
    path = out / ROWS_FILES[defaults.kind]
    with ExitStack() as stack:
        good, bad = (stack.enter_context(replacing(to)) for to in (path, out / QUARANTINE))
        rows, quarantine = (stack.enter_context(to.open("wb", buffering=1 << 20)) for to in (good, bad))
        for file in files:
            for entry in _converted(file, defaults, done, log):
                (rows if isinstance(entry, dict) else quarantine).write(
                    line_of(entry) if isinstance(entry, dict) else entry
                )
    if not done.rows:
        why = f"; the first row is not usable: {next(iter(done.reasons))}" if done.reasons else ""
        what = "preference pair" if defaults.kind == "preferences" else "instruction"
        raise InputError(f"{', '.join(map(str, files))}: contains no {what}{why}")
    hashes = {file.name: sha256_file(file) for file in files}
    return done, Added(sha256=sha256_file(path), rows=done.rows, files=hashes, kind=defaults.kind)


def _converted(
    path: Path, defaults: RowDefaults, done: Converted, log: Callable[[str], None]
) -> Iterator[JsonObject | bytes]:
    """The converted rows of a file, and the lines of the quarantine."""
    rows = read_rows(path)
    start = list(islice(rows, DETECTION_ROWS))
    name = defaults.format or _format(path, start, defaults.kind)
    done.formats[str(path)] = name
    for number, (where, row, line) in enumerate(chain(start, rows), start=1):
        try:
            examples = convert(row, name, defaults.ignored)
            completed = [_complete(example, row, defaults, where) for example in examples]
        except RowError as problem:
            reason = str(problem)
            done.quarantined += 1
            done.reasons[reason] += 1
            done.first.setdefault(reason, where)
            yield _quarantine_line(reason, where, row, line)
            continue
        for example, entry in zip(examples, completed, strict=True):
            if example.note:
                done.notes[example.note] += 1
                done.first.setdefault(example.note, where)
            if len(done.samples) < SAMPLES:
                done.samples.append(entry)
            done.sources.add(entry["source"])
        done.rows += len(completed)
        yield from completed
        if number % LOG_EVERY == 0:
            log(f"{path}: {number} rows read")


def _quarantine_line(reason: str, where: str, row: JsonObject, line: bytes) -> bytes:
    """A line of the quarantine, with the row's own bytes where they are JSON: no number changes on the way."""
    try:
        orjson.loads(line)
        return line_of({"reason": reason, "where": where, "row": orjson.Fragment(line)})
    except orjson.JSONDecodeError:
        pass
    try:
        return line_of({"reason": reason, "where": where, "row": row})
    except TypeError:  # an integer of more than 64 bits
        return line_of({"reason": reason, "where": where, "row": repr(row)})


def _complete(example: Example, row: JsonObject, defaults: RowDefaults, where: str) -> JsonObject:
    """A row of our own, with language, source and licence."""
    licence = _first_text(row, "license", "licence") or defaults.licence
    if not licence:
        raise InputError(
            f"{where}: the row names no licence; state the terms of use, for example"
            " --licence Apache-2.0 or --licence proprietary"
        )
    names = ("chosen", "rejected") if len(example.answers) == 2 else ("response",)
    completed = {"prompt": example.prompt} | dict(zip(names, example.answers, strict=True))
    completed["lang"] = _language(example, row, defaults)
    completed |= {"source": _first_text(row, "source") or defaults.source, "license": licence}
    try:
        (Preference if len(names) == 2 else Instruction).model_validate(PLACEHOLDER | completed)
    except ValidationError as error:
        raise RowError(schema_problem(error)) from error
    if defaults.group:
        value = row.get(defaults.group)
        if value is None or value == "" or isinstance(value, dict | list):
            raise RowError(f"no value in the column '{shown(defaults.group)}' that names its group")
        completed[GROUP] = f"{defaults.source}/{value}"
    return completed


def _language(example: Example, row: JsonObject, defaults: RowDefaults) -> str:
    named = language_of(row)
    if named in LANGUAGES:
        return named
    if defaults.language != AUTO:
        return defaults.language
    if named is None:
        asked = [message["content"] for message in example.prompt if message["role"] == "user"]
        guessed = guess_language([*asked[-1:], example.answers[0]])
        if guessed is None:
            raise RowError("its script is that of another language; expected en or zh, or --language for such rows")
        return guessed
    column = next(name for name in ("lang", "language") if name in row)
    raise RowError(
        f"its column '{column}' says {shown(repr(named))}; expected {' or '.join(LANGUAGES)}, or --language for such"
        " rows"
    )


def _first_text(row: JsonObject, *keys: str) -> str:
    return next((str(row[key]).strip() for key in keys if isinstance(row.get(key), str)), "")


OTHER_KIND = {
    "instructions": "instructions rather than pairs; add them for SFT: --instructions",
    "preferences": "preference pairs; without --instructions they are added as such, their chosen answers to SFT too",
    "unpaired": "unpaired feedback (an answer with a label), which cannot be trained on yet; bring pairs",
}


def _format(path: Path, start: list[Located], kind: SourceKind) -> str:
    """The common format of a file's first rows."""
    first_rows = {detect(row, kind): where for where, row, _ in reversed(start)}
    names = [name for name in first_rows if name]
    formats = ", ".join(name for name, entry in FORMATS.items() if entry.kind == kind)
    if not start:
        raise InputError(f"{path}: no rows; expected at least one")
    if len(names) == 1:
        if kind == "instructions" and (other := detect(start[0][1], "preferences")):
            raise InputError(f"{path}: its rows are {OTHER_KIND['preferences']} (format {other})")
        return names[0]
    if names:
        seen = " and ".join(f"{name} ({first_rows[name]})" for name in sorted(names))
        raise InputError(
            f"{path}: its rows match more than one format: {seen}; split the file, or set --format to one of {formats}"
        )
    where, row, _ = start[0]
    if other := detect(row):
        raise InputError(f"{where}: its rows are {OTHER_KIND[FORMATS[other].kind]} (format {other})")
    keys = shown(", ".join(sorted(row)[:8]))
    raise InputError(f"{where}: unknown format (columns: {keys}); rename the columns as one of {formats} has them")
