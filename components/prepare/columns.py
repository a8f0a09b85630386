"""The columns of a row that somebody else wrote: each is read, known to be harmless, or named in an error.

A reader takes columns by name; what it did not take and what is not on the closed list `HARMLESS` may be context that
the pair would lose, and sets the row aside.
"""

import re
from collections.abc import Iterable
from typing import Any

from components.common.documents import JsonObject
from components.common.errors import RowError
from components.dataset.records import shown
from components.dataset.rendered import parse_rendered

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
ALIASES = {
    "系统": "system",
    "系统提示": "system",
    "系统提示词": "system",
    "提示": "prompt",
    "提示词": "prompt",
    "问题": "question",
    "指令": "instruction",
    "输入": "input",
    "输出": "output",
    "历史": "history",
    "历史对话": "history",
    "对话": "conversations",
    "消息": "messages",
    "回答": "response",
    "回复": "response",
    "答案": "response",
    "选择": "chosen",
    "好的回答": "chosen",
    "优选回答": "chosen",
    "正例": "chosen",
    "拒绝": "rejected",
    "差的回答": "rejected",
    "拒绝回答": "rejected",
    "负例": "rejected",
    "语言": "lang",
    "来源": "source",
    "许可": "license",
    "system_prompt": "system",
    "system_message": "system",
    "prompt_messages": "prompt",
    "context_messages": "prompt",
    "user_prompt": "prompt",
    "conversation": "conversations",
    "dialogue": "conversations",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "response_chosen": "chosen",
    "response_rejected": "rejected",
    "chosen_answer": "chosen",
    "rejected_answer": "rejected",
    "chosen_messages": "chosen",
    "rejected_messages": "rejected",
    "preferred": "chosen",
    "dispreferred": "rejected",
    "response_j": "chosen",
    "response_k": "rejected",
    "answer": "response",
    "completion": "response",
    "licence": "license",
    "lang_code": "lang",
    "language": "lang",
}
"""Other names of columns, in lower case with underscores."""
PROMPTS = ("prompt", "question", "query", "instruction", "input", "messages", "conversations", "context")
"""Columns that hold the prompt, as text or as messages."""
HARMLESS = frozenset(
    [
        "annotations",
        "annotator",
        "annotators",
        "author",
        "batch",
        "category",
        "categories",
        "chosen_policy",
        "comment",
        "comments",
        "confidence",
        "correct",
        "created",
        "created_at",
        "critique",
        "dataset",
        "dataset_name",
        "date",
        "difficulty",
        "domain",
        "domains",
        "dpo_type",
        "evaluator",
        "feedback",
        "feedbacks",
        "file",
        "filename",
        "generations",
        "generator",
        "group",
        "hash",
        "index",
        "individual_preference",
        "instruction_source",
        "intent",
        "judge",
        "kind",
        "label_source",
        "labeller",
        "labelling_model",
        "labelling_prompt",
        "level",
        "license",
        "meta",
        "metadata",
        "model",
        "models",
        "name",
        "order",
        "origin",
        "original_chosen",
        "original_rejected",
        "preference_strength",
        "principle",
        "prompt_source",
        "quality",
        "rationale",
        "raw_labelling_response",
        "ratings",
        "reason",
        "rejected_policy",
        "revision",
        "sampled_policy",
        "score_reason",
        "sha256",
        "skill",
        "skills",
        "source",
        "split",
        "status",
        "subset",
        "subtask",
        "tag",
        "tags",
        "task",
        "task_name",
        "task_type",
        "time",
        "timestamp",
        "title",
        "topic",
        "topics",
        "type",
        "updated",
        "updated_at",
        "url",
        "urls",
        "user",
        "user_name",
        "uuid",
        "version",
        "correct_answers",
        "incorrect_answers",
    ]
)
"""Columns that say something of the row, not to the model. Other text that a reader does not take is an error."""
HARMLESS_NAMES = re.compile(
    r"(?:.*_)?(?:ids?(?:_[a-z0-9])?|uid|idx|index|level_\d+|model|models|source|hash|tokens|length|len|count|date|time|logps?)"
)
SCORE_NAMES = re.compile(r"scores?|ratings?|rewards?|grades?|ranks?")
LOWER_IS_BETTER = re.compile(r"ranks?")


def canonical(name: str) -> str:
    """A column's name as the readers know it."""
    plain = re.sub(r"[\s\-.]+", "_", name.strip().lower())
    return ALIASES.get(plain, plain)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, [None])


