"""A prompt with one answer: to learn, or with a label."""

from components.common.errors import RowError
from components.dataset.messages import kind_of, messages_of, turn
from components.dataset.rendered import parse_rendered, strip_ending
from components.prepare.columns import Columns
from components.prepare.pairs import Example, joined, was_rendered
from components.prepare.prompts import conversation_of, expect_prompt, read_prompt


def read_unpaired(columns: Columns) -> list[Example]:
    """An answer with a thumb up or down."""
    raise RowError("unpaired feedback (an answer with a label) cannot be trained on yet; pairs can")


def read_instruction(columns: Columns) -> list[Example]:
    """A prompt and the answer to learn."""
    name = columns.first("response", "output")
    answer = columns.take(name)
    if (isinstance(answer, list) and answer and isinstance(answer[0], dict)) or isinstance(answer, dict):
        messages = messages_of(answer if isinstance(answer, list) else [answer], columns.name(name))
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise RowError(f"'{columns.name(name)}' is not one message of the assistant")
        answer = messages[0]["content"]
    if not isinstance(answer, str):
        raise RowError(f"'{columns.name(name)}' is {kind_of(answer)}; expected text")
    rendered = was_rendered(columns)
    prompt = read_prompt(columns)
    expect_prompt(columns, prompt)
    return [Example(prompt, (strip_ending(answer) if rendered else answer.strip(),))]


def read_conversation(columns: Columns) -> list[Example]:
    """A conversation that ends with the answer to learn."""
    name = columns.first("messages", "conversations", "text")
    if name == "text":
        messages = parse_rendered(columns.text(name)) or []
        if not messages:
            raise RowError("'text' is no conversation that a known template has rendered")
        before = read_prompt(columns)
    else:
        before = read_prompt(columns, (name,))
        messages = conversation_of(columns.take(name), columns.name(name))
    *prompt, last = messages or [turn("user", "")]
    if last["role"] != "assistant" or not prompt:
        raise RowError(f"'{columns.name(name)}' does not end with an answer of the assistant")
    return [Example(joined(before, prompt), (last["content"],))]
