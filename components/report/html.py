"""Self-contained HTML pages from jinja2 templates: one style, sortable tables, plots; nothing is loaded from elsewhere.

A page's words and markup stand in templates/, its numbers and sentences come from a view that the stage computes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from components.common.foreign import JOINERS, NO_BREAK_SPACE, visible
from components.common.secrets import without_credentials

TEMPLATES = Path(__file__).with_name("templates")
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
MAX_POINTS = 400
INK, FIRST, SECOND, THIRD = "#111112", "#2563eb", "#d97706", "#059669"
"""Plot colours; INK is replaced by the page's text colour, so plots follow light and dark mode."""

Row = Sequence[str | int | float]
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a column title; numbers are aligned right."""

    head: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Plot:
    """A plot as inline SVG, with a caption."""

    svg: str
    caption: str


def render(template: str, view: object) -> str:
    """A page from a template in templates/ and what it calls `view`; every value is escaped."""
    return environment().get_template(template).render(view=view)


def html(value: object) -> object:
    """What a template shows of a value: foreign text without secrets, control and direction characters.

    Line breaks stay, as answers have them; the environment escapes what this returns. Markup of ours passes.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return visible(without_credentials(value), f"\n\t{NO_BREAK_SPACE}{JOINERS}")


@cache
def environment() -> Environment:
    """The jinja2 environment of all pages, with autoescape; a name that the view lacks is an error."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.globals.update(style=STYLE.read_text(encoding="utf-8"), script=SCRIPT.read_text(encoding="utf-8"))
    return jinja


def new_plot(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """A matplotlib figure and axes in the page's style."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kubealign", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(5.2, 3.0))
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def downsample(values: Sequence[T]) -> list[T]:
    """At most MAX_POINTS of the values, evenly spaced, including the first and the last: keeps a page small."""
    n = min(MAX_POINTS, len(values))
    return [values[round(index * (len(values) - 1) / max(1, n - 1))] for index in range(n)]


def finish_plot(figure: Any, caption: str) -> Plot:
    """The figure as inline SVG with a caption; the figure is closed."""
    from matplotlib import pyplot

    for axes in figure.axes:
        legend = axes.get_legend()
        if legend:
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_color(INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    return Plot(svg[svg.index("<svg") :].replace(INK, "currentColor"), caption)
