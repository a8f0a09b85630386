"""Distribution of each version of the preference data, and its distance from the previous version.

`prepare` keeps all versions in data/statistics.json, oldest first; a version is added when it is first made, so the
previous version never changes. The previous distribution is stored beside the rows, travels with them and is part of
their digest.
"""

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.common.documents import JsonObject
from components.common.errors import InputError
from components.common.files import read_json, write_json

STATISTICS = "statistics.json"
"""File in data/ with the distribution of every version."""
PREVIOUS = "previous.json"
"""File in data/preferences with the distribution of the previous version; the first version has none."""
LENGTHS = ("prompt_characters", "chosen_characters", "rejected_characters")
MEASURES = ("language", "source", *LENGTHS)


class Distribution(BaseModel):
    """Counts of preference pairs: by language, by source, and by length in power-of-two buckets."""

    model_config = ConfigDict(extra="forbid")
    rows: int = 0
    language: Counter[str] = Counter()
    source: Counter[str] = Counter()
    prompt_characters: Counter[str] = Counter()
    chosen_characters: Counter[str] = Counter()
    rejected_characters: Counter[str] = Counter()

    def add(self, row: JsonObject) -> None:
        """Count a pair."""
        self.rows += 1
        self.language[row["lang"]] += 1
        self.source[row["source"]] += 1
        self.prompt_characters[length_bucket(sum([len(turn["content"]) for turn in row["prompt"]]))] += 1
        self.chosen_characters[length_bucket(len(row["chosen"]))] += 1
        self.rejected_characters[length_bucket(len(row["rejected"]))] += 1


class Version(BaseModel):
    """A version of the data with its distribution."""

    model_config = ConfigDict(extra="forbid")
    digest: str
    distribution: Distribution


def length_bucket(characters: int) -> str:
    """Name of a length's bucket: the largest power of two that it reaches."""
    return str(1 << max(0, characters.bit_length() - 1))


def distance(now: Distribution, before: Distribution, measure: str) -> float:
    """Total variation distance: the share of rows that would have to move to make both distributions equal."""
    left, right = getattr(now, measure), getattr(before, measure)
    moved = sum(abs(left[name] / now.rows - right[name] / before.rows) for name in left.keys() | right.keys())
    return float(moved) / 2


def remember(path: Path, digest: str, distribution: Distribution) -> Distribution | None:
    """Add a version unless it is recorded already; return the distribution of the version before it.

    Raises:
        InputError: the file is not a list of versions.
    """
    try:
        versions = TypeAdapter(list[Version]).validate_python(read_json(path) if path.exists() else [])
    except (InputError, ValidationError) as error:
        raise InputError(f"{path}: not the list of versions; `git checkout HEAD -- {path}` restores it") from error
    index = next((index for index, version in enumerate(versions) if version.digest == digest), len(versions))
    if index == len(versions):
        versions.append(Version(digest=digest, distribution=distribution))
    write_json(path, [version.model_dump() for version in versions])
    return versions[index - 1].distribution if index else None
