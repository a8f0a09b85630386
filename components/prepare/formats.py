"""The schemas of common trainers and data sets, one entry each in `FORMATS`; README.md shows them as a table.

A format says which columns make a row its own, what kind of row it is, and how the row is read. Everything in a row is
read, harmless or refused by name (columns.py), so nothing is invented and nothing is dropped without a word.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from components.common.documents import JsonObject
from components.common.errors import RowError
from components.dataset.rendered import opens_rendered, parse_rendered, strip_ending
from components.prepare.columns import (
    PROMPTS,
    Columns,
    Message,
    check_scores,
    conversation_of,
    kind_of,
    messages_of,
    read_prompt,
    turn,
)

Kind = Literal["preferences", "instructions", "unpaired"]
SCORES = ("fine-grained_score", "fine_grained_score", "overall_score", "score", "rating", "reward")
ANSWERS = ("response", "answer", "completion", "content", "text")
LANGUAGE_NAMES = {
    "english": "en",
    "eng": "en",
    "chinese": "zh",
    "mandarin": "zh",
    "zho": "zh",
    "cmn": "zh",
    "中文": "zh",
    "英文": "en",
    "cn": "zh",
}
TIES = ("tie", "tied", "equal", "both", "neither", "tie (bothbad)", "bothbad", "both_bad")


@dataclass(frozen=True)
class Example:
    """What a row becomes: a prompt and its answers, one for an instruction and two, the chosen one first, for a pair.

    `note` says what was taken for granted.
    """

    prompt: list[Message]
    answers: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Format:
    """A schema.

    Args:
        kind: the kind of its rows.
        fits: whether a row has its columns.
        read: reads a row that fits.
        about: who writes it, for the table of the README.
        example: a row.
    """

    kind: Kind
    fits: Callable[[Columns], bool]
    read: Callable[[Columns], list[Example]]
    about: str
    example: JsonObject


def detect(row: JsonObject, kind: Kind | None = None) -> str | None:
    """The first format, of this kind if one is given, whose columns a row has; None if there is none."""
    try:
        columns = Columns(row)
    except RowError:
        return None
    names = (name for name, entry in FORMATS.items() if kind in (None, entry.kind) and entry.fits(columns))
    return next(names, None)


def convert(row: JsonObject, format_name: str, ignored: Iterable[str] = ()) -> list[Example]:
    """The pairs or the instruction of a row.

    Args:
        row: a row of somebody else's.
        format_name: a key of `FORMATS`.
        ignored: columns that are harmless besides those on the list.

    Raises:
        RowError: the row does not fit the format, cannot be a pair, or something of it would be lost.
    """
    columns = Columns(row, ignored)
    for key in ("lang", "source", "license", "group"):
        if key in columns:
            columns.take(key)
    rows = FORMATS[format_name].read(columns)
    check_scores(columns)
    columns.check_left()
    return rows


def language_of(row: JsonObject) -> str | None:
    """The language that a row names, as its two-letter code if known."""
    named = row.get("lang", row.get("language"))
    if not isinstance(named, str) or not named.strip():
        return None
    name = named.strip().lower()
    return LANGUAGE_NAMES.get(name, re.split("[-_]", name)[0])


def _pair(prompt: list[Message], chosen: str, rejected: str, note: str = "") -> Example:
    return Example(prompt, (chosen, rejected), note)


def _read_pair(columns: Columns) -> list[Example]:
    """`chosen` and `rejected`, each a text, a message, a dialogue, or several of them."""
    chosen, rejected = columns.take("chosen"), columns.take("rejected")
    # H4's data repeat the chosen dialogue in a column of its own.
    repeated = [name for name in ("messages", "conversations") if name in columns and columns.peek(name) == chosen]
    for name in repeated:
        columns.take(name)
    has_prompt = any(name in columns for name in PROMPTS if name not in repeated)
    if isinstance(chosen, str) and isinstance(rejected, str) and not has_prompt:
        return [_implicit(columns, chosen, rejected)]
    prompt = read_prompt(columns, repeated)
    rendered = _was_rendered(columns)
    pairs = []
    for good, bad in product(_answers(chosen, "chosen"), _answers(rejected, "rejected")):
        if isinstance(good, str) and isinstance(bad, str):
            pairs.append(_texts(prompt, good, bad, rendered))
        else:
            pairs.append(_dialogues(prompt, _dialogue(good, "chosen"), _dialogue(bad, "rejected")))
    return pairs


def _was_rendered(columns: Columns) -> bool:
    texts = [columns.peek(name) for name in PROMPTS]
    return any(isinstance(text, str) and parse_rendered(text) is not None for text in texts)


def _texts(prompt: list[Message], chosen: str, rejected: str, rendered: bool) -> Example:
    """A pair whose answers are texts; answers to a rendered prompt lose the marker that ends them.

    Where both are dialogues, as in HH with a prompt of its own, the dialogues are taken.
    """
    dialogues = parse_rendered(chosen), parse_rendered(rejected)
    if dialogues[0] and dialogues[1] and len(dialogues[0]) > 1 and len(dialogues[1]) > 1:
        return _dialogues(prompt, dialogues[0], dialogues[1])
    if not prompt:
        raise RowError(f"no prompt; expected one of {', '.join(PROMPTS)}")
    if rendered:
        chosen, rejected = strip_ending(chosen), strip_ending(rejected)
    return _pair(prompt, chosen.strip(), rejected.strip())


def _answers(value: Any, column: str) -> list[Any]:
    """The answers of a column: a text, a message or a dialogue each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [[value]]
    if not isinstance(value, list) or not value:
        raise RowError(f"'{column}' is {kind_of(value)}; expected text, messages, or a list of texts")
    if all(isinstance(entry, str) for entry in value):
        return value
    if all(isinstance(entry, list) for entry in value):
        return value
    return [value]


