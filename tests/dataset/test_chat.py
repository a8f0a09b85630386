"""Chat templates and tokens."""

from pathlib import Path

import pytest

from components.common.errors import InputError
from components.dataset.chat import choose_template, encode, load_tokenizer
from components.dataset.records import Message


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
    with pytest.raises(InputError, match="set model.chat_template to chatml, llama2 or a Jinja file"):
        choose_template("model", None)
    with pytest.raises(InputError, match="model.chat_template=chatlm: neither `model`, chatml, llama2, nor a file"):
        choose_template("chatlm", "own")