class Columns:
    """A row by canonical column names, which remembers what was taken.

    Args:
        row: the row as it was read.
        ignored: further columns that the user declared harmless.

    Raises:
        RowError: two columns with the same meaning differ.
    """

    def __init__(self, row: JsonObject, ignored: Iterable[str] = ()) -> None:
        self._values: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._taken: set[str] = set(ignored)
        for name, value in row.items():
            if name in self._taken or is_empty(value):
                continue
            key = canonical(name)
            if key in self._values and self._values[key] != value:
                raise RowError(f"'{self._names[key]}' and '{shown(name)}' are two names of one column, and differ")
            self._values[key], self._names[key] = value, shown(name)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def name(self, key: str) -> str:
        """The column's name in the file."""
        return self._names.get(key, key)

    def peek(self, key: str) -> Any:
        """A column's value, without taking it; None if it is empty."""
        return self._values.get(key)

    def take(self, key: str) -> Any:
        """A column's value.

        Raises:
            RowError: it is missing or empty.
        """
        if key not in self._values:
            raise RowError(f"no '{key}'")
        self._taken.add(key)
        return self._values[key]

    def take_if(self, key: str) -> Any:
        """A column's value; None if it is missing or empty."""
        return self.take(key) if key in self else None

    def first(self, *keys: str) -> str:
        """The first of these columns that is there.

        Raises:
            RowError: none is.
        """
        for key in keys:
            if key in self:
                return key
        raise RowError(f"no {' or '.join(repr(key) for key in keys)}")

    def text(self, key: str) -> str:
        """A column's text.

        Raises:
            RowError: it is missing or no text.
        """
        value = self.take(key)
        if not isinstance(value, str):
            raise RowError(f"'{self.name(key)}' is {kind_of(value)}; expected text")
        return value

    def numbers(self, pattern: "re.Pattern[str]") -> dict[str, float]:
        """The columns with finite numbers whose names match; they count as taken."""
        found = {}
        for key, value in self._values.items():
            if pattern.fullmatch(key) and isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = float(value)
                self._taken.add(key)
        return found

    def check_left(self) -> None:
        """Refuse a row of which something would be lost.

        Raises:
            RowError: a column that was not taken may be part of the conversation.
        """
        for key, value in self._values.items():
            if key in self._taken or isinstance(value, bool | int | float):
                continue
            if key in HARMLESS or HARMLESS_NAMES.fullmatch(key.strip("_")):
                continue
            name = self.name(key)
            raise RowError(
                f"'{name}' is not read and may be part of the conversation; leave the column out of the file, or say"
                f" that it is not: --ignore {name}"
            )


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
    if {"instruction", "input"} <= set(names):  # Alpaca: the second belongs to the first
        names.remove("input")
        columns.take("input")
        parts = [columns.text("instruction").strip(), columns.text("input").strip()]
        prompt = [turn("user", "\n\n".join(part for part in parts if part))]
        names.remove("instruction")
    elif names:
        first = names.pop(0)
        if first == "context" and not isinstance(columns.peek("context"), list):
            return []  # a document rather than a conversation; `check_left` names it
        prompt = conversation_of(columns.take(first), columns.name(first))
    else:
        prompt = []
    for name in names:
        if name == "context" and not isinstance(columns.peek(name), list):
            continue
        if conversation_of(columns.take(name), columns.name(name)) != prompt:
            raise RowError(f"'{columns.name(name)}' holds another prompt besides; leave one of them out of the file")
    return [*_system(columns, prompt), *_history(columns), *prompt]


def _system(columns: Columns, prompt: list[Message]) -> list[Message]:
    if "system" not in columns:
        return []
    system = [turn("system", columns.text("system"))]
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != system[0]["content"].strip():
            raise RowError(f"'{columns.name('system')}' and the first message are two different system messages")
        return []
    return system if system[0]["content"].strip() else []


def _history(columns: Columns) -> list[Message]:
    value = columns.take_if("history")
    if value is None:
        return []
    name = columns.name("history")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return messages_of(value, name)
    turns = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, list) or [type(text) for text in entry] != [str, str]:
            raise RowError(f"'{name}' is expected to be a list of question and answer")
        turns += [turn("user", entry[0]), turn("assistant", entry[1])]
    return turns


def check_scores(columns: Columns) -> None:
    """Compare the scores of the chosen and the rejected answer, where a row has them.

    Raises:
        RowError: they are equal, or the rejected one is better.
    """
    scores = columns.numbers(re.compile(rf".*(?:{SCORE_NAMES.pattern}).*"))
    for key, chosen in scores.items():
        other = key.replace("chosen", "rejected")
        if "chosen" not in key or other not in scores:
            continue
        rejected = scores[other]
        names = f"'{columns.name(key)}' and '{columns.name(other)}'"
        if chosen == rejected:
            raise RowError(f"a tie: {names} are equal")
        if (chosen < rejected) != (LOWER_IS_BETTER.search(key) is not None):
            raise RowError(f"the rejected answer has the better score of {names}")
