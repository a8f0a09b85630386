"""`kubealign data show`: a row as its model reads it."""

import json
from typing import Any

from typer.testing import CliRunner

from components.dataset.records import iter_lines
from pipelines.cli import app
from tests.conftest import ROOT

PAIRS = ROOT / "data" / "preferences"


def show(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", "show", *words, "--project", str(ROOT)])


def test_the_predicted_tokens_are_the_answers_with_their_end() -> None:
    _, row = next(iter_lines(PAIRS / "train.jsonl"))
    found = json.loads(show("1", "--tokens", "--json").output)
    assert (found["id"], found["split"]) == (row["id"], "train")
    for answer in ("chosen", "rejected"):
        tokens = [token for token in found["tokens"] if token["part"] == answer]
        assert all(token["predicted"] for token in tokens) and tokens[-1]["text"] == "<|im_end|>"
        ascii_text = row[answer].encode("ascii", "ignore").decode().split()[0]
        assert ascii_text in "".join(token["text"] for token in tokens)
    prompt = [token for token in found["tokens"] if token["part"] == "prompt"]
    assert prompt and not any(token["predicted"] for token in prompt)
    assert "".join(token["text"] for token in prompt).endswith("assistant\n")


def test_a_row_is_found_by_its_id_in_any_split_and_shown_for_people() -> None:
    _, row = next(iter_lines(PAIRS / "test.jsonl"))
    shown = show(row["id"], "--tokens")
    assert shown.exit_code == 0 and "split: test" in shown.output and "'<|im_end|>'" in shown.output
    assert row["prompt"][-1]["content"].split()[0] in shown.output
    assert "token" not in show(row["id"]).output.splitlines()[-1]


def test_earlier_answers_are_predicted_where_they_are_trained(tmp_path: Any) -> None:
    rows = [raw for _, raw in iter_lines(ROOT / "data" / "instructions" / "train.jsonl")]
    several = next(raw for raw in rows if sum(turn["role"] == "assistant" for turn in raw["prompt"]))
    for turns, predicted in (("last", False), ("all", True)):
        words = (several["id"], "--instructions", "--tokens", "--json", "--set", f"sft.train_on_turns={turns}")
        tokens = json.loads(show(*words).output)["tokens"]
        assert any(token["predicted"] for token in tokens if token["part"] == "prompt") is predicted


def test_the_day_of_a_template_that_reads_the_clock_is_the_settings() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    template += "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    words = ("1", "--tokens", "--json", "--set", f"model.chat_template={json.dumps(template)}")
    for more, day in (((), "26 Jul 2024"), (("--set", "model.template_date=2025-01-31"), "31 Jan 2025")):
        tokens = json.loads(show(*words, *more).output)["tokens"]
        assert "".join(token["text"] for token in tokens).startswith(day)


def test_what_is_not_there_is_named() -> None:
    for words, why in (
        (("999999",), "0 rows of"),
        (("zz",), "0 rows of"),
        (("",), "expected one, by its number"),
        (("1", "--tokens", "--set", "model.base=s3://bucket/model"), "name one with --set model.base=FOLDER"),
    ):
        assert why in str(show(*words).exception)
