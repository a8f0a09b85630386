"""Group near-duplicate prompts and assign each group to a split; assignments are remembered in data/splits.lock.

Prompts whose shingles reach a given Jaccard similarity form one group (components/dataset/similarity.py). A known group
always keeps its split; a new group's split comes from its hash; a new prompt that would join groups of different
splits is a bridge and is quarantined.
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
    known: Mapping[str, Assignment],
    shares: Mapping[str, float],
    threshold: float,
) -> tuple[dict[str, Assignment], dict[str, str]]:
    """Assign every prompt to a group and a split.

    Args:
        keys: prompt keys, in any order, each once.
        sketches: sketches of the prompts, in the same order.
        known: assignments in splits.lock, by prompt key.
        shares: share of the groups for each split.
        threshold: Jaccard similarity from which prompts form one group.

    Returns:
        the assignment of each prompt key, and the reason for each bridge, which has none.
    """
    order = np.argsort(np.array(keys, dtype="S16"))
    clusters: dict[int, list[str]] = {}
    for index, label in zip(order, near_groups(reorder_sketches(sketches, order), threshold).tolist(), strict=True):
        clusters.setdefault(label, []).append(keys[index])
    assignments: dict[str, Assignment] = {}
    bridges: dict[str, str] = {}
    for members in clusters.values():
        old = {key: known[key] for key in members if key in known}
        splits = sorted({assignment.split for assignment in old.values()})
        group = min(assignment.group for assignment in old.values()) if old else members[0]
        new = Assignment(group, splits[0] if splits else assign_split(group, shares))
        for key in members:
            if key in old:
                assignments[key] = old[key]
            elif len(splits) > 1:
                bridges[key] = f"its prompt nearly equals prompts in both the {' and the '.join(splits)} split"
            else:
                assignments[key] = new
    return assignments, bridges


def read_splits(path: Path) -> dict[str, Assignment]:
    """Read splits.lock; a missing file means no assignments yet.

    Raises:
        InputError: a line is not key, group and split.
    """
    if not path.exists():
        return {}
    assignments = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3 or fields[2] not in SPLITS:
            raise InputError(f"{path}:{number}: expected key, group and one of {', '.join(SPLITS)}, found {line!r}")
        assignments[fields[0]] = Assignment(fields[1], fields[2])
    return assignments


def write_splits(path: Path, assignments: Mapping[str, Assignment]) -> None:
    """Write splits.lock, sorted, so that a diff shows only what is new."""
    with replacing(path) as staging, staging.open("w", encoding="utf-8", newline="\n") as file:
        file.write(HEADER)
        for key, assignment in sorted(assignments.items(), key=lambda entry: entry[0]):
            file.write(f"{key}\t{assignment.group}\t{assignment.split}\n")
