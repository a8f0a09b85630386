"""Convert a team's own files to pairs of ours: a file of pairs, and a quarantine of the rows that cannot be pairs."""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from components.common.errors import InputError
from components.common.files import sha256_file
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
from components.prepare.formats import FORMATS, RowProblem, convert, detect, language_of
from components.prepare.sources import PAIRS, Added

QUARANTINE = "quarantine.jsonl"
LOOK_AT = 20
"""First rows of a file that have to agree on its format."""
TELL_EVERY = 50_000
AUTO = "auto"
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
WORD = re.compile("[A-Za-z]+")
LANGUAGE_FROM = 500
"""Characters of a row that its language is told from."""
PLACEHOLDER = {"id": "0" * 16, "group": "0" * 16}
"""What `prepare` gives a row later."""

Located = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What holds for the rows that do not say it themselves; `format` is empty when it is to be detected."""

    format: str
    language: str
    licence: str
    source: str


@dataclass
class Converted:
    """What became of the files: `sources` are those that the pairs name, `reasons` counts the rows that were set aside,
    and `first` says where each reason is."""

    formats: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        """Rows that were set aside."""
        return self.reasons.total()


def convert_files(files: list[Path], facts: Facts, out: Path, tell: Callable[[str], None]) -> tuple[Converted, Added]:
    """Write OUT/pairs.jsonl and OUT/quarantine.jsonl; every row of the files is in one of them.

    Args:
        files: JSON lines or a JSON array, plain or gzip.
        facts: for the rows that do not say it themselves.
        out: folder, which is there.
        tell: gets a sentence now and then.

    Raises:
        InputError: a file that cannot be read to its end, of no known format, or without a single pair.
    """
    done = Converted()
    aside: list[dict[str, Any]] = []
    write_lines(out / PAIRS, _pairs(files, facts, done, aside, tell))
    write_lines(out / QUARANTINE, aside)
    if not done.pairs:
        why = f"; the first row is not usable: {next(iter(done.reasons))}" if done.reasons else ""
        raise InputError(f"{', '.join(map(str, files))}: no preference pair in it{why}")
    hashes = {path.name: sha256_file(path) for path in files}
    return done, Added(sha256=sha256_file(out / PAIRS), rows=done.pairs, files=hashes)


def _pairs(
    files: list[Path], facts: Facts, done: Converted, aside: list[dict[str, Any]], tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    for path in files:
        rows = iter(_entries(path))
        start = list(islice(rows, LOOK_AT))
        name = facts.format or _format(path, start)
        done.formats[str(path)] = name
        for number, (where, row) in enumerate(chain(start, rows), start=1):
            try:
                made = [_whole(pair, row, facts, where) for pair in convert(row, name)]
            except RowProblem as problem:
                reason = str(problem)
                done.reasons[reason] += 1
                done.first.setdefault(reason, where)
                aside.append({"reason": reason, "where": where, "row": row})
                continue
            done.pairs += len(made)
            done.sources.update(pair["source"] for pair in made)
            yield from made
            if number % TELL_EVERY == 0:
                tell(f"{path}: {number} rows read")


def _whole(pair: tuple[Any, str, str], row: dict[str, Any], facts: Facts, where: str) -> dict[str, Any]:
    prompt, chosen, rejected = pair
    lang = language_of(row) or facts.language
    if lang == AUTO:
        lang = guess_language(" ".join([*(turn["content"] for turn in prompt), chosen, rejected]))
    if lang not in LANGUAGES:
        raise RowProblem(f"its language is none of {', '.join(LANGUAGES)}")
    licence = _said(row, "license", "licence") or facts.licence
    if not licence:
        raise InputError(
            f"{where}: the row names no licence; say under which terms the data may be used, such as"
            " --licence Apache-2.0 or --licence proprietary"
        )
    made = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "lang": lang}
    made |= {"source": _said(row, "source") or facts.source, "license": licence}
    try:
        Preference.model_validate(PLACEHOLDER | made)
    except ValidationError as error:
        raise RowProblem(schema_problem(error)) from error
    return made


def guess_language(text: str) -> str:
    """`zh` when the text's beginning has more Han characters than words in Latin letters, else `en`."""
    start = text[:LANGUAGE_FROM]
    if start.isascii():
        return "en"
    han = len(HAN.findall(start))
    return "zh" if han > len(WORD.findall(start)) else "en"


def _said(row: dict[str, Any], *keys: str) -> str:
    return next((str(row[key]).strip() for key in keys if isinstance(row.get(key), str)), "")


def _format(path: Path, start: list[Located]) -> str:
    """The format that the first rows of a file agree on."""
    found = {detect(row): where for where, row in reversed(start)}
    names = [name for name in found if name]
    if len(names) == 1:
        return names[0]
    known = f"name it with --format, one of {', '.join(FORMATS)}"
    if not start:
        raise InputError(f"{path}: no rows; expected at least one")
    if names:
        seen = " and ".join(f"{name} ({found[name]})" for name in sorted(names))
        raise InputError(f"{path}: its rows look like more than one format: {seen}; split the file, or {known}")
    keys = shown(", ".join(sorted(start[0][1])[:8]))
    raise InputError(f"{start[0][0]}: of no known format (its columns: {keys}); {known}")


def _entries(path: Path) -> Iterator[Located]:
    """The rows of a file, each with where it stands."""
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
        raise InputError(f"{path}: the gzip stream is damaged or cut off ({error}); copy the file again") from error
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or is_too_deep(entry):
            raise InputError(f"{path}: entry {number}: expected a flat JSON object, found {type(entry).__name__}")
        yield f"{path}: entry {number}", entry
