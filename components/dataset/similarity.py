"""Which prompts ask the same: near-duplicates, a question inside a longer prompt, a conversation and its beginning.

Compared are the sketches of the user's turns (sketches.py). What many prompts share (a product's instructions, few-shot
examples, the frame around a retrieved text) does not count.

Two prompts ask the same if
- the Jaccard similarity of their sets of three consecutive units reaches a threshold. Candidates come from MinHash
  signatures cut into bands (Broder 1997; Indyk and Motwani 1998), the exact similarity decides. At 0.8 a pair becomes a
  candidate with probability 1 - (1 - 0.8 ** ROWS) ** BANDS = 0.992;
- the longer one contains the other: `CONTAINED` of the n-grams (8 words or 20 Chinese characters) of the shorter one;
- one conversation begins with the other;
- the data name one group for them.

In numpy, on whole chunks of prompts, so a million fit in memory; an index of Python objects does not: on 21,000 prompts
datasketch 2.0 with the same bands found the same 1,000 variants in 440 microseconds and 9.8 kB a prompt.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from components.dataset.sketches import I64, U32, Ragged, Sketches, mix

U64 = NDArray[np.uint64]
Labels = Sequence[str]

CONTAINED = 0.8
"""Share of a prompt's n-grams from which another one contains it."""
FRAMES = "frames.json"
"""File beside the rows with what many prompts share, so that `validate` sees the same groups as `prepare`."""
FRAME_ROWS = 20
"""Prompts, or the square root of their number if that is more, that may share an n-gram that still counts."""
LEAST = 2
"""Shingles or n-grams that a prompt must keep; one that is nothing but frame is compared whole."""
BANDS = 16
ROWS = 6
WINDOW = 16
"""Neighbours in a bucket that a text is compared with; larger groups of near-duplicates are linked by chains."""
CHUNK = 4096
VERIFY_CHUNK = 100_000


@dataclass(frozen=True)
class Frames:
    """Shingles and n-grams that so many prompts share that they do not count, each sorted."""

    shingles: U32
    grams: U32


def find_frames(sketches: Sketches) -> Frames:
    """What more prompts share than `FRAME_ROWS` allows."""
    limit = max(FRAME_ROWS, math.isqrt(len(sketches)))
    return Frames(_frequent(sketches.shingles.values, limit), _frequent(sketches.grams.values, limit))


def same_prompts(near: I64, sketches: Sketches, frames: Frames, named: Labels | None = None) -> I64:
    """For each prompt the index of the first one of its group; groups are connected components.

    Args:
        near: [n], from `near_groups`.
        sketches: sketches of n prompts.
        frames: what does not count.
        named: for each prompt the group that the data name, or an empty text.

    Returns:
        [n]
    """
    parent = near.copy()
    _unite(parent, *_contained_pairs(sketches.grams, frames.grams))
    _unite(parent, *_beginning_pairs(sketches.beginnings))
    if named is not None:
        first: dict[str, int] = {}
        pairs = [(first.setdefault(name, row), row) for row, name in enumerate(named) if name]
        _unite(parent, *np.array(pairs, np.int64).reshape(-1, 2).T)
    return parent


def near_groups(sketches: Sketches, threshold: float, frames: Frames) -> I64:
    """For each prompt the index of the first one of its group of near-duplicates.

    Args:
        sketches: sketches of n prompts.
        threshold: Jaccard similarity from which two prompts are near-duplicates.
        frames: what does not count.

    Returns:
        [n]
    """
    shingles = _without(sketches.shingles, frames.shingles)
    parent = np.arange(len(sketches), dtype=np.int64)
    if len(sketches) < 2:
        return parent
    for band in _bands(shingles):
        order = np.argsort(band, kind="stable")
        column = band[order]
        candidates = []
        for distance in range(1, min(WINDOW, len(order) - 1) + 1):
            same = np.flatnonzero(column[distance:] == column[:-distance])
            if not len(same):
                break
            candidates.append(np.stack([order[same], order[same + distance]]))
        if not candidates:
            continue
        first, second = np.concatenate(candidates, axis=1)
        unknown = parent[first] != parent[second]
        _unite(parent, *_verified(shingles, first[unknown], second[unknown], threshold))
    return parent


