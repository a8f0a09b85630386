"""Foreign words made harmless as plain text: what others wrote must not move a cursor, hide itself or begin a line.

What is foreign: rows and their names, settings, file names, reasons, tags, messages of servers and of libraries. A page
takes it through `components.report.html`, Markdown through `components.report.markdown`, a terminal through
`pipelines.terminal`; all three build on this.
"""

import re

from components.common.secrets import without_credentials

SHOWN_CHARACTERS = 120
NO_BREAK_SPACE = "\u00a0"
JOINERS = "\u200c\u200d"
"""Characters that some scripts and emoji need inside a word."""
NAME_PATTERN = r"^[\w(（][\w .,:/+()（）&'-]{0,98}[\w.+)）]$|^\w$"
"""Sources and licences of rows: ids as on model hubs, SPDX expressions, file names, in any script; one line."""
NAME_MEANING = "1 to 100 letters, digits, spaces and . , : / + - _ ( ) & ' in one line, a letter, digit or ( first"


def one_line(text: object, indented: bool = False) -> str:
    """The text on one line, without secrets, control, direction and invisible characters.

    Args:
        text: the text.
        indented: whether spaces at its beginning stay, as in a traceback.
    """
    masked = without_credentials(str(text))
    indent = len(masked) - len(masked.lstrip(" ")) if indented else 0
    line = re.sub(rf"[^\S{NO_BREAK_SPACE}]+", " ", masked).strip(" ")
    return " " * indent + visible(line, NO_BREAK_SPACE)


def visible(text: str, kept: str) -> str:
    """The text with `?` for every character that shows nothing, changes direction or controls a terminal.

    Args:
        text: any text.
        kept: such characters that stay.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in kept else "?" for c in text)


def shown(text: object) -> str:
    """A word of a row or file for an error message: one line of bounded length."""
    line = one_line(str(text)[: 4 * SHOWN_CHARACTERS])
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"
