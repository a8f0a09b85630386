"""The split: groups of near-duplicates, languages, and what is remembered."""

from pathlib import Path

import pytest

from components.common.errors import InputError
from components.dataset.records import read_lines
from components.dataset.similarity import prompt_key, prompt_text, sketch
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


def place(
    texts: list[str], known: dict[str, Assignment], lang: str = "en"
) -> tuple[list[Assignment | None], dict[str, str]]:
    """The place of each text, None for a bridge; and the reasons of the bridges."""
    asked = [prompt_text([{"role": "user", "content": text}]) for text in texts]
    keys = [prompt_key(text) for text in asked]
    places, bridges = assign_prompts(keys, sketch(asked, [lang] * len(asked)), known, SHARES, 0.8)
    return [places.get(key) for key in keys], bridges


def key_of(text: str) -> str:
    return prompt_key(prompt_text([{"role": "user", "content": text}]))


def test_the_order_of_the_rows_does_not_matter() -> None:
    some = [f"question number {i} about {LONG[i : i + 40]}" for i in range(40)]
    assert place(some, {})[0] == place(some[::-1], {})[0][::-1]


def test_near_duplicates_are_one_group_in_both_languages() -> None:
    (one, near, other), _ = place([LONG, LONG + " today", "something else entirely, with other words in it"], {})
    assert one and near and other and one.group == near.group != other.group
    text = "请写一篇关于灯塔看守人在北方海岸发现瓶中信的短篇小说并描述他的心情"
    (one, near, other), _ = place([text, text + "吧", "完全不同的另一个问题，关于天气和旅行"], {}, "zh")
    assert one and near and other and one.group == near.group != other.group


def test_white_space_case_and_width_make_no_new_prompt() -> None:
    assert key_of("Ｈello  World") == key_of("hello world")


def test_a_known_side_is_kept_and_a_new_near_duplicate_joins_it() -> None:
    for side in SHARES:
        places, bridges = place([LONG, LONG + " today"], {key_of(LONG): Assignment("feed", side)})
        assert not bridges
        assert places[1] == Assignment("feed", side)


def test_a_prompt_that_bridges_two_sides_is_quarantined_with_its_reason() -> None:
    words = LONG.split()
    left, right = " ".join(words[:-1]), " ".join(words[1:])
    known = {key_of(left): Assignment("a" * 16, "train"), key_of(right): Assignment("b" * 16, "test")}
    (first, second, bridge), bridges = place([left, right, LONG], known)
    reason = "its prompt nearly equals prompts in both the test and the train split"
    assert bridges == {key_of(LONG): reason}
    assert bridge is None and first and first.split == "train" and second and second.split == "test"


def test_splits_are_remembered_and_a_broken_line_is_named(tmp_path: Path) -> None:
    places = {"b" * 16: Assignment("c" * 16, "test"), "a" * 16: Assignment("a" * 16, "train")}
    write_splits(tmp_path / "splits.lock", places)
    assert read_splits(tmp_path / "splits.lock") == places
    with (tmp_path / "splits.lock").open("a") as file:
        file.write("x\ty\tnowhere\n")
    with pytest.raises(InputError, match=r"splits.lock:4: expected key, group and one of train, validation, test"):
        read_splits(tmp_path / "splits.lock")
