"""Messages in the spellings of trainers and providers, read to `role` and `content`."""

from typing import Any

from components.common.errors import RowError
from components.dataset.records import shown

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "系统": "system",
    "用户": "user",
    "助手": "assistant",
}
"""Names of roles in lower case."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
MESSAGE_KEYS = frozenset(
    (*ROLE_KEYS, *CONTENT_KEYS, "name", "weight", "id", "index", "loss", "train", "masked", "model", "timestamp")
)
"""Keys of a message that are read, or say nothing of the conversation; any other that is not empty is an error."""


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
        raise RowError(f"'{column}' holds a message whose role is none of {', '.join(ROLES)}")
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
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            found = shown(str(part.get("type"))) if isinstance(part, dict) else kind_of(part)
            raise RowError(f"'{column}' holds a message with a part of type {found}; text alone is supported")
        texts.append(text)
    return "\n".join(texts)


def messages_of(value: Any, column: str) -> list[Message]:
    """Messages, without system messages that are empty.

    Raises:
        RowError: as `message_of`, or no list.
    """
    if not isinstance(value, list):
        raise RowError(f"'{column}' is {kind_of(value)}; expected a list of messages")
    messages = [message_of(entry, column) for entry in value]
    return [message for message in messages if message["role"] != "system" or message["content"].strip()]
