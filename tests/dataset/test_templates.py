"""Chat templates as models ship them: named lists, ends of turn, thoughts, no system role, SentencePiece's spaces.

The templates are written here after the published ones' structure.
"""

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError
from components.config.params import load_config
from components.dataset.chat import (
    choose_template,
    encode,
    encode_many,
    encode_prompt,
    end_of_answer,
    load_tokenizer,
    shipped_templates,
    with_beginning,
    with_date,
)
from components.dataset.records import Message
from tests.conftest import ROOT
from tests.support.dated_templates import DATED, LLAMA_3_1
from tests.support.llama2 import chinese_llama, pieces

__all__ = ["chinese_llama", "pieces"]

USER = Message(role="user", content="Why?")
SYSTEM = Message(role="system", content="Be brief.")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SILENT = GEMMA.replace("{{ raise_exception('System role not supported') }}", "{% set messages = messages[1:] %}")
R1 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{% else %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture
def spaced(chinese_llama: Path) -> Any:
    """A tokenizer of Llama 2's kind, which puts a space before every piece of text."""
    found = load_tokenizer(chinese_llama)
    found.chat_template = ZEPHYR
    return found


def both_ways(tokenizer: Any, prompt: list[Message], answer: str) -> tuple[list[int], list[int]]:
    """What `encode` gives, which `encode_many` gives too."""
    found = encode(tokenizer, prompt, answer)
    plain = [{"role": message.role, "content": message.content} for message in prompt]
    assert encode_many(tokenizer, [plain, plain], [[answer], [answer, answer]]) == [
        (found[0], [found[1]]),
        (found[0], [found[1], found[1]]),
    ]
    return found


def test_of_named_templates_the_default_is_taken() -> None:
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": ZEPHYR}]
    assert choose_template("model", named) == ZEPHYR
    with pytest.raises(InputError, match="the base model's chat templates are tool_use, none of them `default`"):
        choose_template("model", named[:1])
    with pytest.raises(InputError, match="unreadable"):
        choose_template("model", [[], 3])


def test_an_answer_ends_with_the_templates_own_end_of_turn(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_of_answer(tokenizer) == end != tokenizer.eos_token_id
    before, completion = both_ways(tokenizer, [USER], "Because.")
    assert tokenizer.decode(completion) == "Because.<end_of_turn>"
    assert tokenizer.decode(before).endswith("Why?<end_of_turn>\n<start_of_turn>model\n")
    tokenizer.chat_template = GEMMA.replace("<end_of_turn>", "")
    with pytest.raises(InputError, match="does not end an answer with"):
        encode(tokenizer, [USER], "Because.")


@pytest.mark.parametrize("template", [GEMMA, SILENT])
def test_a_system_message_is_never_dropped(tokenizer: Any, template: str) -> None:
    """Where the template refuses it or passes over it in silence, it begins the user's first message."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = template
    before, _ = both_ways(tokenizer, [SYSTEM, USER], "Because.")
    assert "<start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>" in tokenizer.decode(before)
    assert encode_prompt(tokenizer, [SYSTEM, USER]) == before


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("Because.", "\n</think>\n\nBecause."),
        ("<think>\nLight.\n</think>\n\nBecause.", "Light.\n</think>\n\nBecause."),
        ("Light.\n</think>\nBecause.", "Light.\n</think>\n\nBecause."),
    ],
)
def test_a_prompt_that_opens_a_thought_is_followed_by_it(tokenizer: Any, answer: str, trained: str) -> None:
    tokenizer.chat_template = R1
    before, completion = both_ways(tokenizer, [USER], answer)
    assert tokenizer.decode(before).endswith("<|Assistant|><think>\n")
    assert tokenizer.decode(completion) == trained + tokenizer.eos_token


def test_another_change_of_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = ZEPHYR.replace("<|assistant|>\n", "<|assistant|>\nAnswer: ")
    with pytest.raises(InputError, match="renders the prompt differently once an answer follows"):
        encode(tokenizer, [USER], "Because.")


def test_a_conversation_that_the_template_rejects_is_an_error_with_its_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + ZEPHYR
    with pytest.raises(InputError, match=r"rejects a conversation of user, assistant, user: too long"):
        encode_prompt(tokenizer, [USER, Message(role="assistant", content="x"), USER])


@pytest.mark.parametrize("answer", ["Sure, yes.", "好的", "Paris\nLondon"])
def test_tokens_are_those_of_the_rendered_whole(spaced: Any, answer: str) -> None:
    """SentencePiece would put a space that is not in the text before an answer tokenized apart."""
    before, completion = both_ways(spaced, [USER], answer)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    text = spaced.apply_chat_template(turns, tokenize=False)
    whole = spaced(text, add_special_tokens=False)["input_ids"]
    assert before + completion == whole[: len(before) + len(completion)]
    apart = spaced(answer + spaced.eos_token, add_special_tokens=False)["input_ids"]
    assert completion != apart, "tokenized apart it is another text"


def test_the_shipped_templates_begin_as_the_tokenizer_wants(spaced: Any, tokenizer: Any) -> None:
    for name in shipped_templates():
        template = with_beginning(choose_template(name, None), spaced)
        spaced.chat_template = template
        rendered = spaced.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert rendered.count(spaced.bos_token) == 1 and rendered.startswith(spaced.bos_token)
        assert with_beginning(choose_template(name, None), tokenizer) == choose_template(name, None)


def rendered(tokenizer: Any, template: str, **more: Any) -> str:
    tokenizer.chat_template = template
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, **more)
    return text


@pytest.mark.parametrize("name", DATED)
def test_a_template_renders_the_given_day_and_never_today(tokenizer: Any, name: str) -> None:
    template, style = DATED[name]
    day, today = date(2025, 1, 31), datetime.now().astimezone().strftime(style)
    own = rendered(tokenizer, template)
    usual = "26 Jul 2024" if name == "llama 3.1" else today
    assert usual in own
    fixed = with_date(template, day)
    assert rendered(tokenizer, fixed) == own.replace(usual, day.strftime(style)) != own
    assert rendered(tokenizer, with_date(fixed, day)) == rendered(tokenizer, fixed)
    if "date_string" in template:
        assert "1 May 2026" in rendered(tokenizer, fixed, date_string="1 May 2026"), "a caller may give another"


def test_the_shipped_day_is_llama_3s_own(tokenizer: Any) -> None:
    day = load_config(ROOT / "params.yaml").model.template_date
    assert rendered(tokenizer, with_date(LLAMA_3_1, day)) == rendered(tokenizer, LLAMA_3_1)


def test_a_template_without_a_date_stays_as_it_is() -> None:
    for template in (ZEPHYR, GEMMA, "{% if date_string is defined %}{{ date_string }}{% endif %}"):
        assert with_date(template, date(2025, 1, 31)) == template


@pytest.mark.parametrize("call", ["strftime_now(style)", "strftime_now('%d' + rest)", "strftime_now"])
def test_a_clock_that_cannot_be_stopped_is_refused(call: str) -> None:
    with pytest.raises(InputError, match=r"strftime_now.*model\.template_date"):
        with_date(f"{{% set style = '%d' %}}{{{{ {call} }}}}", date(2025, 1, 31))


def test_llama_2s_template_needs_no_beginning_token(tokenizer: Any) -> None:
    tokenizer.bos_token = None
    tokenizer.chat_template = choose_template("llama2", None)
    before, completion = both_ways(tokenizer, [SYSTEM, USER], "Because.")
    assert tokenizer.decode(before).startswith("[INST] <<SYS>>") and completion[-1] == tokenizer.eos_token_id
