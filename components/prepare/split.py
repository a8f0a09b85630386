"""Group prompts that ask the same and assign each group to a split; assignments are remembered in data/splits.lock.

What asks the same says components/dataset/similarity.py. A known group keeps its split; a new group's split comes from
its hash; a new prompt that would join groups of different splits is a bridge and is quarantined. Where two branches of
the repository remembered prompts that ask the same on different sides, the side nearest to the test wins and the other
rows are quarantined.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.common.errors import InputError
from components.common.files import replacing
from components.dataset.records import SPLITS
from components.dataset.similarity import Frames, near_groups, same_prompts
from components.dataset.sketches import Sketches

HEADER = "# prompt, group and side of the split; written by `dvc repro`, never edited: a side once given is kept\n"


@dataclass(frozen=True, slots=True)
class Assignment:
    """The group of a prompt and its split."""

    group: str
    split: str


def assign_split(group: str, shares: Mapping[str, float]) -> str:
    """Split of a new group: a function of its hash and the shares, the same on every machine."""
    draw = int(hashlib.sha256(f"kubealign/{group}".encode()).hexdigest()[:12], 16) / 16**12
    total = 0.0
    for split in SPLITS:
        total += shares[split]
        if draw < total:
            return split
    return SPLITS[-1]


def assign_prompts(
    keys: Sequence[str],
    sketches: Sketches,
    frames: Frames,
    known: Mapping[str, Assignment],
    shares: Mapping[str, float],
    threshold: float,
    named: Mapping[str, str],
) -> tuple[dict[str, Assignment], dict[str, str]]:
    """Assign every prompt to a group and a split.

    Args:
        keys: prompt keys, in any order, each once.
        sketches: sketches of the prompts, in the same order.
        frames: what many prompts share.
        known: assignments in splits.lock, by prompt key.
        shares: share of the groups for each split.
        threshold: Jaccard similarity from which prompts form one group.
        named: by prompt key, the group that the data name, if any.

    Returns:
        the assignment of each prompt key, and the reason for each bridge, which has none.
    """
    order = np.argsort(np.array(keys, dtype="S16"))

    def clusters_of(rows: NDArray[np.int64]) -> Iterator[list[str]]:
        chosen = sketches.take(rows)
        names = [named.get(keys[row], "") for row in rows.tolist()] if named else None
        clusters: dict[int, list[str]] = {}
        labels = same_prompts(near_groups(chosen, threshold, frames), chosen, frames, names)
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            clusters.setdefault(label, []).append(keys[row])
        yield from clusters.values()

    assignments: dict[str, Assignment] = {}
    bridges: dict[str, str] = {}
    disputed: set[str] = set()
    for members in clusters_of(order):
        old = {key: known[key] for key in members if key in known}
        splits = sorted({assignment.split for assignment in old.values()})
        group = min(assignment.group for assignment in old.values()) if old else members[0]
        new = Assignment(group, splits[0] if splits else assign_split(group, shares))
        if len(splits) > 1:
            disputed |= old.keys()
        for key in members:
            if key in old:
                assignments[key] = old[key]
            elif len(splits) > 1:
                bridges[key] = f"its prompt asks the same as prompts in both the {' and the '.join(splits)} split"
            else:
                assignments[key] = new
    if disputed:
        rows = np.array([row for row in order.tolist() if keys[row] in disputed], np.int64)
        for members in clusters_of(rows):
            winner = max((known[key].split for key in members), key=SPLITS.index)
            for key in members:
                if known[key].split != winner:
                    del assignments[key]
                    bridges[key] = (
                        f"splits.lock has its prompt in the {known[key].split} split, and one that asks the same in the"
                        f" {winner} split, which keeps it"
                    )
    return assignments, bridges


def read_splits(path: Path) -> dict[str, Assignment]:
    """Read splits.lock; a missing file means no assignments yet.

    A key that a merge left there twice has the side nearest to the test.

    Raises:
        InputError: a line is not key, group and split.
    """
    if not path.exists():
        return {}
    assignments: dict[str, Assignment] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith(("<<<<<<<", "=======", ">>>>>>>", "|||||||")):
            raise InputError(
                f"{path}:{number}: a conflict of a merge; keep the lines of both sides without the markers: `dvc repro`"
                " settles which side of the split a prompt keeps"
            )
        fields = line.split("\t")
        if len(fields) != 3 or fields[2] not in SPLITS:
            raise InputError(f"{path}:{number}: expected key, group and one of {', '.join(SPLITS)}, found {line!r}")
        found = Assignment(fields[1], fields[2])
        before = assignments.get(fields[0], found)
        assignments[fields[0]] = max(found, before, key=lambda one: SPLITS.index(one.split))
    return assignments


def write_splits(path: Path, assignments: Mapping[str, Assignment]) -> None:
    """Write splits.lock, sorted, so that a diff shows only what is new."""
    with replacing(path) as staging, staging.open("w", encoding="utf-8", newline="\n") as file:
        file.write(HEADER)
        for key, assignment in sorted(assignments.items(), key=lambda entry: entry[0]):
            file.write(f"{key}\t{assignment.group}\t{assignment.split}\n")
