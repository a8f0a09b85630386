"""Which prompts are one group, and on which side of the split a group stands; remembered in data/splits.lock.

Prompts whose shingles overlap by at least a given Jaccard similarity are one group (components/dataset/similarity.py).
A known group keeps its side for ever; a new group's side comes from its hash; new prompts that would join groups of
different sides are bridges and belong nowhere.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.common.errors import InputError
from components.common.files import replacing
from components.dataset.records import SPLITS
from components.dataset.similarity import Sketches, near_groups, reorder_sketches

HEADER = "# prompt, group and side of the split; written by `dvc repro`, never edited: a side once given is kept\n"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt stands: its group, and the side of the split."""

    group: str
    side: str


def hashed_side(group: str, shares: Mapping[str, float]) -> str:
    """The side of a new group: the same for the same hash and shares, on every machine."""
    draw = int(hashlib.sha256(f"kubealign/{group}".encode()).hexdigest()[:12], 16) / 16**12
    total = 0.0
    for side in SPLITS:
        total += shares[side]
        if draw < total:
            return side
    return SPLITS[-1]


def place_prompts(
    keys: Sequence[str], sketches: Sketches, known: Mapping[str, Place], shares: Mapping[str, float], threshold: float
) -> tuple[dict[str, Place], dict[str, str]]:
    """Give every prompt its group and side.

    Args:
        keys: of the prompts, in any order, each once.
        sketches: of the prompts, in the same order.
        known: what splits.lock remembers, by prompt key.
        shares: share of the groups for each side.
        threshold: Jaccard similarity from which prompts are one group.

    Returns:
        the place of each prompt key, and for each bridge the reason why it has none.
    """
    order = np.argsort(np.array(keys, dtype="S16"))
    clusters: dict[int, list[str]] = {}
    for number, label in zip(order, near_groups(reorder_sketches(sketches, order), threshold).tolist(), strict=True):
        clusters.setdefault(label, []).append(keys[number])
    places: dict[str, Place] = {}
    bridges: dict[str, str] = {}
    for members in clusters.values():
        old = {key: known[key] for key in members if key in known}
        sides = sorted({place.side for place in old.values()})
        group = min(place.group for place in old.values()) if old else members[0]
        new = Place(group, sides[0] if sides else hashed_side(group, shares))
        for key in members:
            if key in old:
                places[key] = old[key]
            elif len(sides) > 1:
                bridges[key] = f"its prompt is nearly the same as prompts on both the {' and the '.join(sides)} side"
            else:
                places[key] = new
    return places, bridges


def read_splits(path: Path) -> dict[str, Place]:
    """Read splits.lock; a file that is not there is an empty memory.

    Raises:
        InputError: a line that is not key, group and side.
    """
    if not path.exists():
        return {}
    places = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3 or fields[2] not in SPLITS:
            raise InputError(f"{path}:{number}: expected key, group and one of {', '.join(SPLITS)}, found {line!r}")
        places[fields[0]] = Place(fields[1], fields[2])
    return places


def write_splits(path: Path, places: Mapping[str, Place]) -> None:
    """Write splits.lock, sorted, so that a diff shows just what is new."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(HEADER)
        for key, place in sorted(places.items(), key=lambda entry: entry[0]):
            file.write(f"{key}\t{place.group}\t{place.side}\n")
