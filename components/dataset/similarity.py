"""Which prompts ask the same: near-duplicates, a question inside a longer prompt, a conversation and its beginning.

Compared are the user's turns, as units: every Chinese character and every word in other scripts is one, so languages
meet. Unicode forms, case, invisible characters and traditional or simplified characters make no difference. What many
prompts share (a product's instructions, few-shot examples, the frame around a retrieved text) does not count.

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
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Texts = Sequence[str]
Conversation = Sequence[Mapping[str, Any]]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Labels = Sequence[str]

SHINGLE = 3
WORD_WEIGHT, CHARACTER_WEIGHT, GRAM_WEIGHT = 5, 2, 40
"""An n-gram is 8 words, 20 Chinese characters, or as many of both as weigh the same."""
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
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: [n values] and [rows + 1] offsets."""

    values: NDArray[Any]
    offsets: I64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> I64:
        """The length of every row."""
        return np.diff(self.offsets)

    def take(self, rows: NDArray[Any]) -> "Ragged":
        """Some rows, in the order given."""
        return Ragged(self.values[self._positions(rows)], _offsets(self.sizes[rows]))

    def where(self, kept: NDArray[np.bool_]) -> "Ragged":
        """The rows with some of their values."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        return Ragged(self.values[kept], sums[self.offsets])

    def owners(self) -> I64:
        """The row of every value."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def _positions(self, rows: NDArray[Any]) -> I64:
        sizes = self.sizes[rows]
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        positions: I64 = np.repeat(self.offsets[:-1][rows], sizes) + within
        return positions


def join_ragged(parts: Sequence[Ragged]) -> Ragged:
    """Concatenate rows."""
    return Ragged(
        np.concatenate([part.values for part in parts]), _offsets(np.concatenate([part.sizes for part in parts]))
    )


@dataclass(frozen=True)
class Sketches:
    """Prompts as hashes.

    Args:
        shingles: each prompt's sorted set of three consecutive units, 32 bits.
        grams: each prompt's sorted set of n-grams, 32 bits; none if it is shorter.
        beginnings: for each of the user's turns the conversation up to it, 64 bits; the last one is the whole prompt.
    """

    shingles: Ragged
    grams: Ragged
    beginnings: Ragged

    def __len__(self) -> int:
        return len(self.shingles)

    def take(self, rows: NDArray[Any]) -> "Sketches":
        """Some prompts, in the order given."""
        return Sketches(self.shingles.take(rows), self.grams.take(rows), self.beginnings.take(rows))


@dataclass(frozen=True)
class Frames:
    """Shingles and n-grams that so many prompts share that they do not count, each sorted."""

    shingles: U32
    grams: U32


def normalize_text(text: str) -> str:
    """Unicode NFKC without invisible characters and with single spaces, so that invisible differences do not count."""
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.split())


def prompt_text(messages: Conversation) -> str:
    """A conversation as text for its key: normalized, in lower case. Never to be changed, as keys are remembered."""
    joined = "\n".join([str(message["content"]) for message in messages])
    return " ".join((joined if joined.isascii() else unicodedata.normalize("NFKC", joined)).lower().split())


def prompt_key(text: str) -> str:
    """Hash of a prompt's normalized text, 16 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sketch(conversations: Sequence[Conversation]) -> Sketches:
    """Sketches of prompts, each a list of messages with role and content; a text shorter than a shingle is one."""
    parts = [_sketch_chunk(conversations[i : i + CHUNK]) for i in range(0, len(conversations), CHUNK)]
    return join_sketches(parts)


def join_sketches(parts: Sequence[Sketches]) -> Sketches:
    """Concatenate sketches."""
    if not parts:
        empty = Ragged(np.empty(0, np.uint32), np.zeros(1, np.int64))
        return Sketches(empty, empty, Ragged(np.empty(0, np.uint64), np.zeros(1, np.int64)))
    return Sketches(
        join_ragged([part.shingles for part in parts]),
        join_ragged([part.grams for part in parts]),
        join_ragged([part.beginnings for part in parts]),
    )


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


def _offsets(sizes: NDArray[Any]) -> I64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


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


def _sketch_chunk(conversations: Sequence[Conversation]) -> Sketches:
    spoken = [_spoken(messages) for messages in conversations]
    texts = [_asked(turns) for turns in spoken]
    units, characters, counts = _units(texts)
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(texts)), counts)
    last = np.repeat(ends, counts)
    position = np.arange(len(units))
    triples = _joined(_joined(units, units, 1), units, 2)
    inside = np.flatnonzero(position + SHINGLE <= last)
    short = np.flatnonzero(counts < SHINGLE)
    whole = np.array([int(prompt_key(texts[i])[:8], 16) for i in short.tolist()], np.uint32)
    shingles = _sets(np.concatenate([owners[inside], short]), np.concatenate([triples[inside], whole]), len(texts))
    weights = _offsets(np.where(characters, CHARACTER_WEIGHT, WORD_WEIGHT))
    stop = np.searchsorted(weights, weights[:-1] + GRAM_WEIGHT)
    inside = np.flatnonzero(stop <= last)
    grams = _sets(owners[inside], _windows(units, inside, stop[inside]), len(texts))
    beginnings = [_beginnings(turns) for turns in spoken]
    sizes = np.array([len(hashes) for hashes in beginnings], np.int64)
    flat = np.array([value for hashes in beginnings for value in hashes], np.uint64)
    return Sketches(shingles, grams, Ragged(flat, _offsets(sizes)))


def _joined(first: U32, second: U32, step: int) -> U32:
    """At each position the hash of what begins there and what begins some steps later."""
    later = np.zeros_like(second)
    later[: max(len(second) - step, 0)] = second[step:]
    return _mix(_mix(first * np.uint32(0x9E3779B1) + np.uint32(step)) + later)


def _windows(units: U32, start: I64, stop: I64) -> U32:
    """The hash of the units in each window [start, stop), by a polynomial modulo 2 ** 64."""
    base = np.uint64(0x9E3779B97F4A7C15)
    powers = np.cumprod(np.full(len(units) + 1, base, np.uint64))
    inverse = np.cumprod(np.full(len(units) + 1, pow(int(base), -1, 1 << 64), np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((units.astype(np.uint64) + np.uint64(1)) * powers[:-1])])
    hashes = (sums[stop] - sums[start]) * inverse[start] * np.uint64(0xD6E8FEB86659FD93)
    return _mix((hashes >> np.uint64(32)).astype(np.uint32))


def _sets(owners: I64, values: U32, rows: int) -> Ragged:
    """Each row's sorted set of values."""
    keys = np.sort(owners.astype(np.uint64) << np.uint64(32) | values)
    if len(keys):
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=rows)
    return Ragged((keys & np.uint64(0xFFFFFFFF)).astype(np.uint32), _offsets(counts))


