"""The prompt of a row: the conversation before the answer, from a closed list of columns."""

from collections.abc import Iterable
from typing import Any

from components.common.errors import RowError
from components.dataset.messages import Message, kind_of, message_of, messages_of, turn
from components.dataset.rendered import parse_literal, parse_rendered
from components.prepare.columns import Columns

PROMPTS = ("prompt", "question", "query", "instruction", "input", "messages", "conversations", "context")
"""Columns that hold the prompt, as text or as messages."""
EXPECTED = f"no prompt; expected one of {', '.join(PROMPTS)}"


def conversation_of(value: Any, column: str) -> list[Message]:
    """A prompt: messages, a rendered conversation, or the text of one user turn.

    Raises:
        RowError: as `messages_of`, or a value of another type.
    """
    if isinstance(value, list):
        return messages_of(value, column)
    if isinstance(value, dict):
        return [message_of(value, column)]
    if not isinstance(value, str):
        raise RowError(f"'{column}' is {kind_of(value)}; expected text or a list of messages")
    return parse_rendered(value) or [turn("user", value.strip())]


def read_prompt(columns: Columns, besides: Iterable[str] = ()) -> list[Message]:
    """The conversation before the answer: system, history, and the one column of `PROMPTS` that is there.

    Args:
        columns: the row.
        besides: columns of `PROMPTS` that the format uses for something else.

    Raises:
        RowError: two columns with different prompts, or a value that is none.
    """
    names = [name for name in PROMPTS if name in columns and name not in besides]
    if "context" in names and not isinstance(columns.peek("context"), list):
        names.remove("context")  # a document rather than a conversation; `check_left` names it
    if {"instruction", "input"} <= set(names):  # Alpaca: the second belongs to the first
        names = [name for name in names if name not in ("instruction", "input")]
        parts = [columns.text("instruction").strip(), columns.text("input").strip()]
        prompt = [turn("user", "\n\n".join(part for part in parts if part))]
    elif names:
        first = names.pop(0)
        prompt = conversation_of(columns.take(first), columns.name(first))
    else:
        prompt = []
    for name in names:
        if conversation_of(columns.take(name), columns.name(name)) != prompt:
            raise RowError(f"'{columns.name(name)}' holds another prompt besides; leave one of them out of the file")
    return [*_system(columns, prompt), *_history(columns), *prompt]


def expect_prompt(columns: Columns, prompt: list[Message]) -> None:
    """Refuse a row without a prompt, by the name of what may have been meant.

    Raises:
        RowError: the prompt is empty.
    """
    if not prompt:
        columns.check_left()
        raise RowError(EXPECTED)


def _system(columns: Columns, prompt: list[Message]) -> list[Message]:
    if "system" not in columns:
        return []
    system = [turn("system", columns.text("system"))]
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != system[0]["content"].strip():
            raise RowError(f"'{columns.name('system')}' and the first message are two different system messages")
        return []
    return system


def _history(columns: Columns) -> list[Message]:
    if "history" not in columns:
        return []
    name, value = columns.name("history"), columns.take("history")
    if isinstance(value, str):
        value = parse_literal(value)  # as a table holds it
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return messages_of(value, name)
    turns = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, list | tuple) or [type(text) for text in entry] != [str, str]:
            raise RowError(f"'{name}' is expected to be a list of question and answer")
        turns += [turn("user", entry[0]), turn("assistant", entry[1])]
    return turns
