"""Conversations that a chat template has rendered to text, taken apart into messages where that is certain.

It is certain when the text begins with a template's own opening of a turn and nothing of the markers is left in the
messages. Everything else stays text; `validate` finds the markers in it (check `template_text`).
"""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from components.common.errors import RowError
from components.dataset.messages import ROLES, Message, messages_of, turn


@dataclass(frozen=True)
class Family:
    """A kind of template.

    Args:
        opening: begins a turn; its group is the role.
        endings: markers that end a turn.
        starts: what may stand before the first turn.
        preamble: a system text without a role that may stand before the first turn.
        plain: whether the markers are plain words, which people write as well: they may then stand in a message.
        answered: whether it is certain only with a turn of the assistant, which may be empty: the one to come.
    """

    opening: re.Pattern[str]
    endings: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    preamble: re.Pattern[str] | None = None
    plain: bool = False
    answered: bool = False


FAMILIES = {
    "chatml": Family(
        re.compile(r"<\|im_start\|>(system|user|assistant)[ \t]*\n?"), ("<|im_end|>",), ("<s>", "<|endoftext|>")
    ),
    "llama3": Family(
        re.compile(r"<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>\s{0,2}"),
        ("<|eot_id|>", "<|end_of_text|>"),
        ("<|begin_of_text|>",),
    ),
    "gemma": Family(re.compile(r"<start_of_turn>(user|model)\n?"), ("<end_of_turn>", "<eos>"), ("<bos>",)),
    "zephyr": Family(
        re.compile(r"<\|(system|user|assistant)\|>\n?"), ("</s>", "<|end|>", "<|endoftext|>"), ("<s>", "<|endoftext|>")
    ),
    "deepseek": Family(
        re.compile(r"<[｜|](User|Assistant)[｜|]>"),
        ("<｜end▁of▁sentence｜>",),
        ("<｜begin▁of▁sentence｜>",),
        re.compile(r"[^<]+(?=<[｜|]User[｜|]>)"),
    ),
    "hh": Family(re.compile(r"(?:\A|\n\n)(Human|Assistant):"), plain=True),
    "user": Family(re.compile(r"(?:\A|\n)(System|User|Assistant):"), plain=True, answered=True),
    "chatglm": Family(
        re.compile(r"(?:\A|\n)(?:\[Round \d+\]\n+)?(问|答|用户|人类|助手)[:：]"), plain=True, answered=True
    ),
    "guanaco": Family(re.compile(r"###[ \t]*(Human|Assistant):"), ("</s>",), ("<s>",)),
    "alpaca": Family(
        re.compile(r"(?:\A|\n)[ \t]*###[ \t]*(Instruction|Response):[ \t]*\n?"),
        ("</s>",),
        ("<s>",),
        re.compile(r"Below is an instruction that describes a task.*?(?=###)", re.DOTALL),
    ),
    "vicuna": Family(
        re.compile(r"(?:\A|(?<=\s)|(?<=</s>))(USER|ASSISTANT):"),
        ("</s>",),
        ("<s>",),
        re.compile(r"A chat between a curious (?:user|human).*?(?=\s(?:USER|ASSISTANT):)", re.DOTALL),
    ),
}
LIST_OF_OBJECTS = re.compile(r"\[\s*\{\s*['\"]")
MAX_LITERAL = 1 << 15
"""Characters from which nothing is read as Python writes it: a syntax tree takes 20 times as long as JSON, and hundreds
of bytes for each character."""
MAX_TURNS = 1000
"""Most turns that are taken apart: more is no conversation, and would take long."""
ENDINGS = sorted({ending for family in FAMILIES.values() for ending in family.endings})
LLAMA2 = re.compile(r"(?:<s>)?[ \n]?\[INST\](.*?)\[/INST\]", re.DOTALL)
LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
ALPACA_INPUT = re.compile(r"\n[ \t]*###[ \t]*Input:[ \t]*\n")
MARKERS = re.compile(
    r"<\|[A-Za-z_]\w*\|>|<｜[^｜\n]{1,40}｜>|<[｜|](?:User|Assistant)[｜|]>|<(?:start|end)_of_turn>|<reserved_\d+>"
    r"|\A\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:"
    r"|\[/?INST\]|<</?SYS>>|\A\s*<s>|</s>\s*\Z|\[gMASK\]|<用户>|\A\s*\[Round \d+\]"
    r"|(?m:^[ \t]*###[ \t]*(?:Instruction|Response|Human|Assistant):)"
    r"|(?:\A\s*|\n\n)(?:Human|Assistant):|\b(?:USER|ASSISTANT):\s"
)
HINTS = {
    "<": ("<|", "<｜", "_of_turn>", "SYS>>", "<s>", "</s>", "<reserved_", "<用户>"),
    "#": ("###",),
    "[": (
        *("INST]", "[gMASK]", "[Round "),
        *(f"{quote}{key}{quote}" for quote in "'\"" for key in ("role", "from", "content", "value")),
    ),
    ":": ("Human:", "Assistant:", "USER:", "ASSISTANT:"),
}
"""Every marker has one of these in it, and the character before them: a cheap pre-filter."""