def _dialogue(answer: Any, column: str) -> list[Message]:
    return [turn("assistant", answer)] if isinstance(answer, str) else messages_of(answer, column)


def _dialogues(context: list[Message], chosen: list[Message], rejected: list[Message]) -> Example:
    """A pair from two dialogues: their common beginning is the prompt, and each ends with one answer."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    ends = chosen[shared:], rejected[shared:]
    if any(len(end) != 1 or end[0]["role"] != "assistant" for end in ends):
        raise RowError("'chosen' and 'rejected' differ in more than one final message of the assistant")
    prompt = _joined(context, chosen[:shared])
    if not prompt:
        raise RowError(f"no prompt; expected one of {', '.join(PROMPTS)}, or dialogues that begin with it")
    return _pair(prompt, ends[0][0]["content"], ends[1][0]["content"])


def _joined(context: list[Message], beginning: list[Message]) -> list[Message]:
    """A prompt that stands before the dialogues, in them, or partly in both."""
    if not context or not beginning:
        return context or beginning
    start = next((i for i in range(len(beginning)) if _begins(beginning[i:], context)), None)
    if start is not None:
        return beginning
    if context[0]["role"] == "system" and _begins(beginning, context[1:]):
        return [context[0], *beginning]  # the system message in a column of its own
    if context[-1]["role"] != beginning[0]["role"] and beginning[0]["role"] != "system":
        return [*context, *beginning]
    raise RowError("the prompt's column and the dialogues hold different prompts; leave one of them out of the file")


def _begins(messages: list[Message], start: list[Message]) -> bool:
    return len(start) <= len(messages) and all(map(_same, start, messages))


def _same(first: Message, second: Message) -> bool:
    return first["role"] == second["role"] and first["content"].strip() == second["content"].strip()


def _implicit(columns: Columns, chosen: str, rejected: str) -> Example:
    """A pair without a prompt of its own: dialogues, or texts that begin with the same words."""
    dialogues = parse_rendered(chosen), parse_rendered(rejected)
    if dialogues[0] and dialogues[1]:
        system = read_prompt(columns)
        return _dialogues(system, dialogues[0], dialogues[1])
    if opens_rendered(chosen) or opens_rendered(rejected):
        raise RowError("'chosen' or 'rejected' begins like a rendered conversation but cannot be taken apart")
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if length is None:
        raise RowError(f"no prompt, and one answer is the beginning of the other; expected one of {', '.join(PROMPTS)}")
    while length and not _is_border(chosen[length - 1]):
        length -= 1
    prefix = chosen[:length].strip()
    if not prefix or not chosen[length:].strip() or not rejected[length:].strip():
        raise RowError(
            "no prompt, and 'chosen' and 'rejected' do not begin with the same whole words; expected one of"
            f" {', '.join(PROMPTS)}"
        )
    before = read_prompt(columns)
    return _pair(
        [*before, turn("user", prefix)],
        chosen[length:].strip(),
        rejected[length:].strip(),
        "the prompt is what both answers begin with, up to a whole word",
    )


def _is_border(character: str) -> bool:
    """Whether a word ends with this character: white space or punctuation."""
    return character.isspace() or unicodedata.category(character)[0] in "PZ"


def _read_swift(columns: Columns) -> list[Example]:
    """ms-swift: the chosen answer ends `messages` or is the `response`; the rejected one has a column of its own."""
    if "messages" not in columns:
        prompt = read_prompt(columns)
        good = columns.text("response")
        return [_texts(prompt, good, bad, False) for bad in _answers(columns.take("rejected"), "rejected")]
    messages = messages_of(columns.take("messages"), "messages")
    *prompt, last = messages or [turn("user", "")]
    if last["role"] != "assistant" or not prompt:
        raise RowError("'messages' does not end with the answer of the assistant, which is the chosen one")
    before = _joined(read_prompt(columns, ("messages",)), prompt)
    rejected = columns.take("rejected")
    pairs = []
    for bad in _answers(rejected, "rejected"):
        dialogue = _dialogue(bad, "rejected")
        end = [*prompt, *dialogue] if len(dialogue) == 1 else dialogue
        pairs.append(_dialogues(before, messages, end))
    return pairs


def _read_ranked(columns: Columns) -> list[Example]:
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
        return [_pair(prompt, good.strip(), bad.strip())]
    return [_dialogues(prompt, _dialogue(good, column), _dialogue(bad, column))]


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
        return [_texts(prompt, good, bad, False)]
    return [_dialogues(prompt, _dialogue(good, names[better]), _dialogue(bad, names[1 - better]))]


def _read_helpsteer(columns: Columns) -> list[Example]:
    """HelpSteer3: -3 to 3, negative for the first response."""
    preference = _number(columns.take("overall_preference"))
    better = None if preference == 0 else int(preference > 0)
    return _read_two(columns, ("response1", "response2"), better)


def _read_safe(columns: Columns) -> list[Example]:
    """PKU-SafeRLHF: the number of the better response."""
    better = columns.take("better_response_id")
    if better not in (0, 1) or isinstance(better, bool):
        raise RowError("'better_response_id' is neither 0 nor 1")
    for key in ("safer_response_id", "is_response_0_safe", "is_response_1_safe"):
        columns.take_if(key)
    return _read_two(columns, ("response_0", "response_1"), int(better))


def _read_shp(columns: Columns) -> list[Example]:
    """Stanford Human Preferences: a post, two comments, and 1 where the first is preferred."""
    label = columns.take("labels")
    if label not in (0, 1) or isinstance(label, bool):
        raise RowError("'labels' is neither 0 nor 1")
    post = columns.text("history").strip()
    answers = columns.text("human_ref_a"), columns.text("human_ref_b")
    return [_pair([turn("user", post)], answers[1 - label].strip(), answers[label].strip())]


def _read_arena(columns: Columns) -> list[Example]:
    """Chatbot Arena: two conversations and the winner."""
    winner = str(columns.take("winner")).strip().lower()
    places = {"model_a": 0, "a": 0, "conversation_a": 0, "model_b": 1, "b": 1, "conversation_b": 1}
    if winner not in places and winner not in TIES:
        raise RowError("'winner' is none of model_a, model_b, tie")
    return _read_two(columns, ("conversation_a", "conversation_b"), places.get(winner))


def _read_list(columns: Columns) -> list[Example]:
    """LLaMA-Factory's ranking lists: answers from the best to the worst."""
    name = "output" if "output" in columns else "response"
    answers = columns.take(name)
    if not isinstance(answers, list) or len(answers) < 2 or any(not isinstance(answer, str) for answer in answers):
        raise RowError(f"'{columns.name(name)}' is expected to be two texts or more, the best one first")
    return [_texts(read_prompt(columns), answers[0], answers[-1], False)]


