"""Markdown made of foreign words: whatever they hold, it is read as text, in a comment, a table or a model card."""

import re

from components.common.foreign import one_line

ZERO_WIDTH_SPACE = "\u200b"
SPECIAL = re.compile(r"[\\`*\[\]|~&$]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)", re.IGNORECASE)
"""What begins emphasis, code, links, images, cells, entities, mathematics and addresses; not `_` inside a word."""
LINE_START = re.compile(r"^([-+=]|\d+(?=[.)]))")


class Markdown(str):
    """Markdown that is ours, or made harmless; it is not escaped again."""

    __slots__ = ()


def markdown(text: object) -> Markdown:
    """Foreign text as Markdown that shows it, on one line: no markup, HTML, link, image, mention or further cell."""
    if isinstance(text, Markdown):
        return text
    line = SPECIAL.sub(r"\\\g<0>", one_line(text)).replace("<", "&lt;").replace(">", "&gt;")
    # GitHub looks for @team and #12 in the rendered text, where an escape is gone.
    line = re.sub(r"[@#]", rf"\g<0>{ZERO_WIDTH_SPACE}", line)
    return Markdown(LINE_START.sub(lambda start: f"\\{start[0]}" if start[0] in "-+=" else f"{start[0]}\\", line))


def code(text: object) -> Markdown:
    """Foreign text as code, for what a reader copies; nothing in it is markup."""
    return Markdown(f"`{one_line(text).replace('`', chr(39)).replace('|', '¦') or ' '}`")


def bold(text: object) -> Markdown:
    """Foreign text in bold type."""
    return Markdown(f"**{markdown(text)}**")


def link(title: str, address: str) -> Markdown:
    """A link of ours; an address that is none, or could end the link, is shown as code."""
    harmless = re.fullmatch(r"https?://[\w./#?&=:%~+-]+", address)
    return Markdown(f"[{markdown(title)}]({address})") if harmless else Markdown(f"{markdown(title)} {code(address)}")


def table_row(*cells: object) -> Markdown:
    """A line of a table."""
    return Markdown(f"| {' | '.join(markdown(cell) for cell in cells)} |")
