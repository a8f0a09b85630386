"""How a version of the preference data is distributed, and how far that is from the version before.

`prepare` remembers the versions in data/statistics.json, oldest first; a version is added when it is made for the first
time, so what was before a version never changes. It puts the distribution of the version before beside the rows, where
it travels with them and belongs to their digest.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.common.errors import InputError
from components.common.files import read_json, write_json

STATISTICS = "statistics.json"
"""File of data/ with the distribution of every version."""
PREVIOUS = "previous.json"
"""File of data/preferences with the distribution of the version before; the first version has none."""
LENGTHS = ("prompt_characters", "chosen_characters", "rejected_characters")
MEASURES = ("language", "source", *LENGTHS)


class Distribution(BaseModel):
    """Counts of preference pairs: by language, by source, and by length in steps of powers of two."""

    model_config = ConfigDict(extra="forbid")
    rows: int = 0
    language: Counter[str] = Counter()
    source: Counter[str] = Counter()
    prompt_characters: Counter[str] = Counter()
    chosen_characters: Counter[str] = Counter()
    rejected_characters: Counter[str] = Counter()

    def add(self, row: dict[str, Any]) -> None:
        """Count a pair."""
        self.rows += 1
        self.language[row["lang"]] += 1
        self.source[row["source"]] += 1
        self.prompt_characters[step(sum([len(turn["content"]) for turn in row["prompt"]]))] += 1
        self.chosen_characters[step(len(row["chosen"]))] += 1
        self.rejected_characters[step(len(row["rejected"]))] += 1


class Version(BaseModel):
    """A version of the data, and how it is distributed."""

    model_config = ConfigDict(extra="forbid")
    digest: str
    distribution: Distribution


def step(characters: int) -> str:
    """The power of two that a length reaches, as the name of its class."""
    return str(1 << max(0, characters.bit_length() - 1))


def distance(now: Distribution, before: Distribution, measure: str) -> float:
    """Total variation distance: the share of the rows that would have to change places to make both the same."""
    one, other = getattr(now, measure), getattr(before, measure)
    moved = sum(abs(one[name] / now.rows - other[name] / before.rows) for name in one.keys() | other.keys())
    return float(moved) / 2


def remember(path: Path, digest: str, distribution: Distribution) -> Distribution | None:
    """Add a version to the remembered ones, unless it is there; returns the distribution of the version before it.

    Raises:
        InputError: the file is no list of versions.
    """
    try:
        versions = TypeAdapter(list[Version]).validate_python(read_json(path) if path.exists() else [])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; `git checkout` it") from error
    place = next((place for place, version in enumerate(versions) if version.digest == digest), len(versions))
    if place == len(versions):
        versions.append(Version(digest=digest, distribution=distribution))
    write_json(path, [version.model_dump() for version in versions])
    return versions[place - 1].distribution if place else None
