"""Rows in the schemas of trainers become ours; worked out by hand, in both languages."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError, RowError
from components.dataset.language import guess_language
from components.dataset.records import read_lines
from components.prepare.convert import RowDefaults, convert_files
from components.prepare.formats import convert, detect

USER = {"role": "user", "content": "法国的首都是哪里？"}
PAIR = ([USER], "巴黎。", "里昂。")
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TURNS += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who?"}]
DIALOGUE = (TURNS, "A model.", "Nobody.")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def human(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


ROWS: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "ours": ("kubealign", {"prompt": [USER], "chosen": "巴黎。", "rejected": "里昂。"}, [PAIR]),
    "trl, text": ("trl", {"prompt": "法国的首都是哪里？", "chosen": " 巴黎。", "rejected": " 里昂。"}, [PAIR]),
    "trl, messages": (
        "trl",
        {"prompt": TURNS, "chosen": [said("assistant", "A model.")], "rejected": [said("assistant", "Nobody.")]},
        [DIALOGUE],
    ),
    "trl, prompt inside the messages": (
        "trl",
        {"chosen": [*TURNS, said("assistant", "A model.")], "rejected": [*TURNS, said("assistant", "Nobody.")]},
        [DIALOGUE],
    ),
    "trl, prompt inside the text": (
        "trl",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [([said("user", "The sky is")], "blue.", "green.")],
    ),
    "sharegpt": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [human("human", "Hi"), human("gpt", "Hello"), human("human", "Who?")],
            "chosen": human("gpt", "A model."),
            "rejected": human("gpt", "Nobody."),
        },
        [DIALOGUE],
    ),
    "alpaca": (
        "alpaca",
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "instruction": "Who?",
            "input": "",
            "chosen": "A model.",
            "rejected": "Nobody.",
        },
        [DIALOGUE],
    ),
    "hh": (
        "hh",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant: A model.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Who?\n\nAssistant: Nobody.",
        },
        [(TURNS[1:], "A model.", "Nobody.")],
    ),
    "ultrafeedback, scores": (
        "ultrafeedback",
        {
            "instruction": "法国的首都是哪里？",
            "completions": [
                {"response": "马赛。", "overall_score": 3},
                {"response": "巴黎。", "overall_score": 9.5},
                {"response": "里昂。", "overall_score": "2"},
            ],
        },
        [PAIR],
    ),
    "ultrafeedback, dialogues": (
        "ultrafeedback",
        {
            "prompt": "法国的首都是哪里？",
            "chosen": [USER, said("assistant", "巴黎。")],
            "rejected": [USER, said("assistant", "里昂。")],
        },
        [PAIR],
    ),
    "ultrafeedback, lists": (
        "ultrafeedback",
        {"instruction": "Who?", "chosen": ["A model."], "rejected": ["Nobody.", "You."]},
        [([said("user", "Who?")], "A model.", "Nobody."), ([said("user", "Who?")], "A model.", "You.")],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_recognised_and_converted(name: str) -> None:
    format_name, row, expected = ROWS[name]
    assert detect(row) == format_name
    assert convert(row, format_name) == expected


@pytest.mark.parametrize(
    ("format_name", "row", "reason"),
    [
        ("trl", {"prompt": "a", "chosen": "b"}, "no 'rejected'"),
        ("trl", {"prompt": "a", "chosen": 7, "rejected": "c"}, "'chosen' is a number; expected text"),
        ("trl", {"prompt": {"a": 1}, "chosen": "b", "rejected": "c"}, "'prompt' is an object; expected text"),
        ("trl", {"chosen": "yes", "rejected": "no"}, "do not begin with the same text"),
        ("trl", {"prompt": [], "chosen": [1], "rejected": []}, "'chosen' holds a number; expected messages"),
        (
            "trl",
            {
                "chosen": [USER, said("assistant", "a"), said("user", "b"), said("assistant", "c")],
                "rejected": [USER, said("assistant", "x")],
            },
            "more than one",
        ),
        ("sharegpt", {"conversations": [human("tool", "x")]}, "a message whose role is none of system, human"),
        (
            "sharegpt",
            {"conversations": [human("human", "x")], "chosen": human("human", "a"), "rejected": "b"},
            "'chosen' .* by the user; expected the assistant",
        ),
        ("alpaca", {"instruction": "x", "history": ["x"]}, "'history' is expected to be a list"),
        ("hh", {"chosen": "no marker", "rejected": "x"}, "'chosen' does not begin with `Human:`"),
        ("ultrafeedback", {"instruction": "x", "completions": 3}, "'completions' is a number; expected a list"),
        (
            "ultrafeedback",
            {"instruction": "x", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 1}]},
            "need at least two different scores",
        ),
        ("ultrafeedback", {"instruction": "x", "completions": [{"response": "a", "score": "N/A"}]}, "has no score"),
        ("ultrafeedback", {"instruction": "x", "completions": [{"response": "a", "score": "nan"}]}, "not finite"),
        ("ultrafeedback", {"instruction": "x", "chosen": [], "rejected": ["a"]}, "non-empty lists"),
    ],
)
def test_a_row_that_cannot_be_a_pair_says_why(format_name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert(row, format_name)


@pytest.mark.parametrize(
    ("text", "lang"),
    [("法国的首都是哪里？巴黎。", "zh"), ("What is 巴黎?", "en"), ("用 Python 写一个函数，打印列表", "zh"), ("", "en")],
)
def test_the_script_tells_the_language(text: str, lang: str) -> None:
    assert guess_language(text) == lang


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def facts(**changes: str) -> RowDefaults:
    return RowDefaults(**{"format": "", "language": "auto", "licence": "MIT", "source": "team"} | changes)


def converted(tmp_path: Path, *files: Path, **changes: str) -> Any:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return convert_files(list(files), facts(**changes), out, print)


GOOD = {"prompt": "Who?", "chosen": "A model.", "rejected": "Nobody."}


def test_every_row_is_either_a_pair_or_set_aside_with_where_and_why(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"chosen": " "}, {"prompt": "x"}, GOOD | {"lang": "fr"}, GOOD | {"lang": "Chinese"}]
    file = write(tmp_path / "team.jsonl", *rows)
    done, added = converted(tmp_path, file)
    pairs = read_lines(tmp_path / "out" / "pairs.jsonl")
    aside = read_lines(tmp_path / "out" / "quarantine.jsonl")
    assert (done.pairs, done.quarantined) == (len(pairs), len(aside)) == (2, 3) and added.rows == 2
    assert [entry["where"].rpartition(":")[2] for entry in aside] == ["2", "3", "4"]
    assert "no 'chosen'" in aside[1]["reason"] and aside[2]["reason"] == "its language is none of en, zh"
    assert [entry["row"] for entry in aside] == rows[1:4]
    assert [pair["lang"] for pair in pairs] == ["en", "zh"]
    assert {(pair["source"], pair["license"]) for pair in pairs} == {("team", "MIT")}


def test_what_a_row_says_of_itself_is_kept(tmp_path: Path) -> None:
    own = {"lang": "zh", "source": "web", "license": "CC0-1.0", "id": "x", "group": "y"}
    converted(tmp_path, write(tmp_path / "a.jsonl", GOOD | own))
    (pair,) = read_lines(tmp_path / "out" / "pairs.jsonl")
    assert pair == {"prompt": [said("user", "Who?")], "chosen": "A model.", "rejected": "Nobody."} | {
        "lang": "zh",
        "source": "web",
        "license": "CC0-1.0",
    }


def test_a_json_array_and_gzip_give_the_same_pairs_as_lines(tmp_path: Path) -> None:
    import gzip

    lines = write(tmp_path / "a.jsonl", GOOD, GOOD | {"chosen": "Me."})
    array = tmp_path / "b.json"
    array.write_text(json.dumps(read_lines(lines), indent=1))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    hashes = {converted(tmp_path, file)[1].sha256 for file in (lines, array, packed)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"question": "x", "answer": "y"}], {}, r"a.jsonl:1: unknown format \(columns: answer, question\)"),
        (
            [GOOD, {"instruction": "x", "chosen": "a", "rejected": "b"}],
            {},
            r"more than one format: alpaca \(.*a.jsonl:2\) and trl \(.*a.jsonl:1\); split the file",
        ),
        ([GOOD], {"licence": ""}, r"a.jsonl:1: the row names no licence; state the terms"),
        ([GOOD | {"chosen": 1}], {}, r"contains no preference pair; the first row is not usable: 'chosen' is a number"),
        ([], {}, r"a.jsonl: no rows; expected at least one"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_error(
    tmp_path: Path, rows: list[Any], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        converted(tmp_path, write(tmp_path / "a.jsonl", *rows), **changes)
