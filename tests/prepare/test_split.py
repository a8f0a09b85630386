"""The split: groups of near-duplicates, languages, and what is remembered."""

import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from components.common.errors import InputError
from components.dataset.records import read_lines
from components.dataset.similarity import find_frames
from components.dataset.sketches import prompt_key, prompt_text, sketch
from components.prepare.split import Assignment, assign_prompts, read_splits, write_splits
from tests.conftest import ROOT
from tests.support.prompts import LONG

SHARES = {"train": 0.45, "validation": 0.15, "test": 0.40}


def test_both_languages_are_on_every_side_and_no_group_is_on_two() -> None:
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        rows = read_lines(ROOT / "data" / "preferences" / f"{split}.jsonl")
        assert {row["lang"] for row in rows} == {"en", "zh"}
        sides[split] = {row["group"] for row in rows}
        instructions = read_lines(ROOT / "data" / "instructions" / f"{split}.jsonl")
        assert {row["group"] for row in instructions} <= sides[split], "SFT sees no prompt of another side"
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]


Prompt = str | list[dict[str, str]]


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def key_of(prompt: Prompt) -> str:
    return prompt_key(prompt_text(messages_of(prompt)))


def place(
    prompts: Sequence[Prompt], known: dict[str, Assignment], named: dict[str, str] | None = None
) -> tuple[list[Assignment | None], dict[str, str]]:
    """The place of each prompt, None for a bridge; and the reasons of the bridges."""
    keys = [key_of(prompt) for prompt in prompts]
    sketches = sketch([messages_of(prompt) for prompt in prompts])
    places, bridges = assign_prompts(keys, sketches, find_frames(sketches), known, SHARES, 0.8, named or {})
    return [places.get(key) for key in keys], bridges