def contains_any(sketches: Sketches, listed: Sketches, share: float) -> NDArray[np.bool_]:
    """Whether a prompt contains this share of the n-grams of one of the listed prompts.

    Returns:
        [len(sketches)]
    """
    found = np.zeros(len(sketches), bool)
    if not len(listed.grams.values):
        return found
    wanted = np.unique(listed.grams.values)
    near = sketches.grams.where(_is_in(sketches.grams.values, wanted))
    rows = np.flatnonzero(near.sizes)
    sets = [set(listed.grams.values[start:stop].tolist()) for start, stop in _spans(listed.grams)]
    by_gram: dict[int, list[int]] = {}
    for number, grams in enumerate(sets):
        for gram in grams:
            by_gram.setdefault(gram, []).append(number)
    for row in rows.tolist():
        grams = near.values[near.offsets[row] : near.offsets[row + 1]].tolist()
        counts: dict[int, int] = {}
        for gram in grams:
            for number in by_gram[gram]:
                counts[number] = counts.get(number, 0) + 1
        found[row] = any(count >= share * len(sets[number]) for number, count in counts.items())
    return found


def _spans(rows: Ragged) -> list[tuple[int, int]]:
    return list(zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True))


def _frequent(values: U32, limit: int) -> U32:
    """The values that occur more often than the limit; each occurs once in a row."""
    ordered = np.sort(values)
    often = ordered[limit:] == ordered[: len(ordered) - limit] if len(ordered) > limit else np.empty(0, bool)
    return np.unique(ordered[limit:][often])


def _is_in(values: U32, wanted: U32) -> NDArray[np.bool_]:
    """Whether each value is one of some sorted ones."""
    if not len(wanted):
        return np.zeros(len(values), bool)
    found: NDArray[np.bool_] = wanted[np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)] == values
    return found


def _without(rows: Ragged, frequent: U32) -> Ragged:
    """The rows without frequent values; those that would keep fewer than `LEAST` keep all."""
    kept = ~_is_in(rows.values, frequent)
    counts = np.add.reduceat(np.append(kept, False), rows.offsets[:-1]) if len(rows) else np.empty(0, np.int64)
    bare = (counts < LEAST) & (rows.sizes > 0)
    return rows.where(kept | np.repeat(bare, rows.sizes))


def _unite(parent: I64, first: I64, second: I64) -> None:
    """Merge groups in place; afterwards every text points to the first of its group."""

    def root(item: int) -> int:
        while parent[item] != item:
            item = int(parent[item])
        return item

    for left, right in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(left), root(right)))
        parent[high] = low
    while not np.array_equal(parent, parent[parent]):
        parent[:] = parent[parent]


def _verified(shingles: Ragged, first: I64, second: I64, threshold: float) -> tuple[I64, I64]:
    """The pairs whose Jaccard similarity reaches the threshold."""
    sizes = shingles.sizes
    low, high = np.minimum(sizes[first], sizes[second]), np.maximum(sizes[first], sizes[second])
    possible = low >= threshold * high
    first, second = first[possible], second[possible]
    common = _common(shingles, first, second)
    good = common >= threshold * (sizes[first] + sizes[second] - common)
    return first[good], second[good]


def _common(rows: Ragged, left: I64, right: I64) -> I64:
    """The number of values that the rows of each pair share."""
    common = np.zeros(len(left), np.int64)
    for start in range(0, len(left), VERIFY_CHUNK):
        part = slice(start, start + VERIFY_CHUNK)
        keys = np.sort(np.concatenate([_keyed(rows.take(left[part])), _keyed(rows.take(right[part]))]))
        shared = (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.int64)
        common[part] = np.bincount(shared, minlength=len(left[part]))
    return common


