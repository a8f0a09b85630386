"""The columns of a row that somebody else wrote: each is read, known to be harmless, or named in an error.

A reader takes columns by name; what it did not take and what is not on the closed list `HARMLESS` may be context that
the pair would lose, and sets the row aside.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from components.common.documents import JsonObject
from components.common.errors import RowError
from components.common.foreign import shown
from components.dataset.messages import is_empty, kind_of

ALIASES = {
    "系统": "system",
    "系统提示": "system",
    "系统提示词": "system",
    "提示": "prompt",
    "提示词": "prompt",
    "问题": "question",
    "提问": "question",
    "用户问题": "question",
    "用户提问": "question",
    "用户输入": "question",
    "题目": "question",
    "指令": "instruction",
    "输入": "input",
    "输出": "output",
    "历史": "history",
    "历史对话": "history",
    "对话历史": "history",
    "对话": "conversations",
    "消息": "messages",
    "回答": "response",
    "回复": "response",
    "答案": "response",
    "选择": "chosen",
    "正例": "chosen",
    "拒绝": "rejected",
    "负例": "rejected",
    "语言": "lang",
    "来源": "source",
    "许可": "license",
    "评分": "score",
    "更好": "better",
    "胜者": "winner",
    "获胜": "winner",
    "偏好": "preference",
    "编号": "id",
    "序号": "id",
    "类别": "category",
    "分类": "category",
    "领域": "domain",
    "备注": "comment",
    "系統": "system",
    "系統提示": "system",
    "問題": "question",
    "提問": "question",
    "輸入": "input",
    "輸出": "output",
    "歷史": "history",
    "對話": "conversations",
    "選擇": "chosen",
    "拒絕": "rejected",
    "回覆": "response",
    "語言": "lang",
    "來源": "source",
    "system_prompt": "system",
    "system_message": "system",
    "prompt_messages": "prompt",
    "context_messages": "prompt",
    "user_prompt": "prompt",
    "user_query": "prompt",
    "user_input": "prompt",
    "user_message": "prompt",
    "user_question": "prompt",
    "problem": "prompt",
    "conversation": "conversations",
    "dialogue": "conversations",
    "dialog": "conversations",
    "preferred": "chosen",
    "dispreferred": "rejected",
    "response_j": "chosen",
    "response_k": "rejected",
    "pos_resp": "chosen",
    "neg_resp": "rejected",
    "answer": "response",
    "completion": "response",
    "licence": "license",
    "lang_code": "lang",
    "language": "lang",
}
"""Other names of columns, in lower case with underscores."""
_ANSWER = "response|answer|completion|output|text|reply|messages?|conversations?|dialogue|generation"
_BETTER, _WORSE = "chosen|preferred|better|accepted|winning", "rejected|dispreferred|non_preferred|worse|losing"
_GOOD = (
    "较好|更好|最好|好|较优|更优|最优|优质|优选|首选|优|选中|被选|选择|接受|被接受|采纳|偏好|正确|正|選中|被選|選擇|優"
)
_BAD = "较差|更差|最差|差|坏|不好|较劣|劣质|劣|拒绝|被拒绝|被拒|未选中|未采纳|非偏好|错误|负|被拒絕|拒絕|壞|錯誤|負"
_REPLY = "回答|回复|答案|答复|输出|响应|样本|结果|内容|回應|回覆|輸出"
ANSWER_NAMES = (
    (
        re.compile(rf"(?:{_BETTER})_(?:{_ANSWER})|(?:{_ANSWER})_(?:{_BETTER})|(?:{_GOOD})的?(?:{_REPLY})|接受|选中"),
        "chosen",
    ),
    (
        re.compile(rf"(?:{_WORSE})_(?:{_ANSWER})|(?:{_ANSWER})_(?:{_WORSE})|(?:{_BAD})的?(?:{_REPLY})|未选中"),
        "rejected",
    ),
)
"""Names of the better and of the worse answer, in two parts."""
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
        "topic",
        "topics",
        "type",
        "updated",
        "updated_at",
        "url",
        "urls",
        "user_name",
        "uuid",
        "version",
        "correct_answers",
        "incorrect_answers",
        "channel",
        "rationales",
        "rationales_for_ratings",
        "preference_statement",
        "preference_elaboration",
        "three_most_similar_preferences",
        "all_preferences_unprocessed",
        "judge_response",
    ]
)
"""Columns that say something of the row, not to the model. Other text that a reader does not take is an error."""
HARMLESS_NAMES = re.compile(
    r"_*(?:.*_)?(?:ids?|u?uid|idx|index|level|models?|model_names?|sources?|hash|sha256|md5|policy|types?|categor(?:y|ies)"
    r"|metadata|moderation|tags?|tokens|length|len|count|date|time|tstamp|timestamp|logps?)(?:_[a-z0-9])*_*"
)
TIES = (
    *("tie", "tied", "ties", "equal", "same", "draw", "both", "neither", "none", "no preference"),
    *("tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad", "both_good", "both good"),
    *("平局", "平手", "相同", "一样", "一樣"),
)
SIGNED = ("overall_preference", "preference_strength")
"""Verdicts of HelpSteer: below zero for the first answer, above zero for the second."""
VERDICTS = ("winner", "preference", "verdict", "choice", "better", "label", "status", "result")
"""Columns that may say, in words, which answer is better."""
RATINGS = ("ratings", "rating", "scores", "score", "rewards", "reward")
SCORE_NAMES = re.compile(r"scores?|ratings?|rewards?|grades?|ranks?")
LOWER_IS_BETTER = re.compile(r"ranks?")


@lru_cache(maxsize=4096)
def canonical(name: str) -> str:
    """A column's name as the readers know it: wide, accented, camel-case and hyphenated spellings are one."""
    spaced = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", unicodedata.normalize("NFKC", name).strip("\ufeff \t\r\n"))
    plain = re.sub(r"[\s\-.]+", "_", spaced.lower())
    return ALIASES.get(plain) or next((key for pattern, key in ANSWER_NAMES if pattern.fullmatch(plain)), plain)


