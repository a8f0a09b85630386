"""Self-contained HTML pages: one style, sortable tables and plots; nothing is loaded from elsewhere."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))
MAX_POINTS = 400
INK, FIRST, SECOND, THIRD = "#111112", "#2563eb", "#d97706", "#059669"
"""Plot colours; INK is replaced by the page's text colour, so that plots follow light and dark."""


def page(title: str, body: str) -> str:
    """A whole HTML page around `body`, which is HTML already."""
    style, script = STYLE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head>\n<body><main><h1>{html.escape(title)}</h1>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def table_html(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that sorts by a click on a title; every cell is escaped, numbers stand to the right."""

    def cell(value: Any) -> str:
        side = ' class="number"' if isinstance(value, int | float) else ""
        return f"<td{side}>{html.escape(str(value))}</td>"

    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    lines = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


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


def thinned(values: Sequence[Any]) -> list[Any]:
    """At most MAX_POINTS of the values, evenly spaced, the first and the last among them: a page must stay small."""
    n = min(MAX_POINTS, len(values))
    return [values[round(index * (len(values) - 1) / max(1, n - 1))] for index in range(n)]


def plot_html(figure: Any, caption: str) -> str:
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
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