def _keyed(rows: Ragged) -> U64:
    """Every value with its row in the upper 32 bits."""
    keys: U64 = rows.owners().astype(np.uint64) << np.uint64(32) | rows.values
    return keys


def _contained_pairs(grams: Ragged, frequent: U32) -> tuple[I64, I64]:
    """Pairs of a prompt and one that contains `CONTAINED` of its n-grams, frames apart."""
    rows = _without(grams, frequent)
    by_gram = rows.values.astype(np.uint64) << np.uint64(32) | rows.owners().astype(np.uint64)
    by_gram.sort()
    values = (by_gram >> np.uint64(32)).astype(np.uint32)
    owners = (by_gram & np.uint64(0xFFFFFFFF)).astype(np.int64)
    del by_gram
    starts = (
        np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.empty(0, np.int64)
    )
    counts = np.diff(np.append(starts, len(values)))
    per_value = np.repeat(counts, counts)
    shared = np.bincount(owners[per_value > 1], minlength=len(rows))
    inner = np.flatnonzero((shared >= CONTAINED * rows.sizes) & (rows.sizes > 0))
    if not len(inner):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # Each such prompt is looked for by its rarest shared n-gram alone.
    is_inner = np.zeros(len(rows), bool)
    is_inner[inner] = True
    places = np.flatnonzero(is_inner[owners] & (per_value > 1))
    order = np.lexsort((per_value[places], owners[places]))
    places = places[order]
    firsts = places[np.concatenate([[True], owners[places][1:] != owners[places][:-1]])]
    begin = np.searchsorted(starts, firsts, side="right") - 1
    small = np.repeat(owners[firsts], counts[begin])
    large = Ragged(owners, np.append(starts, len(owners))).take(begin).values
    different = small != large
    small, large = small[different], large[different]
    good = _common(rows, small, large) >= CONTAINED * rows.sizes[small]
    return small[good], large[good]


def _beginning_pairs(beginnings: Ragged) -> tuple[I64, I64]:
    """Pairs of a conversation and one that begins with it."""
    if not len(beginnings.values):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    has_turns = np.flatnonzero(beginnings.sizes)
    whole = beginnings.values[beginnings.offsets[1:][has_turns] - 1]
    order = np.argsort(whole, kind="stable")
    ordered = whole[order]
    position = np.searchsorted(ordered, beginnings.values)
    found = ordered[np.minimum(position, len(ordered) - 1)] == beginnings.values
    shorter = has_turns[order[position[found]]]
    longer = beginnings.owners()[found]
    different = shorter != longer
    return shorter[different], longer[different]


def _bands(shingles: Ragged) -> NDArray[np.uint32]:
    """[bands, rows]; rows without a value have bands of their own."""
    multipliers, increments = _permutations()
    bands = np.empty((BANDS, len(shingles)), np.uint32)
    for start in range(0, len(shingles), CHUNK):
        stop = min(start + CHUNK, len(shingles))
        offsets = shingles.offsets[start : stop + 1]
        values = shingles.values[offsets[0] : offsets[-1]]
        starts = offsets[:-1] - offsets[0]
        for band in range(BANDS):
            joint = np.zeros(stop - start, np.uint32)
            for row in range(band * ROWS, (band + 1) * ROWS):
                hashed = values * multipliers[row] + increments[row]
                hashed ^= hashed >> np.uint32(15)
                hashed *= np.uint32(0x2C1B3C6D)
                joint = mix(joint * np.uint32(31) + np.minimum.reduceat(hashed, starts))
            bands[band, start:stop] = joint
    return bands


@cache
def _permutations() -> tuple[U32, U32]:
    """An odd multiplier and an increment per row of the signature."""
    numbers = np.frombuffer(hashlib.shake_256(b"kubealign").digest(8 * BANDS * ROWS), "<u4").astype(np.uint32)
    multipliers, increments = numbers.reshape(2, -1)
    return multipliers | np.uint32(1), increments