def _read_unpaired(columns: Columns) -> list[Example]:
    """An answer with a thumb up or down."""
    raise RowError("unpaired feedback (an answer with a label) cannot be trained on yet; pairs can")


def _read_instruction(columns: Columns) -> list[Example]:
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
    rendered = _was_rendered(columns)
    prompt = read_prompt(columns)
    if not prompt:
        raise RowError(f"no prompt; expected one of {', '.join(PROMPTS)}")
    return [Example(prompt, (strip_ending(answer) if rendered else answer.strip(),))]


def _read_conversation(columns: Columns) -> list[Example]:
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
    return [Example(_joined(before, prompt), (last["content"],))]


def _is_list(columns: Columns, name: str) -> bool:
    return isinstance(columns.peek(name), list)


def _has(*names: str) -> Callable[[Columns], bool]:
    return lambda columns: all(name in columns for name in names)


def _is_labelled(columns: Columns) -> bool:
    label = next((columns.peek(name) for name in ("label", "kto_tag", "thumbs_up") if name in columns), None)
    answered = any(name in columns for name in ("response", "messages", "conversations", "output"))
    return isinstance(label, bool | int | str) and answered and "rejected" not in columns


_Q, _G, _B = "Is rain wet?", "Yes, it is.", "No."


def _said(
    *texts: str, keys: tuple[str, str] = ("role", "content"), names: tuple[str, str] = ("user", "assistant")
) -> Any:
    return [{keys[0]: names[i % 2], keys[1]: text} for i, text in enumerate(texts)]


