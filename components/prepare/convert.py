"""Convert a team's own files to preference pairs; rows that cannot be pairs are quarantined with the reason."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from components.common.documents import JsonObject
from components.common.errors import InputError, RowError
from components.common.files import sha256_file
from components.dataset.language import guess_language
from components.dataset.records import (
    LANGUAGES,
    Preference,
    is_too_deep,
    iter_lines,
    open_rows,
    schema_problem,
    shown,
    write_lines,
)
from components.prepare.formats import FORMATS, convert, detect, language_of
from components.prepare.sources import PAIRS, Added

QUARANTINE = "quarantine.jsonl"
DETECTION_ROWS = 20
"""First rows of a file, which must have the same format."""
LOG_EVERY = 50_000
AUTO = "auto"
PLACEHOLDER = {"id": "0" * 16, "group": "0" * 16}
"""Fields that `prepare` fills in later."""

Located = tuple[str, JsonObject]


@dataclass(frozen=True)
class RowDefaults:
    """Values for rows that do not name their own; an empty `format` is detected."""

    format: str
    language: str
    licence: str
    source: str


@dataclass
class Converted:
    """Result of a conversion: `sources` are those the pairs name, `reasons` counts quarantined rows by reason, `first`
    is the first location of each reason."""

    formats: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        """Number of quarantined rows."""
        return self.reasons.total()


def convert_files(
    files: list[Path], defaults: RowDefaults, out: Path, log: Callable[[str], None]
) -> tuple[Converted, Added]:
    """Write OUT/pairs.jsonl and OUT/quarantine.jsonl; every row of the files ends up in one of them.

    Args:
        files: JSON lines or a JSON array, plain or gzip.
        defaults: for rows that do not name their own values.
        out: existing folder.
        log: called with a progress message from time to time.

    Raises:
        InputError: a file cannot be read to its end, has no known format, or has no pair at all.
    """
    done = Converted()
    quarantined: list[JsonObject] = []
    write_lines(out / PAIRS, _pairs(files, defaults, done, quarantined, log))
    write_lines(out / QUARANTINE, quarantined)
    if not done.pairs:
        why = f"; the first row is not usable: {next(iter(done.reasons))}" if done.reasons else ""
        raise InputError(f"{', '.join(map(str, files))}: contains no preference pair{why}")
    hashes = {path.name: sha256_file(path) for path in files}
    return done, Added(sha256=sha256_file(out / PAIRS), rows=done.pairs, files=hashes)


def _pairs(
    files: list[Path],
    defaults: RowDefaults,
    done: Converted,
    quarantined: list[JsonObject],
    log: Callable[[str], None],
) -> Iterator[JsonObject]:
    for path in files:
        rows = iter(_entries(path))
        start = list(islice(rows, DETECTION_ROWS))
        name = defaults.format or _format(path, start)
        done.formats[str(path)] = name
        for number, (where, row) in enumerate(chain(start, rows), start=1):
            try:
                pairs = [_complete_pair(pair, row, defaults, where) for pair in convert(row, name)]
            except RowError as problem:
                reason = str(problem)
                done.reasons[reason] += 1
                done.first.setdefault(reason, where)
                quarantined.append({"reason": reason, "where": where, "row": row})
                continue
            done.pairs += len(pairs)
            done.sources.update(pair["source"] for pair in pairs)
            yield from pairs
            if number % LOG_EVERY == 0:
                log(f"{path}: {number} rows read")


def _complete_pair(pair: tuple[Any, str, str], row: JsonObject, defaults: RowDefaults, where: str) -> JsonObject:
    prompt, chosen, rejected = pair
    lang = language_of(row) or defaults.language
    if lang == AUTO:
        lang = guess_language(" ".join([*(turn["content"] for turn in prompt), chosen, rejected]))
    if lang not in LANGUAGES:
        raise RowError(f"its language is none of {', '.join(LANGUAGES)}")
    licence = _first_text(row, "license", "licence") or defaults.licence
    if not licence:
        raise InputError(
            f"{where}: the row names no licence; state the terms of use, for example"
            " --licence Apache-2.0 or --licence proprietary"
        )
    completed = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "lang": lang}
    completed |= {"source": _first_text(row, "source") or defaults.source, "license": licence}
    try:
        Preference.model_validate(PLACEHOLDER | completed)
    except ValidationError as error:
        raise RowError(schema_problem(error)) from error
    return completed


def _first_text(row: JsonObject, *keys: str) -> str:
    return next((str(row[key]).strip() for key in keys if isinstance(row.get(key), str)), "")


def _format(path: Path, start: list[Located]) -> str:
    """The common format of a file's first rows."""
    first_rows = {detect(row): where for where, row in reversed(start)}
    names = [name for name in first_rows if name]
    if len(names) == 1:
        return names[0]
    known = f"set --format to one of {', '.join(FORMATS)}"
    if not start:
        raise InputError(f"{path}: no rows; expected at least one")
    if names:
        seen = " and ".join(f"{name} ({first_rows[name]})" for name in sorted(names))
        raise InputError(f"{path}: its rows match more than one format: {seen}; split the file, or {known}")
    keys = shown(", ".join(sorted(start[0][1])[:8]))
    raise InputError(f"{start[0][0]}: unknown format (columns: {keys}); {known}")


def _entries(path: Path) -> Iterator[Located]:
    """The rows of a file, each with its location."""
    with open_rows(path) as file:
        try:
            is_array = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            is_array = False  # read again below, as lines, with an error that says where
    if not is_array:
        yield from ((f"{path}:{number}", row) for number, row in iter_lines(path))
        return
    try:
        with open_rows(path) as file:
            entries = orjson.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip stream is damaged or truncated ({error}); copy the file again") from error
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or is_too_deep(entry):
            raise InputError(f"{path}: entry {number}: expected a flat JSON object, found {type(entry).__name__}")
        yield f"{path}: entry {number}", entry
