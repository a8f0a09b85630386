"""Which prompts are one group, and on which side of the split a group stands; remembered in data/splits.lock.

Prompts whose shingles overlap by at least a given Jaccard similarity are one group (MinHash-LSH finds the candidates,
the exact similarity decides). A known group keeps its side for ever; a new group's side comes from its hash; new
prompts that would join groups of different sides are bridges and belong nowhere.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from components.common.errors import InputError
from components.common.files import write_text
from components.common.records import SPLITS

SHINGLE = 3
PERMUTATIONS = 128
HEADER = "# prompt, group and side of the split; written by `dvc repro`, never edited: a side once given is kept\n"


@dataclass(frozen=True)
class Prompt:
    """A prompt's normalised text, with its language, as what is grouped."""

    key: str
    text: str
    lang: str


@dataclass(frozen=True)
class Place:
    """Where a prompt stands: its group, and the side of the split."""

    group: str
    side: str


def make_prompt(messages: Sequence[Mapping[str, str]], lang: str) -> Prompt:
    """Normalise a conversation: Unicode NFKC, lower case, single spaces; its key is the hash of that."""
    joined = "\n".join(str(message["content"]) for message in messages)
    text = " ".join(unicodedata.normalize("NFKC", joined).lower().split())
    return Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text, lang)


def shingles(prompt: Prompt) -> frozenset[str]:
    """Runs of three words in English, of three characters in Chinese; the whole text when it is shorter."""
    units: Sequence[str] = prompt.text.replace(" ", "") if prompt.lang == "zh" else re.findall(r"\w+", prompt.text)
    joint = "" if prompt.lang == "zh" else " "
    runs = [joint.join(units[i : i + SHINGLE]) for i in range(len(units) - SHINGLE + 1)]
    return frozenset(runs or [prompt.text])


def similar_pairs(prompts: Sequence[Prompt], threshold: float) -> list[tuple[int, int]]:
    """Index pairs of prompts whose shingle sets have a Jaccard similarity of at least `threshold`."""
    sets = [shingles(prompt) for prompt in prompts]
    index = MinHashLSH(threshold=max(0.0, threshold - 0.1), num_perm=PERMUTATIONS)
    pairs = []
    for number, items in enumerate(sets):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([item.encode() for item in sorted(items)])
        for other in index.query(sketch):
            if len(items & sets[other]) >= threshold * len(items | sets[other]):
                pairs.append((other, number))
        index.insert(number, sketch)
    return pairs


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
    prompts: Sequence[Prompt], known: Mapping[str, Place], shares: Mapping[str, float], threshold: float
) -> tuple[dict[str, Place], dict[str, str]]:
    """Give every prompt its group and side.

    Args:
        prompts: any order, repeats allowed.
        known: what splits.lock remembers, by prompt key.
        shares: share of the groups for each side.
        threshold: Jaccard similarity from which prompts are one group.

    Returns:
        the place of each prompt key, and for each bridge the reason why it has none.
    """
    unique = sorted({prompt.key: prompt for prompt in prompts}.values(), key=lambda prompt: prompt.key)
    parent = list(range(len(unique)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in similar_pairs(unique, threshold):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    clusters: dict[int, list[str]] = {}
    for number, prompt in enumerate(unique):
        clusters.setdefault(root(number), []).append(prompt.key)
    places: dict[str, Place] = {}
    bridges: dict[str, str] = {}
    for keys in clusters.values():
        old = {key: known[key] for key in keys if key in known}
        sides = sorted({place.side for place in old.values()})
        group = min(place.group for place in old.values()) if old else keys[0]
        for key in keys:
            if key in old:
                places[key] = old[key]
            elif len(sides) > 1:
                bridges[key] = f"its prompt is nearly the same as prompts on both the {' and the '.join(sides)} side"
            else:
                places[key] = Place(group, sides[0] if sides else hashed_side(group, shares))
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
    lines = (f"{key}\t{place.group}\t{place.side}\n" for key, place in sorted(places.items()))
    write_text(path, HEADER + "".join(lines))
