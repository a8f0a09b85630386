"""Conversion of preference rows in the schemas of common trainers (README.md lists them) to ours."""

import math
import re
from collections.abc import Callable
from itertools import product
from typing import Any

from components.common.documents import JsonObject
from components.common.errors import RowError

Message = dict[str, str]
Pair = tuple[list[Message], str, str]

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SCORES = ("overall_score", "score", "rating", "fine-grained_score")
ANSWERS = ("response", "content", "text")
LANGUAGE_NAMES = {"english": "en", "eng": "en", "chinese": "zh", "zho": "zh", "cmn": "zh"}


def detect(row: JsonObject) -> str | None:
    """The format that a row looks like, or None."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    name = "trl"
    if "completions" in row:
        name = "ultrafeedback"
    elif not {"chosen", "rejected"} <= row.keys():
        return None
    elif "conversations" in row:
        name = "sharegpt"
    elif "instruction" in row:
        name = "ultrafeedback" if isinstance(chosen, list) else "alpaca"
    elif isinstance(prompt, list) and isinstance(chosen, str):
        name = "kubealign"
    elif isinstance(prompt, str) and isinstance(chosen, list) and _first_role(chosen) != "assistant":
        name = "ultrafeedback"
    elif prompt is None and isinstance(chosen, str) and SPEAKER.match(chosen):
        name = "hh"
    return name


def convert(row: JsonObject, format_name: str) -> list[Pair]:
    """The pairs of a row: its prompt as messages, the chosen and the rejected answer.

    Raises:
        RowError: the row does not fit the format, or cannot be a pair.
    """
    return FORMATS[format_name](row)


def language_of(row: JsonObject) -> str | None:
    """The language that a row names, as its two-letter code if known."""
    named = row.get("lang", row.get("language"))
    if not isinstance(named, str) or not named.strip():
        return None
    name = named.strip().lower()
    return LANGUAGE_NAMES.get(name, re.split("[-_]", name)[0])


def _kubealign(row: JsonObject) -> list[Pair]:
    return [(_messages(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))]


def _trl(row: JsonObject) -> list[Pair]:
    if isinstance(row.get("chosen"), list):
        return [_dialogues(_context(row), _messages(row, "chosen"), _messages(row, "rejected"))]
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if row.get("prompt") is not None:
        return [(_context(row), chosen.strip(), rejected.strip())]
    # TRL's rule: the prompt is the common prefix of both, without trailing space.
    prefix = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    prefix = min(len(chosen), len(rejected)) if prefix is None else prefix
    if not chosen[:prefix].strip():
        raise RowError("no 'prompt', and 'chosen' and 'rejected' do not begin with the same text")
    return [([_turn("user", chosen[:prefix].strip())], chosen[prefix:].strip(), rejected[prefix:].strip())]


def _sharegpt(row: JsonObject) -> list[Pair]:
    system = [_turn("system", _text(row, "system"))] if row.get("system") else []
    prompt = [*system, *_messages(row, "conversations")]
    return [(prompt, _answer(row, "chosen"), _answer(row, "rejected"))]


def _alpaca(row: JsonObject) -> list[Pair]:
    return [(_instruction(row), _text(row, "chosen"), _text(row, "rejected"))]


def _hh(row: JsonObject) -> list[Pair]:
    return [_dialogues([], _dialogue(row, "chosen"), _dialogue(row, "rejected"))]


def _ultrafeedback(row: JsonObject) -> list[Pair]:
    if "completions" in row:
        best, worst = _extremes(row["completions"])
        return [(_instruction(row), best, worst)]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not chosen or not rejected:
        raise RowError("'chosen' and 'rejected' are expected to be non-empty lists")
    if all(isinstance(answer, str) for answer in [*chosen, *rejected]):
        prompt = _instruction(row)
        return [(prompt, good, bad) for good, bad in product(chosen, rejected)]
    has_prompt = _first_role(chosen) != "assistant"  # both dialogues then start with the prompt
    return [_dialogues([] if has_prompt else _instruction(row), _messages(row, "chosen"), _messages(row, "rejected"))]


FORMATS: dict[str, Callable[[JsonObject], list[Pair]]] = {
    "kubealign": _kubealign,
    "trl": _trl,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "hh": _hh,
    "ultrafeedback": _ultrafeedback,
}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _has(row: JsonObject, key: str) -> None:
    if row.get(key) is None:
        raise RowError(f"no '{key}'")


def _text(row: JsonObject, key: str) -> str:
    _has(row, key)
    if not isinstance(row[key], str):
        raise RowError(f"'{key}' is {_kind(row[key])}; expected text")
    return str(row[key])


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "text" if isinstance(value, str) else "null")


def _message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"'{key}' holds {_kind(turn)}; expected messages with role and content (or from and value)")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"'{key}' holds a message whose role is none of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"'{key}' holds a message whose content is {_kind(content)}; expected text")
    return _turn(ROLES[role], content)


def _messages(row: JsonObject, key: str) -> list[Message]:
    _has(row, key)
    if not isinstance(row[key], list):
        raise RowError(f"'{key}' is {_kind(row[key])}; expected a list of messages")
    return [_message(turn, key) for turn in row[key]]


def _first_role(messages: list[Any]) -> str | None:
    first = messages[0] if messages else None
    return ROLES.get(str(first.get("role", first.get("from")))) if isinstance(first, dict) else None


def _answer(row: JsonObject, key: str) -> str:
    """An answer that is a text or a single message."""
    _has(row, key)
    if isinstance(row[key], str):
        return str(row[key])
    message = _message(row[key], key)
    if message["role"] != "assistant":
        raise RowError(f"'{key}' is by the {message['role']}; expected the assistant")
    return message["content"]


def _context(row: JsonObject) -> list[Message]:
    prompt = row.get("prompt")
    if prompt is None:
        return []
    return _messages(row, "prompt") if isinstance(prompt, list) else [_turn("user", _text(row, "prompt").strip())]


def _instruction(row: JsonObject) -> list[Message]:
    key = "instruction" if "instruction" in row else "prompt"
    parts = [_text(row, key), _text(row, "input") if row.get("input") else ""]
    turns = [_turn("system", _text(row, "system"))] if row.get("system") else []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise RowError("'history' is expected to be a list of question and answer")
        turns += [_turn("user", turn[0]), _turn("assistant", turn[1])]
    return [*turns, _turn("user", "\n\n".join(part for part in parts if part))]


def _dialogue(row: JsonObject, key: str) -> list[Message]:
    before, *pieces = SPEAKER.split(_text(row, key))
    if before.strip() or not pieces:
        raise RowError(f"'{key}' does not begin with `Human:` or `Assistant:`")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [_turn(SPEAKERS[speaker], text.strip()) for speaker, text in turns]


def _dialogues(context: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    """A pair from two dialogues: their common prefix is the prompt, and each ends with one answer."""
    if context and chosen[: len(context)] == rejected[: len(context)] == context:
        context = []
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    ends = chosen[shared:], rejected[shared:]
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
        raise RowError("'chosen' and 'rejected' differ in more than one final message of the assistant")
    return [*context, *chosen[:shared]], ends[0][0]["content"], ends[1][0]["content"]


def _extremes(completions: Any) -> tuple[str, str]:
    """The best and the worst of scored completions; the first of equals."""
    if not isinstance(completions, list):
        raise RowError(f"'completions' is {_kind(completions)}; expected a list")
    scored = [(_score(entry), _completion(entry)) for entry in completions]
    if len(scored) < 2 or len({score for score, _ in scored}) < 2:
        raise RowError("'completions' need at least two different scores")
    return max(scored, key=lambda pair: pair[0])[1], min(scored, key=lambda pair: pair[0])[1]


def _completion(entry: JsonObject) -> str:
    text: str | None = next((entry[key] for key in ANSWERS if isinstance(entry.get(key), str)), None)
    if text is None:
        raise RowError(f"a completion has no text; expected one of {', '.join(ANSWERS)}")
    return str(text)


def _score(entry: Any) -> float:
    if not isinstance(entry, dict):
        raise RowError(f"'completions' holds {_kind(entry)}; expected objects")
    value = next((entry[key] for key in SCORES if entry.get(key) is not None), None)
    try:
        if isinstance(value, bool):
            raise ValueError
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RowError(f"a completion has no score; expected a number in one of {', '.join(SCORES)}") from error
    if not math.isfinite(score):
        raise RowError("a completion's score is not finite")
    return score
