"""Messages in the spellings of trainers and providers, read to `role` and `content`."""

from typing import Any

from components.common.errors import RowError
from components.common.foreign import shown

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "instruction": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "response": "assistant",
    "系统": "system",
    "用户": "user",
    "人类": "user",
    "问": "user",
    "助手": "assistant",
    "答": "assistant",
}
"""Names of roles in lower case."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
MESSAGE_KEYS = frozenset(
    [
        *(*ROLE_KEYS, *CONTENT_KEYS, "name", "id", "index", "model", "timestamp"),
        *("weight", "loss", "loss_scale", "loss_weight", "train", "masked", "tokens", "num_tokens"),
    ]
)
"""Keys of a message that are read, or say nothing of the conversation; any other that is not empty is an error."""
EXCHANGES = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("user", "bot"),
    ("input", "output"),
    ("instruction", "output"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
)
"""Keys of an object that holds what the user and the assistant said, of which a list is a conversation."""


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, [None])


def kind_of(value: Any) -> str:
    """A JSON value's type, for a message."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else "null")


def turn(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


def message_of(value: Any, column: str) -> Message:
    """A message in one of the common spellings.

    Raises:
        RowError: no message, an unknown role, or content other than text.
    """
    if not isinstance(value, dict):
        raise RowError(
            f"'{column}' holds {kind_of(value)}; expected messages with role and content (or from and value)"
        )
    role = next((value[key] for key in ROLE_KEYS if key in value), None)
    content = next((value[key] for key in CONTENT_KEYS if key in value), None)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        found = f"the role {shown(role)!r}" if isinstance(role, str) else "no role"
        raise RowError(f"'{column}' holds a message with {found}; expected system, user or assistant")
    for key, other in value.items():
        if key not in MESSAGE_KEYS and other is not False and not is_empty(other):
            raise RowError(
                f"'{column}' holds a message with '{shown(str(key))}', which is not supported; text alone is"
            )
    return turn(known, _content(content, column))


def _content(content: Any, column: str) -> str:
    """The text of a message; parts of type text are joined, as the OpenAI API writes them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"'{column}' holds a message whose content is {kind_of(content)}; expected text")
    return "\n".join(_part(part, column) for part in content)


def _part(part: Any, column: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
    text = part.get("text", part.get("value")) if isinstance(part, dict) else None
    if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
        raise RowError(f"'{column}' holds a message with a part of type {shown(str(kind))}; text alone is supported")
    return text


def messages_of(value: Any, column: str) -> list[Message]:
    """Messages, without system messages that are empty; an object of a question and its answer is two of them.

    Raises:
        RowError: as `message_of`, or no list.
    """
    if not isinstance(value, list):
        raise RowError(f"'{column}' is {kind_of(value)}; expected a list of messages")
    messages = [message for entry in value for message in _exchange(entry, column) or [message_of(entry, column)]]
    return [message for message in messages if message["role"] != "system" or message["content"].strip()]


def _exchange(entry: Any, column: str) -> list[Message]:
    """What the user and the assistant said, from one object; empty if it is none such.

    An answer that is missing is yet to come.
    """
    if not isinstance(entry, dict) or any(key in entry for key in ROLE_KEYS):
        return []
    for asks, answers in EXCHANGES:
        if asks in entry and entry.keys() <= {asks, answers, "system"}:
            said = [("system", entry.get("system")), ("user", entry[asks]), ("assistant", entry.get(answers))]
            return [turn(role, _content(text, column)) for role, text in said if not is_empty(text)]
    return []
