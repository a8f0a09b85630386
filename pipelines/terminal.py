"""Texts on a terminal: whatever foreign words hold, they are shown as text."""

from rich.text import Text

from components.common.foreign import JOINERS, NO_BREAK_SPACE, one_line, visible
from components.common.secrets import without_credentials
from components.report.markdown import ZERO_WIDTH_SPACE


def terminal(text: object, indented: bool = False) -> Text:
    """A text on one line for a table cell, a console or `print`: no markup, no control characters, no secrets.

    Args:
        text: the text.
        indented: whether spaces at its beginning stay, as in a traceback.
    """
    return Text(one_line(text, indented))


def document(text: str) -> str:
    """A text of ours with many lines (JSON, YAML, Markdown), as it is but for secrets and control characters."""
    return visible(without_credentials(text), f"\n{NO_BREAK_SPACE}{ZERO_WIDTH_SPACE}{JOINERS}")
