"""Prompts as hashes, for similarity.py: the units of the user's turns, in shingles, n-grams and beginnings.

A unit is a Chinese character, or a word in any other script, so languages meet. Unicode forms, case, invisible
characters and traditional or simplified characters make no difference.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Texts = Sequence[str]
Turns = Sequence[tuple[str, str]]
Conversation = Sequence[Mapping[str, Any]]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

SHINGLE = 3
WORD_WEIGHT, CHARACTER_WEIGHT, GRAM_WEIGHT = 5, 2, 40
"""An n-gram is 8 words, 20 Chinese characters, or as many of both as weigh the same."""
CHUNK = 4096
"""Prompts that are sketched at once."""
LONG = 2048
"""Characters from which a text may make Unicode's normalization slow: it sorts runs of accents by exchanges."""
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
        return Ragged(self.values[self._positions(rows)], offsets(self.sizes[rows]))

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
        np.concatenate([part.values for part in parts]), offsets(np.concatenate([part.sizes for part in parts]))
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


def normalize_text(text: str) -> str:
    """Unicode NFKC without invisible characters and with single spaces, so that invisible differences do not count."""
    if not text.isascii():
        # One character alone becomes more than eight others, eighteen: its shorter neighbour stands for it.
        text = INVISIBLE.sub("", _compatible(text.replace("\ufdfa", "\ufdf4")))
    return " ".join(text.split())


def prompt_text(messages: Conversation) -> str:
    """A conversation as text for its key: normalized, in lower case. Never to be changed, as keys are remembered."""
    joined = "\n".join([str(message["content"]) for message in messages])
    return " ".join((joined if joined.isascii() else _compatible(joined)).lower().split())


def _compatible(text: str) -> str:
    """Unicode NFKC, in time linear in the length: long runs of accents are put in their order before."""
    if len(text) > LONG:
        text = _accents().sub(_ordered, text)
    return unicodedata.normalize("NFKC", text)


def _ordered(run: re.Match[str]) -> str:
    return "".join(sorted("".join(unicodedata.normalize("NFKD", mark) for mark in run[0]), key=unicodedata.combining))


@cache
def _accents() -> re.Pattern[str]:
    """Runs of characters that decompose to nothing but accents."""
    marks = [c for c in map(chr, range(0x300, 0x20000)) if unicodedata.combining(unicodedata.normalize("NFKD", c)[0])]
    return re.compile(f"[{''.join(map(re.escape, marks))}]{{32,}}")


def prompt_key(text: str) -> str:
    """Hash of a prompt's normalized text, 16 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sketch(conversations: Sequence[Conversation]) -> Sketches:
    """Sketches of prompts, each a list of messages with role and content; a text shorter than a shingle is one."""
    return sketch_turns([spoken_turns(messages) for messages in conversations])


def sketch_turns(prompts: Sequence[Turns]) -> Sketches:
    """Sketches of prompts whose turns are normalized already, by `spoken_turns`."""
    return join_sketches([_sketch_chunk(prompts[i : i + CHUNK]) for i in range(0, len(prompts), CHUNK)])


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


def offsets(sizes: NDArray[Any]) -> I64:
    """Where rows of these sizes begin, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _sketch_chunk(spoken: Sequence[Turns]) -> Sketches:
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
    weights = offsets(np.where(characters, CHARACTER_WEIGHT, WORD_WEIGHT))
    stop = np.searchsorted(weights, weights[:-1] + GRAM_WEIGHT)
    inside = np.flatnonzero(stop <= last)
    grams = _sets(owners[inside], _windows(units, inside, stop[inside]), len(texts))
    beginnings = [_beginnings(turns) for turns in spoken]
    sizes = np.array([len(hashes) for hashes in beginnings], np.int64)
    flat = np.array([value for hashes in beginnings for value in hashes], np.uint64)
    return Sketches(shingles, grams, Ragged(flat, offsets(sizes)))


