"""Pairs made of answers with scores, ranks or a verdict beside them."""

import math
from collections.abc import Iterable
from typing import Any

from components.common.errors import RowError
from components.dataset.messages import kind_of, turn
from components.prepare.columns import Columns
from components.prepare.pairs import Example, as_dialogue, pair_dialogues, pair_texts
from components.prepare.prompts import PROMPTS, read_prompt

SCORES = ("fine-grained_score", "fine_grained_score", "overall_score", "score", "rating", "reward")
ANSWERS = ("response", "answer", "completion", "content", "text")
TIES = ("tie", "tied", "equal", "both", "neither", "tie (bothbad)", "bothbad", "both_bad")


def read_ranked(columns: Columns) -> list[Example]:
    """Several completions with scores or ranks: the best against the worst."""
    column = columns.first("completions", "answers", "responses", "candidates")
    entries = columns.take(column)
    if not isinstance(entries, list):
        raise RowError(f"'{column}' is {kind_of(entries)}; expected a list")
    prompt = read_prompt(columns)
    answers = [_completion(entry) for entry in entries]
    ranks = _scores(entries, ("rank",), column)
    best, worst = _positions([-rank for rank in ranks]) if ranks else _by_scores(entries, column)
    good, bad = answers[best], answers[worst]
    if isinstance(good, str) and isinstance(bad, str):
        if not prompt:
            raise RowError(f"no prompt; expected one of {', '.join(PROMPTS)}")
        return [Example(prompt, (good.strip(), bad.strip()))]
    return [pair_dialogues(prompt, as_dialogue(good, column), as_dialogue(bad, column))]


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
        raise RowError("'completions' need at least two different scores")
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
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError) as error:
        raise RowError("a completion's score is no number") from error
    if not math.isfinite(number):
        raise RowError("a completion's score is not finite")
    return number


def _completion(entry: Any) -> Any:
    """The answer of a completion: a text, or messages."""
    if not isinstance(entry, dict):
        raise RowError(f"the completions hold {kind_of(entry)}; expected objects")
    for key in ANSWERS:
        value = entry.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list | dict) and value:
            return value if isinstance(value, list) else [value]
    raise RowError(f"a completion has no text; expected one of {', '.join(ANSWERS)}")


def _read_two(columns: Columns, names: tuple[str, str], better: int | None) -> list[Example]:
    """Two answers, and which one is better: 0, 1, or None for a tie."""
    answers = [columns.take(name) for name in names]
    prompt = read_prompt(columns)
    if better is None:
        raise RowError("a tie: neither answer is preferred")
    good, bad = answers[better], answers[1 - better]
    if isinstance(good, str) and isinstance(bad, str):
        return [pair_texts(prompt, good, bad, False)]
    return [pair_dialogues(prompt, as_dialogue(good, names[better]), as_dialogue(bad, names[1 - better]))]


def read_helpsteer(columns: Columns) -> list[Example]:
    """HelpSteer3: -3 to 3, negative for the first response."""
    preference = _number(columns.take("overall_preference"))
    better = None if preference == 0 else int(preference > 0)
    return _read_two(columns, ("response1", "response2"), better)


def read_safe(columns: Columns) -> list[Example]:
    """PKU-SafeRLHF: the number of the better response."""
    better = columns.take("better_response_id")
    if better not in (0, 1) or isinstance(better, bool):
        raise RowError("'better_response_id' is neither 0 nor 1")
    for key in ("safer_response_id", "is_response_0_safe", "is_response_1_safe"):
        columns.take_if(key)
    return _read_two(columns, ("response_0", "response_1"), int(better))


def read_shp(columns: Columns) -> list[Example]:
    """Stanford Human Preferences: a post, two comments, and 1 where the first is preferred."""
    label = columns.take("labels")
    if label not in (0, 1) or isinstance(label, bool):
        raise RowError("'labels' is neither 0 nor 1")
    post = columns.text("history").strip()
    answers = columns.text("human_ref_a"), columns.text("human_ref_b")
    return [Example([turn("user", post)], (answers[1 - label].strip(), answers[label].strip()))]


def read_arena(columns: Columns) -> list[Example]:
    """Chatbot Arena: two conversations and the winner."""
    winner = str(columns.take("winner")).strip().lower()
    places = {"model_a": 0, "a": 0, "conversation_a": 0, "model_b": 1, "b": 1, "conversation_b": 1}
    if winner not in places and winner not in TIES:
        raise RowError("'winner' is none of model_a, model_b, tie")
    return _read_two(columns, ("conversation_a", "conversation_b"), places.get(winner))


def read_list(columns: Columns) -> list[Example]:
    """LLaMA-Factory's ranking lists: answers from the best to the worst."""
    name = "output" if "output" in columns else "response"
    answers = columns.take(name)
    if not isinstance(answers, list) or len(answers) < 2 or any(not isinstance(answer, str) for answer in answers):
        raise RowError(f"'{columns.name(name)}' is expected to be two texts or more, the best one first")
    return [pair_texts(read_prompt(columns), answers[0], answers[-1], False)]