def _spoken(messages: Conversation) -> list[tuple[str, str]]:
    """Who says what, system messages apart, as it is compared."""
    return [
        (str(message.get("role")), normalize_text(str(message["content"])).lower())
        for message in messages
        if message.get("role") != "system"
    ]


def _asked(turns: Sequence[tuple[str, str]]) -> str:
    """The user's turns; all of them where no user speaks."""
    asked = [content for role, content in turns if role == "user"]
    return " ".join(asked or [content for _, content in turns])


def _beginnings(turns: Sequence[tuple[str, str]]) -> list[int]:
    """A hash of the conversation up to each of the user's turns."""
    digest = hashlib.blake2b(digest_size=8)
    hashes = []
    for role, content in turns:
        digest.update(f"{role}\0{content}\0".encode("utf-8", "surrogatepass"))
        if role == "user":
            hashes.append(int.from_bytes(digest.digest(), "little"))
    return hashes


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
                joint = _mix(joint * np.uint32(31) + np.minimum.reduceat(hashed, starts))
            bands[band, start:stop] = joint
    return bands


@cache
def _permutations() -> tuple[U32, U32]:
    """An odd multiplier and an increment per row of the signature."""
    numbers = np.frombuffer(hashlib.shake_256(b"kubealign").digest(8 * BANDS * ROWS), "<u4").astype(np.uint32)
    multipliers, increments = numbers.reshape(2, -1)
    return multipliers | np.uint32(1), increments


def _units(texts: Texts) -> tuple[U32, NDArray[np.bool_], I64]:
    """A hash of every unit, whether it is a Chinese character, and the number of units of each text.

    A unit is a Chinese character, or a run of other letters, digits and underscores.
    """
    points = _simplified(_code_points("\n".join(texts) + "\n"))
    kinds = _kinds()[np.minimum(points, len(_kinds()) - 1)]
    begins = np.concatenate([[True], kinds[:-1] != WORD]) & (kinds == WORD) | (kinds == CHARACTER)
    starts = np.flatnonzero(begins)
    lengths = np.array([len(text) + 1 for text in texts], np.int64)
    counts = np.diff(np.searchsorted(starts, _offsets(lengths)))
    if not len(starts):
        return np.empty(0, np.uint32), np.empty(0, bool), counts
    position = np.arange(len(points), dtype=np.uint32)
    anchor = np.zeros(len(points), np.uint32)
    anchor[starts] = starts
    np.maximum.accumulate(anchor, out=anchor)
    parts = _mix(points + (position - anchor) * np.uint32(0x85EBCA77))
    parts[kinds == 0] = 0
    return _mix(np.add.reduceat(parts, starts, dtype=np.uint32)), kinds[starts] == CHARACTER, counts


WORD, CHARACTER = 1, 2


@cache
def _kinds() -> NDArray[np.uint8]:
    """For each code point whether it belongs to a word or is a Chinese character; the last entry covers rare planes."""
    kinds = np.array([chr(point).isalnum() or point == ord("_") for point in range(0x30000)] + [True]).astype(np.uint8)
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FFFF), (0x3040, 0x30FF)):
        kinds[first : last + 1] *= CHARACTER
    return kinds


@cache
def _simplified_table() -> U32:
    """For each code point of the first Chinese plane the simplified character."""
    from opencc import OpenCC

    table = np.arange(0x10000, dtype=np.uint32)
    characters = [chr(point) for point in range(0x3400, 0xA000)]
    converted = OpenCC("t2s").convert("\n".join(characters)).split("\n")
    for character, simple in zip(characters, converted, strict=True):
        if len(simple) == 1:
            table[ord(character)] = ord(simple)
    return table


def _simplified(points: U32) -> U32:
    if len(points) and points.max() >= 0x3400:
        table = _simplified_table()
        inside = points < len(table)
        points = points.copy()
        points[inside] = table[points[inside]]
    return points


def _code_points(text: str) -> U32:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def _mix(values: U32) -> U32:
    """A bijective hash from 32 bits to 32 bits (lowbias32 of Chris Wellons's hash prospector)."""
    values = values ^ (values >> np.uint32(16))
    values *= np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x846CA68B)
    values ^= values >> np.uint32(16)
    return values
