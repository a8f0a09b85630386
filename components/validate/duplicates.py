"""What only the rows together show: repeats, contradictions, near-duplicates, prompts on two sides, listed prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.common.errors import InputError
from components.dataset.language import HAN
from components.dataset.records import SPLITS, Preference, Row, iter_lines
from components.dataset.similarity import (
    Sketches,
    join_sketches,
    near_groups,
    normal,
    prompt_key,
    select_sketches,
    sketch,
)
from components.validate.scan import Found

Flag = NDArray[np.uint8]
TEST = SPLITS.index("test")
TEXT_FIELDS = ("prompt", "question", "instruction", "text")


@dataclass(frozen=True)
class Listed:
    """The prompts of a decontamination list."""

    keys: NDArray[np.uint64]
    sketches: Sketches


def read_listed(path: Path) -> Listed:
    """Read a list of prompts: JSON lines with a `prompt` (text or messages), `question`, `instruction` or `text`.

    Raises:
        InputError: a line that is no JSON object, or has none of these.
    """
    texts = []
    for number, row in iter_lines(path):
        value = next((row[field] for field in TEXT_FIELDS if row.get(field)), None)
        if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
            value = "\n".join(str(turn["content"]) for turn in value)
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: no prompt; expected a text in one of {', '.join(TEXT_FIELDS)}")
        texts.append(normal(value).lower())
    langs = ["zh" if HAN.search(text) else "en" for text in texts]
    return Listed(np.array([int(prompt_key(text), 16) for text in texts], np.uint64), sketch(texts, langs))


def mark_rows(kind: type[Row], found: Found) -> dict[str, Flag]:
    """Flags of a data set by itself: repeated, repeated_id, repeated_prompt, contradiction."""
    columns = found.columns
    repeated = _seen_before(columns["content"])
    first = 1 - repeated
    flags: dict[str, Flag] = {
        "repeated": repeated,
        "repeated_id": _seen_before(columns["id"]) & first,
        "repeated_prompt": _seen_before(columns["key"]) & first,
    }
    if kind is Preference:
        flags["contradiction"] = _is_swapped(columns["content"], columns["swapped"]) & (1 - columns["same_answer"])
    return flags


def mark_prompts(
    sets: dict[str, Found], sides: dict[str, NDArray[np.uint8]], listed: Listed | None, threshold: float
) -> dict[str, dict[str, Flag]]:
    """Flags that compare prompts, of all data sets together: near_duplicate, split_leak, contaminated.

    Args:
        sets: the data sets by name.
        sides: the side of each row, as its position in SPLITS.
        listed: prompts that must not appear.
        threshold: Jaccard similarity from which two prompts are near.

    Returns:
        for each data set, its flags. A prompt that repeats is no near-duplicate; of the rows of a leak those that are
        not on the test side are flagged.
    """
    keys, groups, side = (
        np.concatenate(parts)
        for parts in (
            [found.columns["key"] for found in sets.values()],
            [found.columns["group"] for found in sets.values()],
            list(sides.values()),
        )
    )
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    is_first = np.zeros(len(keys), bool)
    is_first[first] = True
    near = near_groups(_sketches_of(sets, is_first, listed), threshold)
    # Sketches stand in the order of their first rows, not of their keys.
    label = near[(np.cumsum(is_first) - 1)[first][inverse]]
    leak = _on_two_sides(label, side) | _on_two_sides(groups, side)
    bad = np.zeros(len(keys), bool)
    if listed:
        bad = np.isin(label, near[len(first) :]) | np.isin(keys, listed.keys)
    ends = np.cumsum([len(found.columns["key"]) for found in sets.values()])
    parts = {
        name: slice(end - len(found.columns["key"]), end) for (name, found), end in zip(sets.items(), ends, strict=True)
    }
    return {
        name: {
            "near_duplicate": _is_later_variant(label[part], keys[part]),
            "split_leak": leak[part].astype(np.uint8),
            "contaminated": bad[part].astype(np.uint8),
        }
        for name, part in parts.items()
    }


def _sketches_of(sets: dict[str, Found], wanted: NDArray[np.bool_], listed: Listed | None) -> Sketches:
    start = 0
    found = []
    for part in sets.values():
        found.append(select_sketches(part.sketches, wanted[start : start + len(part.sketches)]))
        start += len(part.sketches)
    return join_sketches([*found, listed.sketches] if listed else found)


def _on_two_sides(label: NDArray[Any], side: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Rows not on the test side whose label is on more than one."""
    _, inverse = np.unique(label, return_inverse=True)
    found = np.zeros(len(label), np.uint8)
    np.bitwise_or.at(found, inverse, np.left_shift(np.uint8(1), side))
    several = (found & (found - np.uint8(1))) != 0
    bad: NDArray[np.bool_] = several[inverse] & (side != TEST)
    return bad


def _is_later_variant(label: NDArray[np.int64], keys: NDArray[np.uint64]) -> Flag:
    """Rows whose prompt is another than the first of their label."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    later: NDArray[np.bool_] = keys != keys[first][inverse]
    return later.astype(np.uint8)


def _is_swapped(contents: NDArray[np.uint64], swapped: NDArray[np.uint64]) -> Flag:
    """Rows that another row is, with chosen and rejected swapped."""
    return np.isin(contents, swapped).astype(np.uint8)


def _seen_before(values: NDArray[np.uint64]) -> Flag:
    _, first = np.unique(values, return_index=True)
    seen = np.ones(len(values), np.uint8)
    seen[first] = 0
    return seen