FORMATS: dict[str, Format] = {
    "kubealign": Format(
        "preferences",
        lambda columns: _has("chosen", "rejected")(columns) and _is_list(columns, "prompt"),
        _read_pair,
        "this project, TRL (conversational), OpenRLHF, distilabel",
        {"prompt": _said(_Q), "chosen": _G, "rejected": _B},
    ),
    "alpaca": Format(
        "preferences",
        _has("chosen", "rejected", "instruction"),
        _read_pair,
        "LLaMA-Factory (alpaca), MedicalGPT, argilla, comparison_gpt4 in Chinese",
        {
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
            "instruction": _Q,
            "input": "",
            "chosen": _G,
            "rejected": _B,
        },
    ),
    "sharegpt": Format(
        "preferences",
        _has("chosen", "rejected", "conversations"),
        _read_pair,
        "LLaMA-Factory (sharegpt)",
        {
            "conversations": _said(_Q, keys=("from", "value"), names=("human", "gpt")),
            "chosen": {"from": "gpt", "value": _G},
            "rejected": {"from": "gpt", "value": _B},
        },
    ),
    "openai": Format(
        "preferences",
        _has("chosen", "rejected", "messages"),
        _read_pair,
        "LLaMA-Factory (openai), axolotl (chat_template.default), H4's UltraFeedback",
        {
            "messages": _said(_Q),
            "chosen": {"role": "assistant", "content": _G},
            "rejected": {"role": "assistant", "content": _B},
        },
    ),
    "orca": Format(
        "preferences",
        lambda columns: (
            _has("chosen", "rejected")(columns) and any(name in columns for name in ("question", "query", "input"))
        ),
        _read_pair,
        "Orca pairs, axolotl (chatml.intel, chatml.icr), MedicalGPT; Chinese names of columns as well",
        {"system": "Be brief.", "question": _Q, "chosen": _G, "rejected": _B},
    ),
    "trl": Format(
        "preferences",
        _has("chosen", "rejected"),
        _read_pair,
        "TRL, HH, axolotl (prompt_pairs, ultra, argilla_chat), OpenRLHF, RLHFlow",
        {"prompt": _Q, "chosen": _G, "rejected": _B},
    ),
    "swift": Format(
        "preferences",
        lambda columns: "rejected" in columns and ("messages" in columns or "response" in columns),
        _read_swift,
        "ms-swift (`rejected_response`, `rejected_messages`)",
        {"messages": _said(_Q, _G), "rejected_response": _B},
    ),
    "ranked": Format(
        "preferences",
        lambda columns: any(_is_list(columns, name) for name in ("completions", "answers", "responses", "candidates")),
        _read_ranked,
        "UltraFeedback, NeMo-RL (rank 0 is the best), Nectar (rank 1 is)",
        {
            "instruction": _Q,
            "completions": [{"response": _G, "overall_score": 9}, {"response": _B, "overall_score": 2}],
        },
    ),
    "helpsteer": Format(
        "preferences",
        _has("response1", "response2", "overall_preference"),
        _read_helpsteer,
        "HelpSteer3",
        {"context": _said(_Q), "response1": _B, "response2": _G, "overall_preference": 2},
    ),
    "safe_rlhf": Format(
        "preferences",
        _has("response_0", "response_1", "better_response_id"),
        _read_safe,
        "PKU-SafeRLHF",
        {"prompt": _Q, "response_0": _G, "response_1": _B, "better_response_id": 0},
    ),
    "arena": Format(
        "preferences",
        _has("conversation_a", "conversation_b", "winner"),
        _read_arena,
        "Chatbot Arena",
        {"conversation_a": _said(_Q, _G), "conversation_b": _said(_Q, _B), "winner": "model_a"},
    ),
    "shp": Format(
        "preferences",
        _has("history", "human_ref_a", "human_ref_b", "labels"),
        _read_shp,
        "Stanford Human Preferences",
        {"history": _Q, "human_ref_A": _B, "human_ref_B": _G, "labels": 0},
    ),
    "list": Format(
        "preferences",
        lambda columns: any(
            _is_list(columns, name) and _strings(columns.peek(name)) for name in ("output", "response")
        ),
        _read_list,
        "LLaMA-Factory (ranking lists)",
        {"instruction": _Q, "input": "", "output": [_G, _B]},
    ),
    "unpaired": Format(
        "unpaired",
        _is_labelled,
        _read_unpaired,
        "TRL, LLaMA-Factory and ms-swift (KTO)",
        {"prompt": _Q, "completion": _G, "label": True},
    ),
    "instruction": Format(
        "instructions",
        lambda columns: (
            any(name in columns for name in ("response", "output")) and any(name in columns for name in PROMPTS)
        ),
        _read_instruction,
        "Alpaca, TRL (prompt-completion), ms-swift, OpenRLHF, OpenOrca",
        {"instruction": _Q, "input": "", "output": _G},
    ),
    "conversation": Format(
        "instructions",
        lambda columns: any(name in columns for name in ("messages", "conversations", "text")),
        _read_conversation,
        "ShareGPT, OpenAI, TRL (conversational), ms-swift; `text` in a known template",
        {"messages": _said(_Q, _G)},
    ),
}
"""The formats in the order in which they are tried."""


def _strings(value: Any) -> bool:
    return all(isinstance(entry, str) for entry in value)
