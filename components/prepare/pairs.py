"""Pairs whose better answer has a column of its own: `chosen` and `rejected`, each a text, a message or a dialogue."""

import unicodedata
from dataclasses import dataclass
from itertools import product
from typing import Any

from components.common.errors import RowError
from components.dataset.messages import Message, kind_of, messages_of, turn
from components.dataset.rendered import opens_rendered, parse_rendered, strip_ending
from components.prepare.columns import Columns
from components.prepare.prompts import EXPECTED, PROMPTS, expect_prompt, read_prompt


@dataclass(frozen=True)
class Example:
    """What a row becomes: a prompt and its answers, one for an instruction and two, the chosen one first, for a pair.

    `note` says what was taken for granted.
    """

    prompt: list[Message]
    answers: tuple[str, ...]
    note: str = ""


def read_pair(columns: Columns) -> list[Example]:
    """`chosen` and `rejected`, each a text, a message, a dialogue, or several of them."""
    chosen, rejected = columns.take("chosen"), columns.take("rejected")
    # H4's data repeat the chosen dialogue in a column of its own.
    repeated = [name for name in ("messages", "conversations") if name in columns and columns.peek(name) == chosen]
    for name in repeated:
        columns.take(name)
    has_prompt = any(name in columns for name in PROMPTS if name not in repeated)
    if isinstance(chosen, str) and isinstance(rejected, str) and not has_prompt:
        return [_implicit(columns, chosen, rejected)]
    prompt = read_prompt(columns, repeated)
    rendered = was_rendered(columns)
    pairs = []
    for good, bad in product(answers_of(chosen, "chosen"), answers_of(rejected, "rejected")):
        if isinstance(good, str) and isinstance(bad, str):
            expect_prompt(columns, prompt)
        pairs.append(pair_answers(prompt, good, bad, rendered))
    return pairs


def pair_answers(prompt: list[Message], chosen: Any, rejected: Any, rendered: bool) -> Example:
    """A pair of two answers, each a text or a dialogue.

    Args:
        prompt: the conversation before them, or empty if dialogues begin with it.
        chosen: the better answer.
        rejected: the worse answer.
        rendered: whether a template had rendered the prompt.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _pair_texts(prompt, chosen, rejected, rendered)
    return _pair_dialogues(prompt, _dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"))


def was_rendered(columns: Columns) -> bool:
    texts = [columns.peek(name) for name in PROMPTS]
    return any(isinstance(text, str) and parse_rendered(text) is not None for text in texts)


def _pair_texts(prompt: list[Message], chosen: str, rejected: str, rendered: bool) -> Example:
    """A pair whose answers are texts; answers to a rendered prompt lose the marker that ends them.

    Where both are dialogues, as in HH with a prompt of its own, the dialogues are taken.
    """
    dialogues = parse_rendered(chosen), parse_rendered(rejected)
    if dialogues[0] and dialogues[1] and len(dialogues[0]) > 1 and len(dialogues[1]) > 1:
        return _pair_dialogues(prompt, dialogues[0], dialogues[1])
    if rendered:
        chosen, rejected = strip_ending(chosen), strip_ending(rejected)
    return Example(prompt, (chosen.strip(), rejected.strip()))


def answers_of(value: Any, column: str) -> list[Any]:
    """The answers of a column: a text, a message or a dialogue each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [[value]]
    if not isinstance(value, list) or not value:
        raise RowError(f"'{column}' is {kind_of(value)}; expected text, messages, or a list of texts")
    is_several = any(all(isinstance(entry, kind) for entry in value) for kind in (str, list))
    return value if is_several else [value]


def _dialogue(answer: Any, column: str) -> list[Message]:
    return [turn("assistant", answer)] if isinstance(answer, str) else messages_of(answer, column)


def _pair_dialogues(context: list[Message], chosen: list[Message], rejected: list[Message]) -> Example:
    """A pair from two dialogues: their common beginning is the prompt, and each ends with one answer."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    ends = chosen[shared:], rejected[shared:]
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
        raise RowError("'chosen' and 'rejected' differ in more than one final message of the assistant")
    prompt = joined(context, chosen[:shared])
    if not prompt:
        raise RowError(f"{EXPECTED}, or dialogues that begin with it")
    return Example(prompt, (ends[0][0]["content"], ends[1][0]["content"]))


def joined(context: list[Message], beginning: list[Message]) -> list[Message]:
    """A prompt that stands before the dialogues, in them, or partly in both."""
    if not context or not beginning:
        return context or beginning
    start = next((i for i in range(len(beginning)) if _begins(beginning[i:], context)), None)
    if start is not None:
        return beginning
    if context[0]["role"] == "system" and _begins(beginning, context[1:]):
        return [context[0], *beginning]  # the system message in a column of its own
    if context[-1]["role"] != beginning[0]["role"] and beginning[0]["role"] != "system":
        return [*context, *beginning]
    raise RowError("the prompt's column and the dialogues hold different prompts; leave one of them out of the file")


def _begins(messages: list[Message], start: list[Message]) -> bool:
    return len(start) <= len(messages) and all(map(_same, start, messages))


def _same(first: Message, second: Message) -> bool:
    return first["role"] == second["role"] and first["content"].strip() == second["content"].strip()


def _implicit(columns: Columns, chosen: str, rejected: str) -> Example:
    """A pair without a prompt of its own: dialogues, or texts that begin with the same words."""
    before = read_prompt(columns)
    columns.check_left()
    dialogues = parse_rendered(chosen), parse_rendered(rejected)
    if dialogues[0] and dialogues[1]:
        return _pair_dialogues(before, dialogues[0], dialogues[1])
    if opens_rendered(chosen) or opens_rendered(rejected):
        raise RowError("'chosen' or 'rejected' begins like a rendered conversation but cannot be taken apart")
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if length is None:
        raise RowError(f"{EXPECTED}: one answer is the beginning of the other")
    while length and not _is_border(chosen[length - 1]):
        length -= 1
    prefix = chosen[:length].strip()
    if not prefix or not chosen[length:].strip() or not rejected[length:].strip():
        raise RowError(f"{EXPECTED}: 'chosen' and 'rejected' do not begin with the same whole words")
    return Example(
        [*before, turn("user", prefix)],
        (chosen[length:].strip(), rejected[length:].strip()),
        "the prompt is what both answers begin with, up to a whole word",
    )


def _is_border(character: str) -> bool:
    """Whether a word ends with this character: white space or punctuation."""
    return character.isspace() or unicodedata.category(character)[0] in "PZ"


def read_swift(columns: Columns) -> list[Example]:
    """ms-swift: the chosen answer ends `messages` or is the `response`; the rejected one has a column of its own."""
    rejected = answers_of(columns.take("rejected"), "rejected")
    name = next((name for name in ("messages", "conversations") if name in columns), None)
    if name is None:
        prompt, rendered = read_prompt(columns), was_rendered(columns)
        expect_prompt(columns, prompt)
        good = columns.text("response")
        return [pair_answers(prompt, good, bad, rendered) for bad in rejected]
    messages = messages_of(columns.take(name), columns.name(name))
    *prompt, last = messages or [turn("user", "")]
    if last["role"] != "assistant" or not prompt:
        raise RowError(f"'{columns.name(name)}' does not end with the answer of the assistant, which is the chosen one")
    before = joined(read_prompt(columns, (name,)), prompt)
    ends = [_dialogue(bad, "rejected") for bad in rejected]
    return [_pair_dialogues(before, messages, [*prompt, *end] if len(end) == 1 else end) for end in ends]
