"""The schemas of common trainers and data sets, one entry each in `FORMATS`; README.md shows them as a table.

A format says which columns make a row its own, what kind of row it is, and how the row is read. Everything in a row is
read, harmless or refused by name (columns.py), so nothing is invented and nothing is dropped without a word.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from components.common.documents import JsonObject
from components.common.errors import RowError
from components.prepare.columns import SIGNED, Columns, check_verdict
from components.prepare.comparisons import COMPLETIONS, is_compared, read_compared, read_list, read_ranked, read_shp
from components.prepare.instructions import read_conversation, read_instruction, read_unpaired
from components.prepare.pairs import Example, read_pair, read_swift
from components.prepare.prompts import PROMPTS

Kind = Literal["preferences", "instructions", "unpaired"]
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


LABELS = ("label", "kto_tag", "thumbs_up", "liked", "accepted", "desirable", "is_chosen", "is_safe", "is_correct")
"""Columns with whether the one answer of a row is good."""
PLACEHOLDER = re.compile(r"<(image|video|audio)>")
"""Where a trainer puts what the model sees or hears."""


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
    examples = FORMATS[format_name].read(columns)
    if FORMATS[format_name].kind == "preferences":
        check_verdict(columns)
    columns.check_left()
    for message in (message for example in examples for message in example.prompt):
        placeholder = PLACEHOLDER.search(message["content"])
        if placeholder and f"</{placeholder[1]}>" not in message["content"]:
            raise RowError(f"a message has a <{placeholder[1]}>, which text alone cannot show")
    return examples


def language_of(row: JsonObject) -> str | None:
    """The language that a row names, as its two-letter code if known."""
    named = row.get("lang", row.get("language"))
    if not isinstance(named, str) or not named.strip():
        return None
    name = named.strip().lower()
    return LANGUAGE_NAMES.get(name, re.split("[-_]", name)[0])


def _is_list(columns: Columns, name: str) -> bool:
    return isinstance(columns.peek(name), list)


def _has(*names: str) -> Callable[[Columns], bool]:
    return lambda columns: all(name in columns for name in names)


def _is_labelled(columns: Columns) -> bool:
    """Whether a row is one answer and whether it is good, rather than one to learn."""
    labels = (columns.peek(name) for name in LABELS)
    labelled = any(str(label).strip().lower() in ("true", "false", "0", "1") for label in labels)
    answered = any(name in columns for name in ("response", "output", "messages", "conversations", "text"))
    return labelled and answered and "rejected" not in columns


_Q, _G, _B = "Is rain wet?", "Yes, it is.", "No."


def _said(
    *texts: str, keys: tuple[str, str] = ("role", "content"), names: tuple[str, str] = ("user", "assistant")
) -> Any:
    return [{keys[0]: names[i % 2], keys[1]: text} for i, text in enumerate(texts)]


FORMATS: dict[str, Format] = {
    "kubealign": Format(
        "preferences",
        lambda columns: _has("chosen", "rejected")(columns) and _is_list(columns, "prompt"),
        read_pair,
        "this project, TRL (conversational), OpenRLHF, distilabel",
        {"prompt": _said(_Q), "chosen": _G, "rejected": _B},
    ),
    "alpaca": Format(
        "preferences",
        _has("chosen", "rejected", "instruction"),
        read_pair,
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
        read_pair,
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
        read_pair,
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
        read_pair,
        "Orca pairs, axolotl (chatml.intel, chatml.icr), MedicalGPT; Chinese names of columns as well",
        {"system": "Be brief.", "question": _Q, "chosen": _G, "rejected": _B},
    ),
    "trl": Format(
        "preferences",
        _has("chosen", "rejected"),
        read_pair,
        "TRL, HH, axolotl (prompt_pairs, ultra, argilla_chat), OpenRLHF, RLHFlow",
        {"prompt": _Q, "chosen": _G, "rejected": _B},
    ),
    "swift": Format(
        "preferences",
        lambda columns: (
            "rejected" in columns and any(name in columns for name in ("messages", "conversations", "response"))
        ),
        read_swift,
        "ms-swift (`rejected_response`, `rejected_messages`)",
        {"messages": _said(_Q, _G), "rejected_response": _B},
    ),
    "ranked": Format(
        "preferences",
        lambda columns: any(_is_list(columns, name) for name in COMPLETIONS),
        read_ranked,
        "UltraFeedback, NeMo-RL (rank 0 is the best), Nectar (rank 1 is), distilabel (`generations`, `ratings`)",
        {
            "instruction": _Q,
            "completions": [{"response": _G, "overall_score": 9}, {"response": _B, "overall_score": 2}],
        },
    ),
    "helpsteer": Format(
        "preferences",
        lambda columns: is_compared(columns) and any(name in columns for name in SIGNED),
        read_compared,
        "HelpSteer3, HelpSteer2's preferences (`preference_strength`)",
        {"context": _said(_Q), "response1": _B, "response2": _G, "overall_preference": 2},
    ),
    "safe_rlhf": Format(
        "preferences",
        lambda columns: is_compared(columns) and "better_response_id" in columns,
        read_compared,
        "PKU-SafeRLHF",
        {"prompt": _Q, "response_0": _G, "response_1": _B, "better_response_id": 0},
    ),
    "arena": Format(
        "preferences",
        lambda columns: is_compared(columns) and "conversation_a" in columns,
        read_compared,
        "Chatbot Arena, MT-bench's human judgements",
        {"conversation_a": _said(_Q, _G), "conversation_b": _said(_Q, _B), "winner": "model_a"},
    ),
    "compared": Format(
        "preferences",
        is_compared,
        read_compared,
        "AlpacaFarm, RLCD, WebGPT, lmsys (55k): two answers (a and b, 0 and 1, 1 and 2) with a verdict or scores",
        {"instruction": _Q, "output_1": _B, "output_2": _G, "preference": 2},
    ),
    "shp": Format(
        "preferences",
        _has("history", "human_ref_a", "human_ref_b", "labels"),
        read_shp,
        "Stanford Human Preferences",
        {"history": _Q, "human_ref_A": _B, "human_ref_B": _G, "labels": 0},
    ),
    "list": Format(
        "preferences",
        lambda columns: any(
            _is_list(columns, name) and _strings(columns.peek(name)) for name in ("output", "response")
        ),
        read_list,
        "LLaMA-Factory (ranking lists)",
        {"instruction": _Q, "input": "", "output": [_G, _B]},
    ),
    "unpaired": Format(
        "unpaired",
        _is_labelled,
        read_unpaired,
        "TRL, LLaMA-Factory and ms-swift (KTO)",
        {"prompt": _Q, "completion": _G, "label": True},
    ),
    "instruction": Format(
        "instructions",
        lambda columns: (
            any(name in columns for name in ("response", "output"))
            and any(name in columns for name in PROMPTS)
            and not _is_labelled(columns)
        ),
        read_instruction,
        "Alpaca, TRL (prompt-completion), ms-swift, OpenRLHF, OpenOrca",
        {"instruction": _Q, "input": "", "output": _G},
    ),
    "conversation": Format(
        "instructions",
        lambda columns: (
            any(name in columns for name in ("messages", "conversations", "text")) and not _is_labelled(columns)
        ),
        read_conversation,
        "ShareGPT, OpenAI, TRL (conversational), ms-swift; `text` in a known template",
        {"messages": _said(_Q, _G)},
    ),
}
"""The formats in the order in which they are tried."""


def _strings(value: Any) -> bool:
    return all(isinstance(entry, str) for entry in value)
