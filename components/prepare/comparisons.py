"""Pairs made of answers with scores, ranks or a verdict beside them."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from components.common.errors import RowError
from components.common.foreign import shown
from components.dataset.messages import Message, is_empty, kind_of, turn
from components.dataset.rendered import parse_literal
from components.prepare.columns import RATINGS, SIGNED, TIES, Columns, canonical, is_harmless, number_in
from components.prepare.pairs import Example, pair_answers, was_rendered
from components.prepare.prompts import expect_prompt, read_prompt

COMPLETIONS = ("completions", "answers", "responses", "candidates", "generations", "outputs")
"""Columns with a list of answers to one prompt."""
RANKS = ("ranks", "rank", "ranking")
SCORES = ("fine-grained_score", "fine_grained_score", "overall_score", "score", "rating", "reward")
ANSWERS = ("response", "answer", "completion", "content", "text")
COMPLETION_KEYS = frozenset((*ANSWERS, *SCORES, "rank", "custom_system_prompt"))
_ANSWER = "response|answer|output|completion|conversation|reply|generation|candidate|summary|回答|回复|答案"
SIDE = re.compile(rf"({_ANSWER})_?([012ab])")
"""A column with one of two answers: what it is called, and which of the two it is."""
SIDES = ("01", "12", "ab")
NAMED = ("winner", "preference", "better_response_id", "choice", "better", "verdict", "chosen")
"""Verdicts that name one of the two answers."""
NAME = re.compile(rf"\[*(?:(?:{_ANSWER}|model|assistant|option)[ _]?)?([012ab])\]*")


def read_ranked(columns: Columns) -> list[Example]:
    """Several completions with scores or ranks: the best against the worst."""
    column = columns.first(*COMPLETIONS)
    entries = columns.take(column)
    if not isinstance(entries, list):
        raise RowError(f"'{columns.name(column)}' is {kind_of(entries)}; expected a list")
    prompt = read_prompt(columns)
    if entries and all(isinstance(entry, str) for entry in entries):
        best, worst = _by_list(columns, entries)
        answers: list[Any] = entries
    else:
        answers = [_completion(entry) for entry in entries]
        ranks = _scores(entries, ("rank",), column)
        best, worst = _positions([-rank for rank in ranks]) if ranks else _by_scores(entries, column)
    if not prompt:
        columns.check_left()  # names a context that is no conversation
    if isinstance(answers[best], str):
        expect_prompt(columns, prompt)
    return [pair_answers(prompt, answers[best], answers[worst], was_rendered(columns))]


def _by_list(columns: Columns, texts: list[str]) -> tuple[int, int]:
    """Where the best and the worst text stand by the numbers in a column beside them (distilabel)."""
    name = next((name for name in (*RANKS, *RATINGS) if isinstance(columns.peek(name), list)), None)
    if name is None:
        raise RowError(f"the answers have no scores; expected a list of numbers in one of {', '.join(RATINGS)}")
    numbers = [number_in(value) for value in columns.take(name)]
    if len(numbers) != len(texts) or any(number is None for number in numbers):
        raise RowError(f"'{columns.name(name)}' is expected to be {len(texts)} numbers, one for each answer")
    sign = -1 if name in RANKS else 1
    return _positions([sign * number for number in numbers if number is not None])


def _by_scores(entries: list[Any], column: str) -> tuple[int, int]:
    """Where the best and the worst completion stand by score, unless the two kinds of score contradict each other."""
    overall = _scores(entries, ("overall_score",), column)
    fine = _scores(entries, ("fine-grained_score", "fine_grained_score"), column)
    scores = fine or overall or _scores(entries, SCORES, column)
    if not scores:
        raise RowError(f"a completion has no score; expected a number in one of rank, {', '.join(SCORES)}")
    best, worst = _positions(scores)
    if fine and overall and overall[best] <= overall[worst]:
        raise RowError("'overall_score' and 'fine-grained_score' contradict each other")
    return best, worst


def _positions(scores: list[float]) -> tuple[int, int]:
    """Where the best and the worst stand; the first of equals."""
    if len(scores) < 2 or len(set(scores)) < 2:
        raise RowError("a tie: the answers need at least two different scores")
    indices = range(len(scores))
    return max(indices, key=lambda i: scores[i]), min(indices, key=lambda i: scores[i])


def _scores(entries: list[Any], names: Iterable[str], column: str) -> list[float]:
    """The score of every entry; empty if one has none."""
    values = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise RowError(f"'{column}' holds {kind_of(entry)}; expected objects")
        value = next((entry[name] for name in names if entry.get(name) is not None), None)
        if value is None:
            return []
        values.append(_number(value))
    return values


def _number(value: Any) -> float:
    number = number_in(value)
    if number is None:
        raise RowError("a score is not a finite number")
    return number


def _completion(entry: Any) -> Any:
    """The answer of a completion: a text, or messages."""
    if not isinstance(entry, dict):
        raise RowError(f"the completions hold {kind_of(entry)}; expected objects")
    for key, value in entry.items():
        if key not in COMPLETION_KEYS and not is_empty(value) and not is_harmless(canonical(key), value):
            raise RowError(f"a completion has '{shown(key)}', which is not read and may be part of the conversation")
    for key in ANSWERS:
        value = entry.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list | dict) and value:
            return value if isinstance(value, list) else [value]
    raise RowError(f"a completion has no text; expected one of {', '.join(ANSWERS)}")


def is_compared(columns: Columns) -> bool:
    """Whether a row has two answers and something that may tell which is better."""
    sides = _sides(columns)
    return sides is not None and any(name in columns for names in _verdict_columns(sides) for name in names)


def read_compared(columns: Columns) -> list[Example]:
    """Two answers, and what tells which of them is better; if several columns do, they must agree."""
    sides = _sides(columns)
    if sides is None:
        raise RowError("no two answers; expected for example 'response_a' and 'response_b'")
    prompt, answers = _listed(columns, sides) or (None, [columns.take(name) for name in sides])
    if prompt is None:
        prompt = read_prompt(columns)
    verdicts = dict(_verdicts(columns, sides))
    if len(set(verdicts.values())) != 1:
        names = " and ".join(map(repr, verdicts)) or "no column"
        raise RowError(f"{names} {'contradict each other' if verdicts else 'tells which answer is better'}")
    name, better = next(iter(verdicts.items()))
    if better is None:
        raise RowError(f"a tie: '{name}' prefers neither answer")
    if isinstance(answers[better], str):
        expect_prompt(columns, prompt)
    return [pair_answers(prompt, answers[better], answers[1 - better], was_rendered(columns))]


def _sides(columns: Columns) -> tuple[str, str] | None:
    """The columns of the two answers, the first one first; None unless a row has just two such."""
    found = sorted((match[2], match[1], key) for key in columns if (match := SIDE.fullmatch(key)))
    if len(found) != 2 or found[0][1] != found[1][1] or found[0][0] + found[1][0] not in SIDES:
        return None
    return found[0][2], found[1][2]


def _listed(columns: Columns, sides: tuple[str, str]) -> tuple[list[Message], list[Any]] | None:
    """Two dialogues of which the turns of each speaker are a list, written as JSON (lmsys's 55k)."""
    lists = [_texts(columns.peek(name)) for name in ("prompt", *sides)]
    asked, *answered = lists
    if not asked or any(len(answers) != len(asked) for answers in answered):
        return None
    for name in ("prompt", *sides):
        columns.take(name)
    return [], [
        [
            turn(role, text)
            for exchange in zip(asked, answers, strict=True)
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        for answers in answered
    ]


def _texts(value: Any) -> list[str]:
    """The texts of a list, which may be written as JSON; none if it is anything else."""
    if isinstance(value, str) and value.startswith("["):
        value = parse_literal(value)
    return value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else []


def _verdict_columns(sides: tuple[str, str]) -> list[tuple[str, ...]]:
    """Columns that may tell which answer is better: one, or one for each answer, the first one first."""
    marks = [name[-1] for name in sides]
    words = ("winner_model", "winner", *RATINGS)
    return [*((name,) for name in (*SIGNED, *NAMED)), *(tuple(f"{word}_{mark}" for mark in marks) for word in words)]


def _verdicts(columns: Columns, sides: tuple[str, str]) -> Iterator[tuple[str, int | None]]:
    """What tells which answer is better, and which it is: 0, 1, or None for neither."""
    for names in _verdict_columns(sides):
        if not all(name in columns for name in names):
            continue
        values = [columns.take(name) for name in names]
        shown_names = " and ".join(columns.name(name) for name in names)
        if len(names) == 2 or names[0] in SIGNED:
            numbers = [0.0, *map(_number, values)][-2:]
            yield shown_names, None if numbers[0] == numbers[1] else int(numbers[1] > numbers[0])
        else:
            yield shown_names, _named(values[0], shown_names, columns, sides)


def _named(value: Any, name: str, columns: Columns, sides: tuple[str, str]) -> int | None:
    """Which answer a verdict names, by itself or by its model."""
    marks = [side[-1] for side in sides]
    said = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if said in TIES:
        return None
    match = NAME.fullmatch(said)
    models = [str(columns.peek(f"model_{mark}")).lower() for mark in marks]
    if match and match[1] in marks:
        return marks.index(match[1])
    if models.count(said) == 1:
        return models.index(said)
    raise RowError(f"'{name}' says {shown(said)!r}; expected {marks[0]}, {marks[1]} or tie")


def read_shp(columns: Columns) -> list[Example]:
    """Stanford Human Preferences: a post, two comments, and 1 where the first is preferred."""
    label = columns.take("labels")
    if label not in (0, 1) or isinstance(label, bool):
        raise RowError("'labels' is neither 0 nor 1")
    post = columns.text("history").strip()
    answers = columns.text("human_ref_a"), columns.text("human_ref_b")
    return [Example([turn("user", post)], (answers[1 - label].strip(), answers[label].strip()))]


def read_list(columns: Columns) -> list[Example]:
    """LLaMA-Factory's ranking lists: answers from the best to the worst."""
    name = "output" if "output" in columns else "response"
    answers = columns.take(name)
    if not isinstance(answers, list) or len(answers) < 2 or any(not isinstance(answer, str) for answer in answers):
        raise RowError(f"'{columns.name(name)}' is expected to be two texts or more, the best one first")
    prompt = read_prompt(columns)
    expect_prompt(columns, prompt)
    return [pair_answers(prompt, answers[0], answers[-1], was_rendered(columns))]
