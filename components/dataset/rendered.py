"""Conversations that a chat template has rendered to text, taken apart into messages where that is certain.

It is certain when the text begins with a template's own opening of a turn and nothing of the markers is left in the
messages. Everything else stays text; `validate` finds the markers in it (check `template_text`).
"""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "instruction": "user",
    "assistant": "assistant",
    "model": "assistant",
    "response": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Family:
    """A kind of template.

    Args:
        opening: begins a turn; its group is the role.
        endings: markers that end a turn.
        starts: what may stand before the first turn.
        preamble: a system text without a role that may stand before the first turn.
    """

    opening: re.Pattern[str]
    endings: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    preamble: re.Pattern[str] | None = None
    plain: bool = False
    """Whether the markers are plain words, which people write as well: they may then stand in a message."""


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
        re.compile(r"<[｜|](User|Assistant)[｜|]>"), ("<｜end▁of▁sentence｜>",), ("<｜begin▁of▁sentence｜>",)
    ),
    "hh": Family(re.compile(r"(?:\A|\n\n)(Human|Assistant):"), plain=True),
    "guanaco": Family(re.compile(r"###[ \t]*(Human|Assistant):"), ("</s>",), ("<s>",)),
    "alpaca": Family(
        re.compile(r"(?m:^)[ \t]*###[ \t]*(Instruction|Response):[ \t]*\n?"),
        ("</s>",),
        ("<s>",),
        re.compile(r"Below is an instruction that describes a task.*?(?=###)", re.DOTALL),
    ),
    "vicuna": Family(
        re.compile(r"(?:(?<!\S)|(?<=</s>))(USER|ASSISTANT):"),
        ("</s>",),
        ("<s>",),
        re.compile(r"A chat between a curious (?:user|human).*?(?=\s(?:USER|ASSISTANT):)", re.DOTALL),
    ),
}
LLAMA2 = re.compile(r"(\[/?INST\])")
ALPACA_INPUT = re.compile(r"\n[ \t]*###[ \t]*Input:[ \t]*\n")
MARKERS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|(?:eot_id|begin_of_text|end_of_text|endoftext)\|>"
    r"|<(?:start|end)_of_turn>|<\|(?:system|user|assistant|end)\|>|<[｜|](?:User|Assistant)[｜|]>"
    r"|\A\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:"
    r"|<｜(?:begin|end)▁of▁sentence｜>|\[/?INST\]|<</?SYS>>|\A\s*<s>|</s>\s*\Z"
    r"|(?m:^[ \t]*###[ \t]*(?:Instruction|Response|Human|Assistant):)"
    r"|(?:\A\s*|\n\n)(?:Human|Assistant):|\b(?:USER|ASSISTANT):\s"
)
"""What a template writes and a person hardly does."""
MAX_LITERAL = 1 << 15
"""Characters from which nothing is read as Python writes it: a syntax tree takes 20 times as long as JSON, and hundreds
of bytes for each character."""
MAX_TURNS = 1000
"""Turns from which a text is no conversation; reading so many takes ten times as long as reading a text."""
ENDINGS = tuple(sorted({ending for family in FAMILIES.values() for ending in family.endings}))
HINTS = {
    "<": ("<|", "<｜", "_of_turn>", "SYS>>", "<s>", "</s>"),
    "#": ("###",),
    "[": ("INST]", *(f"{quote}{key}{quote}" for quote in "'\"" for key in ("role", "from", "content", "value"))),
    ":": ("Human:", "Assistant:", "USER:", "ASSISTANT:"),
}
"""Every marker has one of these in it, and the character before them: a cheap pre-filter."""


def parse_rendered(text: str) -> list[Message] | None:
    """The messages of a rendered conversation, without an assistant's turn that is only opened; None if it is none.

    Args:
        text: a prompt or a whole dialogue.
    """
    stripped = text.strip()
    if stripped.startswith("["):
        return _parse_json(stripped) or _parse_llama2(stripped)
    if stripped.startswith("<s>") and stripped[3:].lstrip().startswith("[INST]"):
        return _parse_llama2(stripped)
    if not MARKERS.search(stripped[:4096]):
        return None
    for family in FAMILIES.values():
        messages = _parse_family(text, family)
        if messages:
            return messages
    return None


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
    stripped = answer.strip()
    end = len(stripped)
    while ending := next((ending for ending in ENDINGS if stripped.endswith(ending, 0, end)), ""):
        end -= len(ending)
        while end and stripped[end - 1].isspace():
            end -= 1
    return stripped[:end]


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
    rest = text.strip()
    for start in family.starts:
        rest = rest.lstrip().removeprefix(start) if rest.lstrip().startswith(start) else rest
    system = []
    if family.preamble and (found := family.preamble.match(rest)):
        system = [{"role": "system", "content": found.group().strip()}]
        rest = rest[found.end() :]
        rest = rest.lstrip() if family.opening.match(rest.lstrip()) else rest
    before, *pieces = family.opening.split(rest)
    if before.strip() or not pieces or len(pieces) > 2 * MAX_TURNS:
        return None
    messages = list(system)
    for role, content in zip(pieces[::2], pieces[1::2], strict=True):
        text = content.strip()
        for ending in family.endings:
            text = text.removesuffix(ending).rstrip()
        parts = ALPACA_INPUT.split(text) if "###" in text else [text]
        messages.append({"role": ROLES[role.lower()], "content": "\n\n".join(part.strip() for part in parts)})
    return _checked(messages, family.plain)


def _parse_llama2(text: str) -> list[Message] | None:
    before, *pieces = LLAMA2.split(text)
    marks, contents = pieces[::2], pieces[1::2]
    if before.strip().removeprefix("<s>").strip() or len(marks) > 2 * MAX_TURNS:
        return None
    if marks != ["[INST]", "[/INST]"] * (len(marks) // 2):
        return None
    messages: list[Message] = []
    for number, content in enumerate(map(str.strip, contents)):
        if number % 2:
            answer = content.removesuffix("<s>").rstrip().removesuffix("</s>").strip()
            messages.append({"role": "assistant", "content": answer})
            continue
        system, found, question = content.partition("<</SYS>>")
        has_system = content.startswith("<<SYS>>") and bool(found)
        if has_system:
            if messages:
                return None
            messages.append({"role": "system", "content": system.removeprefix("<<SYS>>").strip()})
        messages.append({"role": "user", "content": question.strip() if has_system else content})
    return _checked(messages)


def _parse_json(text: str) -> list[Message] | None:
    """Messages written as JSON, or as Python shows them."""
    value = parse_literal(text)
    messages = []
    for entry in value if isinstance(value, list) else []:
        if not isinstance(entry, dict):
            return None
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None or not isinstance(content, str):
            return None
        messages.append({"role": known, "content": content})
    return messages or None


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