def _joined(first: U32, second: U32, step: int) -> U32:
    """At each position the hash of what begins there and what begins some steps later."""
    later = np.zeros_like(second)
    later[: max(len(second) - step, 0)] = second[step:]
    return mix(mix(first * np.uint32(0x9E3779B1) + np.uint32(step)) + later)


def _windows(units: U32, start: I64, stop: I64) -> U32:
    """The hash of the units in each window [start, stop), by a polynomial modulo 2 ** 64."""
    base = np.uint64(0x9E3779B97F4A7C15)
    powers = np.cumprod(np.full(len(units) + 1, base, np.uint64))
    inverse = np.cumprod(np.full(len(units) + 1, pow(int(base), -1, 1 << 64), np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((units.astype(np.uint64) + np.uint64(1)) * powers[:-1])])
    hashes = (sums[stop] - sums[start]) * inverse[start] * np.uint64(0xD6E8FEB86659FD93)
    return mix((hashes >> np.uint64(32)).astype(np.uint32))


def _sets(owners: I64, values: U32, rows: int) -> Ragged:
    """Each row's sorted set of values."""
    keys = np.sort(owners.astype(np.uint64) << np.uint64(32) | values)
    if len(keys):
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=rows)
    return Ragged((keys & np.uint64(0xFFFFFFFF)).astype(np.uint32), offsets(counts))


def spoken_turns(messages: Conversation) -> Turns:
    """Who says what, system messages apart, as it is compared: normalized, in lower case."""
    return [
        (str(message.get("role")), normalize_text(str(message["content"])).lower())
        for message in messages
        if message.get("role") != "system"
    ]


def _asked(turns: Turns) -> str:
    """The user's turns; all of them where no user speaks."""
    asked = [content for role, content in turns if role == "user"]
    return " ".join(asked or [content for _, content in turns])


def _beginnings(turns: Turns) -> list[int]:
    """A hash of the conversation up to each of the user's turns."""
    digest = hashlib.blake2b(digest_size=8)
    hashes = []
    for role, content in turns:
        digest.update(f"{role}\0{content}\0".encode("utf-8", "surrogatepass"))
        if role == "user":
            hashes.append(int.from_bytes(digest.digest(), "little"))
    return hashes


def _units(texts: Texts) -> tuple[U32, NDArray[np.bool_], I64]:
    """A hash of every unit, whether it is a Chinese character, and the number of units of each text.

    A unit is a Chinese character, or a run of other letters, digits and underscores.
    """
    points = _simplified(code_points("\n".join(texts) + "\n"))
    kinds = _kinds()[np.minimum(points, len(_kinds()) - 1)]
    begins = np.concatenate([[True], kinds[:-1] != WORD]) & (kinds == WORD) | (kinds == CHARACTER)
    starts = np.flatnonzero(begins)
    lengths = np.array([len(text) + 1 for text in texts], np.int64)
    counts = np.diff(np.searchsorted(starts, offsets(lengths)))
    if not len(starts):
        return np.empty(0, np.uint32), np.empty(0, bool), counts
    position = np.arange(len(points), dtype=np.uint32)
    anchor = np.zeros(len(points), np.uint32)
    anchor[starts] = starts
    np.maximum.accumulate(anchor, out=anchor)
    parts = mix(points + (position - anchor) * np.uint32(0x85EBCA77))
    parts[kinds == 0] = 0
    return mix(np.add.reduceat(parts, starts, dtype=np.uint32)), kinds[starts] == CHARACTER, counts


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


def code_points(text: str) -> U32:
    """[len(text)]"""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def mix(values: U32) -> U32:
    """A bijective hash from 32 bits to 32 bits (lowbias32 of Chris Wellons's hash prospector)."""
    values = values ^ (values >> np.uint32(16))
    values *= np.uint32(0x7FEB352D)
    values ^= values >> np.uint32(15)
    values *= np.uint32(0x846CA68B)
    values ^= values >> np.uint32(16)
    return values
