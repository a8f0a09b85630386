"""Chinese LLaMA-2's kind of model: a sentencepiece tokenizer without a template, given Llama 2's by `llama2`."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from components.common.files import write_manifest
from components.config.params import load_config
from components.dataset.chat import encode, encode_conversation, encode_prompt, load_tokenizer
from components.dataset.records import Instruction, Message, content_id, read_rows
from components.dpo.stage import run_dpo
from components.sft.stage import run_sft
from components.training.run import instruction_examples
from components.validate.stage import run_validate
from tests.conftest import ROOT
from tests.support.llama2 import BOS, EOS, chinese_llama, pieces
from tests.support.stages import rows

__all__ = ["chinese_llama", "pieces"]

SYSTEM = Message(role="system", content="请用中文回答，要有礼貌。")
FIRST = Message(role="user", content="中国的首都是哪里？")
ANSWER = Message(role="assistant", content="中国的首都是北京。")
SECOND = Message(role="user", content="And how many people live there?")
CONVERSATION = [SYSTEM, FIRST, ANSWER, SECOND]
LAST = "大约有 2200 万人，about 22 million."
TEXTS = {
    "chinese": "人工智能可以帮助人们。",
    "english": "Certainly, here it is.",
    "mixed": LAST,
    "lines": "第一行\n第二行  二",
    "rare": "生僻字：龘𠮷，以及😀",
    "letter": "a",
}


def turn(user: str, answer: str = "", system: str = "") -> str:
    """A turn as Meta's llama/generation.py writes it, without the ids of <s> and </s>."""
    before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {before}{user} [/INST]" + (f" {answer} " if answer else "")


@pytest.fixture(scope="module")
def tokenizer(chinese_llama: Path) -> Any:
    return load_tokenizer(chinese_llama)


def reference_ids(pieces: sentencepiece.SentencePieceProcessor, turns: Sequence[str]) -> list[int]:
    """Turns encoded as Meta's code does: each by itself, between <s> and </s>; the last is left open."""
    closed = [token for text in turns[:-1] for token in [BOS, *pieces.encode(text), EOS]]
    return [*closed, BOS, *pieces.encode(turns[-1])]


def test_the_text_is_llama_2s_own_format(tokenizer: Any) -> None:
    messages = [message.model_dump() for message in CONVERSATION]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<s>[INST] <<SYS>>\n请用中文回答，要有礼貌。\n<</SYS>>\n\n中国的首都是哪里？ [/INST] 中国的首都是北京。 </s>"
        "<s>[INST] And how many people live there? [/INST]"
    )
    messages = [FIRST.model_dump(), ANSWER.model_dump()]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<s>[INST] 中国的首都是哪里？ [/INST] 中国的首都是北京。 </s>"
    )


@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
def test_the_tokens_are_those_of_sentencepiece_with_metas_code(
    tokenizer: Any, pieces: sentencepiece.SentencePieceProcessor, answer: str
) -> None:
    turns = [turn(FIRST.content, ANSWER.content, SYSTEM.content), turn(SECOND.content)]
    prompt, completion = encode(tokenizer, CONVERSATION, answer)
    assert prompt == reference_ids(pieces, turns)
    assert prompt == encode_prompt(tokenizer, CONVERSATION)
    assert [*prompt, *completion] == [*reference_ids(pieces, [turns[0], turn(SECOND.content, answer)]), EOS]


@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
def test_an_answer_comes_back_from_its_tokens_and_ends_with_the_end_of_sequence(tokenizer: Any, answer: str) -> None:
    _, completion = encode(tokenizer, [FIRST], answer)
    assert tokenizer.eos_token_id == EOS
    assert completion[-1] == EOS and completion.count(EOS) == 1
    assert tokenizer.unk_token_id not in completion
    assert tokenizer.decode(completion, skip_special_tokens=True).strip() == answer


