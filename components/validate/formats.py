"""How answers are laid out: cues of format, which a model may learn in place of what makes an answer better."""

import re

TAG = re.compile(r"\s{0,8}<[A-Za-z][\w-]{0,30}>")
HEADING = re.compile(r"(?m)^#{1,6} \S")
ITEM = re.compile(r"(?m)^[ \t]{0,8}(?:[-*+•] |[0-9]{1,3}[.)] |[0-9]{1,3}[、．])\S")

FORMATS = ("opening_tag", "list", "heading", "code", "bold")
"""An answer that begins with a tag such as <think>; two list items, a heading, a fence or bold type anywhere in it."""


def formats_of(answer: str) -> int:
    """The formats that an answer has, as bits in the order of `FORMATS`."""
    found = 1 if "<" in answer[:16] and TAG.match(answer) else 0
    if "\n" in answer:
        first = ITEM.search(answer)
        found |= 2 if first and ITEM.search(answer, first.end()) else 0
    if "#" in answer and HEADING.search(answer):
        found |= 4
    if "```" in answer:
        found |= 8
    if answer.count("**") > 1:
        found |= 16
    return found
