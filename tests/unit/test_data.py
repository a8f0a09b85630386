"""Sources, splits, rows, chat templates and validation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.chat import choose_template, encode, load_tokenizer
from components.common.config import PrepareConfig, ValidateConfig, load_config
from components.common.errors import DataStop, InputError, KubealignError
from components.common.records import Message, Preference, content_id, read_lines, read_rows
from components.prepare.sources import Package, Sources, read_sources, unpack
from components.prepare.split import Place, make_prompt, place_prompts, read_splits, write_splits
from components.prepare.stage import prepare_data
from components.validate import checks
from components.validate.stage import run_validate
from tests.conftest import ROOT

SHARES = {"train": 0.45, "validation": 0.15, "test": 0.40}
LONG = "please write a short story about a lighthouse keeper who finds a message in a bottle on the northern shore"


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
    raw = {"packages": {"x": package.model_dump()}, "model": member, "preferences": {"p": member}, "instructions": {}}
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


def prompts(*texts: str, lang: str = "en") -> list[Any]:
    return [make_prompt([{"role": "user", "content": text}], lang) for text in texts]


def test_the_order_of_the_rows_does_not_matter() -> None:
    some = prompts(*(f"question number {i} about {LONG[i : i + 40]}" for i in range(40)))
    assert place_prompts(some, {}, SHARES, 0.8) == place_prompts(some[::-1], {}, SHARES, 0.8)


def test_near_duplicates_are_one_group_in_both_languages() -> None:
    english = prompts(LONG, LONG + " today", "something else entirely, with other words in it")
    places, _ = place_prompts(english, {}, SHARES, 0.8)
    assert places[english[0].key].group == places[english[1].key].group != places[english[2].key].group
    text = "请写一篇关于灯塔看守人在北方海岸发现瓶中信的短篇小说并描述他的心情"
    chinese = prompts(text, text + "吧", "完全不同的另一个问题，关于天气和旅行", lang="zh")
    places, _ = place_prompts(chinese, {}, SHARES, 0.8)
    assert places[chinese[0].key].group == places[chinese[1].key].group != places[chinese[2].key].group


def test_white_space_case_and_width_make_no_new_prompt() -> None:
    first, second = prompts("Ｈello  World", "hello world")
    assert first.key == second.key


def test_a_known_side_is_kept_and_a_new_near_duplicate_joins_it() -> None:
    old, new = prompts(LONG, LONG + " today")
    for side in SHARES:
        places, bridges = place_prompts([old, new], {old.key: Place("feed", side)}, SHARES, 0.8)
        assert not bridges
        assert places[new.key] == Place("feed", side)


def test_a_prompt_that_bridges_two_sides_is_quarantined_with_its_reason() -> None:
    words = LONG.split()
    left, right = " ".join(words[:-1]), " ".join(words[1:])
    first, second, bridge = prompts(left, right, LONG)
    known = {first.key: Place("a" * 16, "train"), second.key: Place("b" * 16, "test")}
    places, bridges = place_prompts([first, second, bridge], known, SHARES, 0.8)
    assert bridges == {bridge.key: "its prompt is nearly the same as prompts on both the test and the train side"}
    assert bridge.key not in places and places[first.key].side == "train" and places[second.key].side == "test"


def test_splits_are_remembered_and_a_broken_line_is_named(tmp_path: Path) -> None:
    places = {"b" * 16: Place("c" * 16, "test"), "a" * 16: Place("a" * 16, "train")}
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
        (b'{"a": "\xff"}', r"rows.jsonl: not UTF-8 at byte 7"),
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


# ---- validation

GOOD = [pair(f"question {i}", f"a good answer {i}", f"a bad answer {i}") for i in range(12)]
DEFECTS = {
    "schema": pair("no licence", license=""),
    "turns": pair("x", prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    "repeated": GOOD[0],
    "language": pair("which language", lang="fr"),
    "chosen_characters": pair("broken", chosen="caf\ufffd"),
    "same_answer": pair("same", chosen="the  same\tthing", rejected="the same thing"),
    "too_long": pair("long", chosen="word " * 400),
}


def validate(folder: Path, base: Path, rows: list[dict[str, Any]], share: float = 0.9) -> dict[str, Any]:
    model = load_config(ROOT / "params.yaml", ["model.max_length=256"]).model
    for name in ("preferences", "instructions"):
        (folder / "in" / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation", "test"):
            found = (
                [dict(row) for row in rows]
                if split == "train" and name == "preferences"
                else [pair(f"{split} {name} {i}") for i in range(2)]
            )
            if name == "instructions":
                found = [
                    {k: v for k, v in row.items() if k not in ("chosen", "rejected")} | {"response": "yes"}
                    for row in found
                ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (folder / "in" / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    config = ValidateConfig(max_quarantined=share, min_rows=1)
    out = folder / "out"
    run_validate(config, model, folder / "in", base, out, folder / "report.html", folder / "report.md")
    return {"summary": json.loads((out / "validation.json").read_text()), "out": out}


def test_every_defect_is_found_with_its_reason_and_the_counts_add_up(tiny_model: Path, tmp_path: Path) -> None:
    found = validate(tmp_path, tiny_model, [*GOOD, *DEFECTS.values()])
    quarantine = [json.loads(line) for line in (found["out"] / "quarantine.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (found["out"] / "dropped.jsonl").read_text().splitlines()]
    reasons = sorted(reason for entry in quarantine for reason in entry["reasons"])
    assert reasons == sorted(["schema", "turns", "repeated", "language", "schema", "chosen_characters", "same_answer"])
    assert [entry["reasons"] for entry in dropped] == [["too_long"]]
    summary = found["summary"]["preferences"]
    assert (summary["rows"], summary["clean"], summary["quarantined"], summary["dropped"]) == (23, 16, 6, 1)
    clean = sum(
        len(read_lines(found["out"] / "preferences" / f"{split}.jsonl")) for split in ("train", "validation", "test")
    )
    assert summary["rows"] == clean + len(quarantine) + len(dropped)
    page = (tmp_path / "report.html").read_text()
    assert "same_answer" in page and "http" not in page.split("</style>")[1]


@pytest.mark.parametrize("defect", ["turns", "repeated", "chosen_characters", "same_answer", "too_long"])
def test_a_check_that_is_switched_off_misses_its_defect(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    real = checks.suite

    def without(*arguments: Any) -> list[checks.Check]:
        # A check that nothing fails takes the place of the one that is switched off.
        harmless = {"column": "number", "max_value": 10**9}
        return [
            checks.Check(c.name, c.severity, "ExpectColumnValuesToBeBetween", harmless, "") if c.name == defect else c
            for c in real(*arguments)
        ]

    monkeypatch.setattr("components.validate.stage.suite", without)
    summary = validate(tmp_path, tiny_model, [*GOOD, DEFECTS[defect]])["summary"]["preferences"]
    assert summary["quarantined"] == summary["dropped"] == 0


def test_a_group_on_two_sides_is_a_leak(tiny_model: Path, tmp_path: Path) -> None:
    leak = pair("test preferences 0", chosen="another yes")
    found = validate(tmp_path, tiny_model, [*GOOD, leak])
    entry = json.loads((found["out"] / "quarantine.jsonl").read_text())
    assert entry["reasons"] == ["split_leak"] and entry["split"] == "train"


def test_an_instruction_of_a_held_out_prompt_is_a_leak(tiny_model: Path, tmp_path: Path) -> None:
    held_out = pair("train instructions 0")  # its prompt is a training instruction in `validate`
    validate(tmp_path, tiny_model, GOOD)
    (tmp_path / "in" / "preferences" / "test.jsonl").write_text(json.dumps(held_out) + "\n")
    model = load_config(ROOT / "params.yaml", ["model.max_length=256"]).model
    reports = (tmp_path / "report.html", tmp_path / "report.md")
    config = ValidateConfig(max_quarantined=0.9, min_rows=1)
    run_validate(config, model, tmp_path / "in", tiny_model, tmp_path / "again", *reports)
    entry = json.loads((tmp_path / "again" / "quarantine.jsonl").read_text())
    assert entry["data_set"] == "instructions" and entry["reasons"] == ["split_leak"]


def test_too_many_bad_rows_stop_the_run_and_say_why(tiny_model: Path, tmp_path: Path) -> None:
    bad = [pair(f"same {i}", "equal", "equal") for i in range(6)]
    with pytest.raises(DataStop, match=r"preferences: 6 of 22 rows are bad \(27.3%.*most fail `same_answer` \(6\)"):
        validate(tmp_path, tiny_model, [*GOOD, *bad], share=0.2)
    assert "same_answer" in (tmp_path / "report.html").read_text(), "the report is written before the run stops"


def test_an_engine_error_is_not_reported_as_bad_data() -> None:
    table = checks.make_table([GOOD[0]], ["train"], Preference, [5], {GOOD[0]["group"]: {"train"}})
    broken = checks.Check("broken", "error", "ExpectColumnValuesToBeNull", {"column": "no_such_column"}, "")
    with pytest.raises(KubealignError, match="check broken could not be evaluated"):
        checks.run_suite(table, [broken])


def test_sources_lock_pins_every_package_and_file_by_hash() -> None:
    raw = yaml.safe_load((ROOT / "data" / "sources.lock").read_text())
    sources = read_sources(ROOT / "data" / "sources.lock")
    assert {member.package for member in [sources.model, *sources.preferences.values()]} <= set(raw["packages"])
