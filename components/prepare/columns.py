"""The columns of a row that somebody else wrote: each is read, known to be harmless, or named in an error.

A reader takes columns by name; what it did not take and what is not on the closed list `HARMLESS` may be context that
the pair would lose, and sets the row aside.
"""

import re
from collections.abc import Iterable
from typing import Any

from components.common.documents import JsonObject
from components.common.errors import RowError
from components.dataset.messages import is_empty, kind_of
from components.dataset.records import shown

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
    r"_*(?:.*_)?(?:ids?(?:_[a-z0-9])?|uid|idx|index|level_\d+|model|models|source|hash|tokens|length|len|count|date|time|logps?)_*"
)
SCORE_NAMES = re.compile(r"scores?|ratings?|rewards?|grades?|ranks?")
LOWER_IS_BETTER = re.compile(r"ranks?")


def canonical(name: str) -> str:
    """A column's name as the readers know it."""
    plain = re.sub(r"[\s\-.]+", "_", name.strip().lower())
    return ALIASES.get(plain, plain)


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
            if key in HARMLESS or HARMLESS_NAMES.fullmatch(key):
                continue
            name = self.name(key)
            raise RowError(
                f"'{name}' is not read and may be part of the conversation; leave the column out of the file, or say"
                f" that it is not: --ignore {name}"
            )


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