def said(*turns: str, system: str = "") -> list[dict[str, str]]:
    """A conversation, the user first."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


ZH = "请写一篇关于灯塔看守人在北方海岸发现瓶中信的短篇小说并描述他的心情"
OTHER = "something else entirely, with other words in it"
RNG = random.Random(7)
WORDS = [f"word{number}" for number in range(5000)]


def some_words(n: int) -> str:
    return " ".join(RNG.choice(WORDS) for _ in range(n))


FRENCH = "où est la bibliothèque de la ville près de l'église"
SAME: dict[str, tuple[Prompt, Prompt]] = {
    "a word more": (LONG, LONG + " today"),
    "a character more": (ZH, ZH + "吧"),
    "invisible characters": (LONG, "\u200b".join(LONG)),
    "invisible characters in Chinese": (ZH, "\u200d".join(ZH) + "\ufeff"),
    "decomposed letters": (FRENCH, unicodedata.normalize("NFD", FRENCH)),
    "traditional characters": (ZH, "請寫一篇關於燈塔看守人在北方海岸發現瓶中信的短篇小說並描述他的心情"),
    "inside a longer prompt": (
        LONG,
        f"You are a tutor for children. Here is the problem: {LONG}? Explain each step of it.",
    ),
    "inside a longer prompt in Chinese": (
        ZH,
        f"你是一位耐心的老师。下面是学生提出的问题：{ZH}？记得解释每一个步骤，不要着急。",
    ),
    "inside a prompt of another language": (
        ZH,
        f"You are a tutor. Here is the problem: {ZH} Answer in English, please.",
    ),
    "a conversation and its beginning": (said("Hi"), said("Hi", "Hello", "who wrote this long book")),
    "with and without a system message": (said(LONG), said(LONG, system="You are a pirate.")),
    "two system messages": (said(LONG, system="Be brief."), said(LONG, system=some_words(80))),
}


@pytest.mark.parametrize("name", SAME)
def test_two_prompts_that_ask_the_same_are_one_group(name: str) -> None:
    (one, same, other), _ = place([*SAME[name], OTHER], {})
    assert one and same and other and one.group == same.group != other.group


SHARED = some_words(170)
FRAMED: dict[str, list[Prompt]] = {
    "a product's system message": [said(some_words(8), system=SHARED) for _ in range(26)],
    "a preamble in the user's turn": [f"{SHARED} {some_words(8)}" for _ in range(26)],
    "a preamble and an ending": [f"{SHARED} {some_words(8)} {SHARED[:200]}" for _ in range(40)],
    "examples in the conversation": [said("Hi", SHARED, some_words(8)) for _ in range(26)],
    "among other prompts": [f"{SHARED} {some_words(8)}" for _ in range(40)] + [some_words(12) for _ in range(300)],
}


@pytest.mark.parametrize("name", FRAMED)
def test_what_many_prompts_share_does_not_make_them_one(name: str) -> None:
    places, _ = place(FRAMED[name], {})
    assert len({found.group for found in places if found}) == len(FRAMED[name])
    assert {found.split for found in places if found} == set(SHARES)


def test_rows_that_the_data_group_stay_together() -> None:
    prompts = [some_words(9) for _ in range(40)]
    places, _ = place(prompts, {}, {key_of(prompt): "team/7" for prompt in prompts})
    assert len({found.group for found in places if found}) == 1


def test_what_two_branches_remembered_is_settled_for_the_test_side() -> None:
    known = {key_of(LONG): Assignment("a" * 16, "train"), key_of(LONG + " today"): Assignment("b" * 16, "test")}
    (train, test, other), bridges = place([LONG, LONG + " today", OTHER], known)
    assert train is None and test == Assignment("b" * 16, "test") and other
    assert bridges == {
        key_of(LONG): "splits.lock has its prompt in the train split, and one that asks the same in the test split,"
        " which keeps it"
    }
    assert place([LONG, OTHER], known)[0][0] == Assignment("a" * 16, "train"), "it comes back without the other one"


def test_the_order_of_the_rows_does_not_matter() -> None:
    some = [f"question number {i} about {LONG[i : i + 40]}" for i in range(40)]
    assert place(some, {})[0] == place(some[::-1], {})[0][::-1]


def test_white_space_case_and_width_make_no_new_prompt() -> None:
    assert key_of("Ｈello  World") == key_of("hello world")


def test_a_known_side_is_kept_and_a_new_near_duplicate_joins_it() -> None:
    for side in SHARES:
        places, bridges = place([LONG, LONG + " today"], {key_of(LONG): Assignment("feed", side)})
        assert not bridges
        assert places[1] == Assignment("feed", side)


def test_a_prompt_that_bridges_two_sides_is_quarantined_with_its_reason() -> None:
    left, right = some_words(12), some_words(12)
    both = f"{left} and {right}"
    known = {key_of(left): Assignment("a" * 16, "train"), key_of(right): Assignment("b" * 16, "test")}
    (first, second, bridge), bridges = place([left, right, both], known)
    reason = "its prompt asks the same as prompts in both the test and the train split"
    assert bridges == {key_of(both): reason}
    assert bridge is None and first and first.split == "train" and second and second.split == "test"


def test_splits_are_remembered_and_a_broken_line_is_named(tmp_path: Path) -> None:
    places = {"b" * 16: Assignment("c" * 16, "test"), "a" * 16: Assignment("a" * 16, "train")}
    write_splits(tmp_path / "splits.lock", places)
    assert read_splits(tmp_path / "splits.lock") == places
    with (tmp_path / "splits.lock").open("a") as file:
        file.write("x\ty\tnowhere\n")
    with pytest.raises(InputError, match=r"splits.lock:4: expected key, group and one of train, validation, test"):
        read_splits(tmp_path / "splits.lock")


def test_a_merged_lock_may_hold_a_prompt_twice_and_a_conflict_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "splits.lock"
    key, group = "a" * 16, "b" * 16
    lock.write_text(f"{key}\t{group}\ttest\n{key}\t{group}\ttrain\n")
    assert read_splits(lock) == {key: Assignment(group, "test")}
    lock.write_text(f"<<<<<<< HEAD\n{key}\t{group}\ttest\n")
    with pytest.raises(InputError, match=r"splits.lock:1: a conflict of a merge; keep the lines of both sides"):
        read_splits(lock)