def test_the_range_of_the_first_answer_is_the_answer_with_its_end_of_sequence(tokenizer: Any) -> None:
    prompt, completion, ranges = encode_conversation(tokenizer, CONVERSATION, LAST)
    assert (prompt, completion) == encode(tokenizer, CONVERSATION, LAST)
    ((start, end),) = ranges
    before, first = encode(tokenizer, [SYSTEM, FIRST], ANSWER.content)
    assert prompt[:start] == before
    assert prompt[start:end] == first
    assert prompt[end - 1] == EOS and prompt[end] == BOS
    assert tokenizer.decode(prompt[start:end], skip_special_tokens=True).strip() == ANSWER.content


def test_the_tokenizer_that_full_fine_tuning_saves_gives_the_same_tokens(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert encode_conversation(again, CONVERSATION, LAST) == encode_conversation(tokenizer, CONVERSATION, LAST)


def in_two_turns(row: dict[str, Any]) -> dict[str, Any]:
    """An instruction with an earlier turn."""
    said = ("你好", "你好！Hello！") if row["lang"] == "zh" else ("hello", "Hello, what can I do for you?")
    earlier = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    prompt = [*earlier, *row["prompt"]]
    return row | {"prompt": prompt, "group": content_id(prompt), "id": content_id(prompt, row["response"])}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_sft_on_every_answer_and_dpo_train_it(chinese_llama: Path, tmp_path: Path, tuning: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(chinese_llama, base)
    write_manifest(base)
    for kind in ("preferences", "instructions"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            made = rows(split, kind)
            made = [in_two_turns(row) for row in made] if kind == "instructions" else made
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            (tmp_path / "data" / kind / f"{split}.jsonl").write_text(text, encoding="utf-8")
    sets = ["model.chat_template=llama2", "model.precision=fp32", "model.max_length=256", f"model.finetuning={tuning}"]
    sets += [
        "validate.min_rows=1",
        "sft.train_on_turns=all",
        "sft.max_steps=4",
        "sft.learning_rate=1e-2",
        "dpo.max_steps=4",
    ]
    sets += ["dpo.learning_rate=1e-2" if tuning == "lora" else "dpo.learning_rate=1e-3"]
    config = load_config(ROOT / "params.yaml", sets)
    clean = tmp_path / "clean"
    reports = (tmp_path / "v.html", tmp_path / "v.md")
    run_validate(config.validate_, config.model.max_length, tmp_path / "data", base, clean, *reports)
    instructions = read_rows(clean / "instructions" / "train.jsonl", Instruction)
    assert len(instructions) == 32
    assert all(len(e.answers) == 1 for e in instruction_examples(load_tokenizer(base), instructions, "every"))
    _, metrics = run_sft(config.sft, config.model, clean, base, tmp_path / "sft")
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    run_dpo(config.dpo, config.model, clean, base, tmp_path / "sft", tmp_path / "dpo")
    found = losses(tmp_path / "dpo")
    assert len(found) == 4
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    assert found[-1] < found[0]
    if tuning == "full":
        written = load_tokenizer(tmp_path / "dpo" / "model")
        expected = encode_conversation(load_tokenizer(base), CONVERSATION, LAST)
        assert encode_conversation(written, CONVERSATION, LAST) == expected


def test_the_names_of_special_tokens_in_a_message_stay_text(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    plain = [sum(id_ in special for id_ in ids) for ids in encode(tokenizer, [SYSTEM, FIRST], "x")]
    for name in ("<s>", "</s>", "<unk>"):
        for text in (name, f"a {name} b", f"{name}{name}", f"中文{name}中文"):
            ids = encode(tokenizer, [Message(role="user", content=text)], text)
            assert [sum(id_ in special for id_ in part) for part in ids] == plain, (name, text)
            # Behind such a name this tokenizer sees a space, as it does behind a real one.
            assert all(text.replace(" ", "") in tokenizer.decode(part).replace(" ", "") for part in ids)
