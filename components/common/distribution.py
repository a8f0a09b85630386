"""How a version of the preference data is distributed, remembered from version to version in data/statistics.json.

The file is a list of versions, oldest first, each named by the digest of its files; a version is added when it is made
for the first time. So what was before a version never changes, and every git revision knows it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.common.errors import InputError
from components.common.files import folder_digest, read_json, write_json

STATISTICS = "statistics.json"
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
    return sum(abs(one[name] / now.rows - other[name] / before.rows) for name in one.keys() | other.keys()) / 2


def read_versions(path: Path) -> list[Version]:
    """The remembered versions; none when there is no file.

    Raises:
        InputError: it is not such a list.
    """
    if not path.exists():
        return []
    try:
        return TypeAdapter(list[Version]).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; `git checkout` it") from error


def remember(path: Path, preferences: Path, distribution: Distribution) -> None:
    """Add the data of a folder to the remembered versions, unless it is there."""
    versions = read_versions(path)
    name = folder_digest(preferences)
    if all(version.digest != name for version in versions):
        versions.append(Version(digest=name, distribution=distribution))
    write_json(path, [version.model_dump() for version in versions])


def version_before(path: Path, preferences: Path) -> Version | None:
    """The version that came before the data of a folder, the last one for data that is new; None when there is none."""
    name = folder_digest(preferences)
    versions = read_versions(path)
    place = next((place for place, version in enumerate(versions) if version.digest == name), len(versions))
    return versions[place - 1] if place else None
