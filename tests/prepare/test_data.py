"""Sources, splits, rows and chat templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.errors import InputError
from components.config.params import load_config
from components.dataset.chat import choose_template, encode, load_tokenizer
from components.dataset.records import Message, Preference, content_id, read_lines, read_rows
from components.dataset.similarity import prompt_key, prompt_text, sketch
from components.prepare.config import PrepareConfig
from components.prepare.sources import Package, Sources, read_sources, unpack
from components.prepare.split import Assignment, assign_prompts, read_splits, write_splits
from components.prepare.stage import prepare_data
from tests.conftest import ROOT
from tests.support.prompts import LONG

SHARES = {"train": 0.45, "validation": 0.15, "test": 0.40}


def pair(question: str, chosen: str = "yes", rejected: str = "no", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    row = {"id": content_id(messages, chosen, rejected), "group": content_id(messages), "prompt": messages}
    row |= {"lang": "en", "source": "test", "license": "Apache-2.0", "chosen": chosen, "rejected": rejected}
    return row | changes


# ---- sources


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    sources = read_sources(ROOT / "data" / "sources.lock")
    wrong = {name: package.model_copy(update={"sha256": "0" * 64}) for name, package in sources.packages.items()}
    with pytest.raises(InputError, match=r"llamafactory-0.9.5.tar.gz: cannot be downloaded.*(?i:hash)"):
        unpack(
            sources.model_copy(update={"packages": wrong}),
            sources.preferences["dpo_en_demo"],
            tmp_path,
            tmp_path / "out.json",
        )
    assert not (tmp_path / "out.json").exists()


def test_a_truncated_archive_and_a_changed_member_are_refused(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "pairs.json").write_text("[]")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pairs.json", "pairs.json")
    package = Package(version="1", file="x.tar.gz", sha256="0" * 64)
    member = {"package": "x", "member": "pairs.json", "sha256": "1" * 64, "license": "none"}
    raw = {
        "packages": {"x": package.model_dump()},
        "model": member,
        "preferences": {"p": member},
        "instructions": {},
        "added": {},
    }
    sources = Sources.model_validate(raw)
    with pytest.raises(InputError, match=r"pairs.json of x.tar.gz: sha256 is 4f53cda18c2b.*expected 1111"):
        unpack(sources, sources.model, tmp_path, tmp_path / "out.json")
    content = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"x.tar.gz: cannot unpack pairs.json"):
        unpack(sources, sources.model, tmp_path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_an_unknown_source_names_the_known_ones(tmp_path: Path) -> None:
    shutil.copy(ROOT / "data" / "sources.lock", tmp_path)
    config = load_config(ROOT / "params.yaml").prepare
    with pytest.raises(InputError, match="prepare.preferences: nothing is not in .* expected dpo_en_demo, dpo_zh_demo"):
        prepare_data(PrepareConfig(**config.model_dump() | {"preferences": ["nothing"]}), tmp_path)


def test_both_languages_are_on_every_side_and_no_group_is_on_two() -> None:
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        rows = read_lines(ROOT / "data" / "preferences" / f"{split}.jsonl")
        assert {row["lang"] for row in rows} == {"en", "zh"}
        sides[split] = {row["group"] for row in rows}
        instructions = read_lines(ROOT / "data" / "instructions" / f"{split}.jsonl")
        assert {row["group"] for row in instructions} <= sides[split], "SFT sees no prompt of another side"
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["validation"]


# ---- splits


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


# ---- rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows.jsonl:2: not valid JSON"),
        (b"[1]\n", r"rows.jsonl:1: expected a JSON object, found list"),
        (b"\n\n", r"rows.jsonl: no rows"),
        (b'{"a": "\xff"}', r"rows.jsonl:1: not UTF-8 at byte 7"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / "rows.jsonl")


def test_a_row_of_another_schema_is_named_without_its_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair("secret words", rejected=" ")) + "\n")
    with pytest.raises(InputError, match=r"row 1: 'rejected'") as error:
        read_rows(tmp_path / "rows.jsonl", Preference)
    assert "secret" not in str(error.value)


# ---- chat templates


def test_chinese_round_trips_and_the_answer_ends_with_the_end_of_sequence(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    prompt = [Message(role="system", content="你是助手。"), Message(role="user", content="法国的首都是哪里？")]
    before, completion = encode(tokenizer, prompt, "巴黎是法国的首都。🗼")
    assert completion[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in completion[:-1]
    assert tokenizer.decode(completion[:-1]) == "巴黎是法国的首都。🗼"
    assert tokenizer.decode(before).endswith("法国的首都是哪里？<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_the_shipped_templates_encode_many_turns(tiny_model: Path, name: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = choose_template(name, None)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who are you?")]
    prompt = [Message.model_validate({"role": role, "content": content}) for role, content in turns]
    before, completion = encode(tokenizer, prompt, "A model.")
    text = tokenizer.decode(before)
    assert tokenizer.decode(completion).strip() == f"A model.{'' if name == 'chatml' else ' '}{tokenizer.eos_token}"
    expected = {
        "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        "llama2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello <|im_end|>",
    }
    assert expected[name] in text


def test_no_template_is_guessed() -> None:
    with pytest.raises(InputError, match="has no chat template; set model.template to chatml, llama2 or a Jinja file"):
        choose_template("model", None)
    with pytest.raises(InputError, match="model.template=chatlm: neither `model`, chatml, llama2, nor a file"):
        choose_template("chatlm", "own")


# ---- the lock file


def test_sources_lock_pins_every_package_and_file_by_hash() -> None:
    raw = yaml.safe_load((ROOT / "data" / "sources.lock").read_text())
    sources = read_sources(ROOT / "data" / "sources.lock")
    assert {member.package for member in [sources.model, *sources.preferences.values()]} <= set(raw["packages"])