def parse_rendered(text: str) -> list[Message] | None:
    """The messages of a rendered conversation, without an assistant's turn that is only opened; None if it is none.

    Args:
        text: a prompt or a whole dialogue.
    """
    stripped = text.strip()
    if LIST_OF_OBJECTS.match(stripped) and (messages := _parse_json(stripped)):
        return messages
    families = (_parse_family(stripped, family) for family in FAMILIES.values())
    return next(filter(None, families), None) or _parse_llama2(stripped)


def opens_rendered(text: str) -> bool:
    """Whether a text begins as a rendered conversation does."""
    start = text.lstrip()[:4096]
    for family in FAMILIES.values():
        for before in family.starts:
            start = start.removeprefix(before).lstrip()
        if family.opening.match(start):
            return True
    return start.removeprefix("<s>").lstrip().startswith("[INST]")


def strip_ending(answer: str) -> str:
    """An answer without the marker with which a template ends it; for answers to a rendered prompt."""
    end = len(answer.rstrip())
    while ending := next((ending for ending in ENDINGS if answer.endswith(ending, 0, end)), None):
        end -= len(ending)
        while end and answer[end - 1].isspace():
            end -= 1
    return answer[:end].strip()


def has_markers(text: str) -> bool:
    """Whether a text has a marker of a template in it."""
    return has_hints(text) and MARKERS.search(text) is not None


def has_hints(text: str) -> bool:
    """Whether a text, or several joined, may have a marker in it."""
    for character, hints in HINTS.items():
        if character in text:
            for hint in hints:
                if hint in text:
                    return True
    return False


def parse_literal(text: str) -> Any:
    """A list or an object written as JSON, or as Python shows it; None for any other text."""
    for read in (json.loads, ast.literal_eval) if len(text) < MAX_LITERAL else (json.loads,):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _parse_family(text: str, family: Family) -> list[Message] | None:
    rest = text
    for start in family.starts:
        rest = rest.removeprefix(start).lstrip()
    messages = []
    if family.preamble and (found := family.preamble.match(rest)):
        messages = [turn("system", found.group().strip())]
        rest = rest[found.end() :].lstrip()
    if not family.opening.match(rest):
        return None
    _, *pieces = family.opening.split(rest, MAX_TURNS + 1)
    if len(pieces) > 2 * MAX_TURNS:
        return None
    for role, content in zip(pieces[::2], pieces[1::2], strict=True):
        text = content.strip()
        for ending in family.endings:
            text = text.removesuffix(ending).rstrip()
        parts = ALPACA_INPUT.split(text) if "###" in text else [text]
        messages.append(turn(ROLES[role.lower()], "\n\n".join(part.strip() for part in parts)))
    if family.answered and not any(message["role"] == "assistant" for message in messages):
        return None
    return _checked(messages, family.plain)


def _parse_llama2(text: str) -> list[Message] | None:
    messages: list[Message] = []
    position = 0
    while len(messages) <= MAX_TURNS and (match := LLAMA2.match(text, position)):
        question = match.group(1)
        if not messages and (system := LLAMA2_SYSTEM.match(question)):
            messages.append(turn("system", system.group(1).strip()))
            question = question[system.end() :]
        messages.append(turn("user", question.strip()))
        position = text.find("[INST]", match.end())
        position = len(text) if position < 0 else position
        answer = text[match.end() : position].strip().removesuffix("<s>").rstrip().removesuffix("</s>").rstrip()
        messages.append(turn("assistant", answer))
    return _checked(messages) if messages and position >= len(text) else None


def _parse_json(text: str) -> list[Message] | None:
    """Messages written as JSON, or as Python shows them."""
    value = parse_literal(text)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return None
    try:
        return messages_of(value, "messages") or None
    except RowError:
        return None


def _checked(messages: list[Message], plain: bool = False) -> list[Message] | None:
    """The messages, if the template left nothing of itself in them."""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages = messages[:-1]
    messages = [message for message in messages if message["role"] != "system" or message["content"]]
    if not messages or any(not message["content"] for message in messages):
        return None
    if not plain and any(has_markers(message["content"]) for message in messages):
        return None
    return messages
