"""Answers of many prompts at a time are those of one at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.dataset.chat import encode_prompt, end_of_answer, load_tokenizer
from components.dataset.records import Message, Preference
from components.engine.models import PackedModel, batch_matters, load_causal_lm, plain_attention, select_packing
from components.evaluate import answers
from components.tracking.run import NoOpRun
from tests.support.architectures import ARCHITECTURES, make_base

QUESTIONS = ("Why?", "Where is it, and how did it come there?", "Who?", "好的，为什么？", "When?")
NEW = 12


def rows() -> list[Preference]:
    facts = {"lang": "en", "source": "s", "license": "l", "chosen": "c", "rejected": "r"}
    return [
        Preference(id=f"{i:016x}", group=f"{i:016x}", prompt=[Message(role="user", content=question)], **facts)
        for i, question in enumerate(QUESTIONS)
    ]


def opened(name: str, tiny_model: Path, folder: Path) -> tuple[PackedModel, Any]:
    base = make_base(ARCHITECTURES[name], tiny_model, folder / name)
    model = PackedModel(load_causal_lm(base, "fp32"), "fp32")
    select_packing(model, 64)
    return model, load_tokenizer(base)


@torch.no_grad()
def alone(model: PackedModel, prompt: list[int], end: int) -> list[int]:
    """The greedy answer by plain forward passes over the whole sequence."""
    tokens = list(prompt)
    with plain_attention(model.causal_lm, "eager"):
        while len(tokens) < len(prompt) + NEW and tokens[len(prompt) :][-1:] != [end]:
            logits_TV = model.causal_lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            tokens.append(int(logits_TV[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "rwkv"])
def test_greedy_answers_do_not_depend_on_the_other_prompts(
    name: str, tiny_model: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = opened(name, tiny_model, tmp_path)
    made = answers.answer(NoOpRun("evaluate"), lambda: model, [name], tokenizer, rows(), NEW, 1, name)
    expected = [alone(model, encode_prompt(tokenizer, row.prompt), end_of_answer(tokenizer)) for row in rows()]
    assert [found.tokens for found in made.greedy] == expected
    matters = batch_matters(model, 2, 64)
    assert matters == (name == "rwkv")
    if matters:
        monkeypatch.setattr(answers, "batch_matters", lambda *args: False)
        other = answers.answer(NoOpRun("evaluate"), lambda: model, ["padded"], tokenizer, rows(), NEW, 1, name)
        assert [found.tokens for found in other.greedy] != expected, "padded it answers something else"


def test_prompts_are_answered_together_as_far_as_they_may() -> None:
    lengths = [9, 4, 9, 4, *[5] * 6]
    assert answers._batches(lengths, True) == [
        [1, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 17, 18, 19],
        [0, 2, 10, 12],
    ]
    assert answers._batches([9, 4], False) == [[1], [0], [3], [2]]


def test_positions_that_depend_on_the_longest_prompt_make_a_batch_matter(tiny_model: Path, tmp_path: Path) -> None:
    model, _ = opened("llama", tiny_model, tmp_path)
    model.causal_lm.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not batch_matters(model, 2, 128) and batch_matters(model, 2, 129)