@lru_cache(maxsize=1024)
def _shown_name(name: str) -> str:
    """A column's name for a message: a file has few, and every row asks for them."""
    return shown(name)


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
                raise RowError(f"'{self.name(key)}' and '{_shown_name(name)}' are two names of one column, and differ")
            self._values[key], self._names[key] = value, name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def name(self, key: str) -> str:
        """The column's name in the file."""
        return _shown_name(self._names.get(key, key))

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
            number = number_in(value) if pattern.fullmatch(key) else None
            if number is not None:
                found[key] = number
                self._taken.add(key)
        return found

    def check_left(self) -> None:
        """Refuse a row of which something would be lost.

        Raises:
            RowError: a column that was not taken may be part of the conversation.
        """
        taken = [value for key, value in self._values.items() if key in self._taken]
        left = [
            self.name(key)
            for key, value in self._values.items()
            if key not in self._taken and not is_harmless(key, value) and value not in taken
        ]
        if left:
            names = " and ".join(f"'{name}'" for name in left)
            raise RowError(
                f"{names} {'is' if len(left) == 1 else 'are'} not read and may be part of the conversation; leave what"
                f" is not out of the file, or say so: {' '.join(f'--ignore {name}' for name in left)}"
            )


def is_harmless(key: str, value: Any) -> bool:
    """Whether a column, by its canonical name and its value, says nothing to the model."""
    return key in HARMLESS or HARMLESS_NAMES.fullmatch(key) is not None or _is_wordless(value)


def _is_wordless(value: Any) -> bool:
    """Whether a value has no words in it: numbers, also as text, as tables have them."""
    if isinstance(value, str):
        return number_in(value) is not None or value.strip().lower() in ("", "true", "false", "[]", "{}")
    return all(map(_is_wordless, value)) if isinstance(value, list) else not value or not isinstance(value, dict)


def number_in(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_verdict(columns: Columns) -> None:
    """Compare what says which of the chosen and the rejected answer is better, where a row has it.

    Raises:
        RowError: neither is, or the rejected one.
    """
    for key in VERDICTS:
        value = columns.peek(key)
        if isinstance(value, str) and value.strip().lower() in TIES:
            raise RowError(f"a tie: '{columns.name(key)}' says {shown(value)!r}")
    if any(columns.peek(key) in (True, "true", "True") for key in ("tie", "is_tie", "tied")):
        raise RowError("a tie, as the row says")
    for key in SIGNED:
        if number_in(columns.peek(key)) == 0:
            raise RowError(f"a tie: '{columns.name(key)}' is 0")
    if (margin := number_in(columns.peek("margin"))) is not None and margin <= 0:
        raise RowError(f"'margin' is {margin:g}: the chosen answer is not better")
    for key in RATINGS:
        value = columns.peek(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1] and number_in(value[0]) is not None:
            raise RowError(f"a tie: the two numbers of '{columns.name(key)}' are equal")
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
