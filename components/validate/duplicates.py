"""Cross-row checks: repeats, contradictions, near-duplicates, prompts in two splits, decontamination."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.common.errors import InputError
from components.common.files import read_json
from components.dataset.records import SPLITS, Preference, Row, iter_lines
from components.dataset.similarity import FRAMES, Frames, contains_any, find_frames, near_groups, same_prompts
from components.dataset.sketches import Sketches, join_sketches, normalize_text, prompt_key, sketch
from components.validate.scan import RowTable

Flag = NDArray[np.uint8]
TEST = SPLITS.index("test")
TEXT_FIELDS = ("prompt", "question", "instruction", "text")
CONTAMINATED = 0.5
"""Share of a listed prompt's n-grams (8 words or 20 characters) from which a row's prompt holds it."""


@dataclass(frozen=True)
class DecontaminationList:
    """The prompts of a decontamination list."""

    keys: NDArray[np.uint64]
    sketches: Sketches


def read_decontamination_list(path: Path) -> DecontaminationList:
    """Read a list of prompts: JSON lines with a `prompt` (text or messages), `question`, `instruction` or `text`.

    Raises:
        InputError: a line is not a JSON object, or has none of these fields.
    """
    texts = []
    for number, row in iter_lines(path):
        value = next((row[field] for field in TEXT_FIELDS if row.get(field)), None)
        if isinstance(value, list) and all(isinstance(turn, dict) and "content" in turn for turn in value):
            value = "\n".join(str(turn["content"]) for turn in value)
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: no prompt; expected a string in one of {', '.join(TEXT_FIELDS)}")
        texts.append(normalize_text(value).lower())
    keys = np.array([int(prompt_key(text), 16) for text in texts], np.uint64)
    return DecontaminationList(keys, sketch([[{"role": "user", "content": text}] for text in texts]))


def read_frames(folder: Path) -> Frames | None:
    """What `prepare` found many prompts to share; None if the rows came without it."""
    path = folder / FRAMES
    if not path.is_file():
        return None
    found = read_json(path)
    return Frames(np.array(found["shingles"], np.uint32), np.array(found["grams"], np.uint32))


def mark_rows(kind: type[Row], table: RowTable) -> dict[str, Flag]:
    """Flags within one data set: repeated, repeated_id, repeated_prompt, contradiction."""
    columns = table.columns
    repeated = _seen_before(columns["content"])
    is_first = 1 - repeated
    flags: dict[str, Flag] = {
        "repeated": repeated,
        "repeated_id": _seen_before(columns["id"]) & is_first,
        "repeated_prompt": _seen_before(columns["key"]) & is_first,
    }
    if kind is Preference:
        flags["contradiction"] = _is_swapped(columns["content"], columns["swapped"]) & (1 - columns["same_answer"])
    return flags


def mark_prompts(
    sets: dict[str, RowTable],
    split_codes: dict[str, NDArray[np.uint8]],
    decontamination: DecontaminationList | None,
    threshold: float,
    frames: Frames | None = None,
) -> dict[str, dict[str, Flag]]:
    """Flags that compare prompts across all data sets: near_duplicate, split_leak, contaminated.

    Args:
        sets: the data sets by name.
        split_codes: each row's split, as an index into SPLITS.
        decontamination: prompts that must not appear.
        threshold: Jaccard similarity from which two prompts are near-duplicates.
        frames: what many prompts share, from `prepare`; found here if there is none.

    Returns:
        the flags of each data set. An exact repeat of a prompt is not a near-duplicate; of the rows of a leak, those
        outside the test split are flagged.
    """
    keys, groups, split_code = (
        np.concatenate(parts)
        for parts in (
            [table.columns["key"] for table in sets.values()],
            [table.columns["group"] for table in sets.values()],
            list(split_codes.values()),
        )
    )
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    is_first = np.zeros(len(keys), bool)
    is_first[first] = True
    sketches = _sketches_of(sets, is_first)
    frames = frames or find_frames(sketches)
    both = join_sketches([sketches, decontamination.sketches]) if decontamination else sketches
    near = near_groups(both, threshold, frames)
    own = near_groups(sketches, threshold, frames) if decontamination else near
    same = same_prompts(own, sketches, frames)
    # Sketches are in the order of their first rows, not of their keys.
    row_of = (np.cumsum(is_first) - 1)[first][inverse]
    label = near[row_of]
    leak = _in_two_splits(same[row_of], split_code) | _in_two_splits(groups, split_code)
    contaminated = np.zeros(len(keys), bool)
    if decontamination:
        contaminated = _is_listed(keys, np.isin(label, near[len(first) :]), sketches, row_of, decontamination)
    ends = np.cumsum([len(table.columns["key"]) for table in sets.values()])
    parts = {
        name: slice(end - len(table.columns["key"]), end) for (name, table), end in zip(sets.items(), ends, strict=True)
    }
    return {
        name: {
            "near_duplicate": _is_later_variant(label[part], keys[part]),
            "split_leak": leak[part].astype(np.uint8),
            "contaminated": contaminated[part].astype(np.uint8),
        }
        for name, part in parts.items()
    }


def _is_listed(
    keys: NDArray[np.uint64],
    is_near: NDArray[np.bool_],
    sketches: Sketches,
    row_of: NDArray[np.int64],
    decontamination: DecontaminationList,
) -> NDArray[np.bool_]:
    """Rows whose prompt is on the list, nearly is, or holds one that is."""
    holds = contains_any(sketches, decontamination.sketches, CONTAMINATED)
    listed: NDArray[np.bool_] = np.isin(keys, decontamination.keys) | is_near | holds[row_of]
    return listed


def _sketches_of(sets: dict[str, RowTable], selected: NDArray[np.bool_]) -> Sketches:
    start = 0
    parts = []
    for table in sets.values():
        parts.append(table.sketches.take(np.flatnonzero(selected[start : start + len(table.sketches)])))
        start += len(table.sketches)
    return join_sketches(parts)


def _in_two_splits(label: NDArray[Any], split_code: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Rows outside the test split whose label occurs in more than one split."""
    _, inverse = np.unique(label, return_inverse=True)
    split_bits = np.zeros(len(label), np.uint8)
    np.bitwise_or.at(split_bits, inverse, np.left_shift(np.uint8(1), split_code))
    several = (split_bits & (split_bits - np.uint8(1))) != 0
    leaked: NDArray[np.bool_] = several[inverse] & (split_code != TEST)
    return leaked


def _is_later_variant(label: NDArray[np.int64], keys: NDArray[np.uint64]) -> Flag:
    """Rows whose prompt differs from the first one with their label."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    later: NDArray[np.bool_] = keys != keys[first][inverse]
    return later.astype(np.uint8)


def _is_swapped(contents: NDArray[np.uint64], swapped: NDArray[np.uint64]) -> Flag:
    """Rows that equal another row with chosen and rejected swapped."""
    return np.isin(contents, swapped).astype(np.uint8)


def _seen_before(values: NDArray[np.uint64]) -> Flag:
    _, first = np.unique(values, return_index=True)
    seen = np.ones(len(values), np.uint8)
    seen[first] = 0
    return seen
