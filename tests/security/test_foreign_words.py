"""Class INJ: what others wrote is shown as text, on a terminal, in Markdown and on a page."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table
from typer.testing import CliRunner

from components.common.errors import InputError
from components.config.params import load_config
from components.dataset import records
from components.dataset.records import SPLITS, Preference, check_names, content_id, read_rows, write_lines
from components.registry.champion import promote
from components.report import html, markdown
from components.report.html import environment
from components.report.markdown import code, link, table_row
from components.sources.data import DATA_SETS
from components.tracking import store
from components.validate import scan
from components.validate.stage import run_validate
from pipelines import terminal
from pipelines.ci import outcome
from pipelines.cli import app
from pipelines.commands import registry
from pipelines.data import versions
from tests.conftest import ROOT
from tests.support.component_kit import empty_mlflow, own_home
from tests.support.versions import NAME, with_versions

__all__ = ["empty_mlflow", "own_home"]  # an MLflow with its tables made

# ---- the rule: nothing foreign is printed or written as Markdown another way

HARMLESS = {"terminal", "document", "one_line", "markdown", "harmless", "bold", "code", "link", "table_row", "len"}
"""What makes a foreign word harmless; `harmless` is `markdown` where another function has that name."""
PRINTERS = {"print", "add_row", "add_column", "typer.confirm", "typer.echo", "typer.secho"}
LINES = {"lines", "parts", "quoted", "findings"}
"""Variables of lines of Markdown."""
MARKDOWN_LINE = re.compile(r"\s*(\||##+ |> |[-*] |\*\*)|.*\]\(", re.DOTALL)
NUMBER_FORMAT = re.compile(r"[-+,.\d]*[dfge%]|,")


def violations(source: str) -> list[str]:
    """The expressions of a module that reach a person without having passed one of the functions."""
    rule = Rule(ast.parse(source), "components.report.markdown import" in source, "rich.table" in source)
    return [ast.unparse(part) for part in rule.violations()]


class Rule:
    def __init__(self, tree: ast.Module, writes_markdown: bool, has_tables: bool) -> None:
        self.tree, self.writes_markdown, self.has_tables = tree, writes_markdown, has_tables
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.returns]
        made = {f.name for f in functions if f.returns and ast.unparse(f.returns) in ("Markdown", "Table")}
        self.harmless = HARMLESS | made

    def violations(self) -> Iterator[ast.expr]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and self.shows(node.func):
                yield from (part for part in node.args if not self.is_harmless(part))
            elif isinstance(node, ast.JoinedStr) and is_markdown(node) and not self.is_harmless(node):
                yield node
            elif self.writes_markdown:
                yield from (lines for lines in lines_of(node) if not self.are_harmless(lines))

    def shows(self, function: ast.expr) -> bool:
        is_table = self.has_tables and name_of(function) == "Table"
        return is_table or name_of(function) in PRINTERS or ast.unparse(function) in PRINTERS

    def is_harmless(self, part: ast.expr) -> bool:  # noqa: PLR0911 - a case for each kind of expression
        match part:
            case ast.Constant():
                return True
            case ast.Name(id=name):  # a rich table, whose cells are checked where they are added; a constant
                return name == "table" or name.isupper()
            case ast.Starred(value=ast.Call(func=ast.Name(id="map"), args=[ast.Name(id=function), *_])):
                return function in HARMLESS
            case ast.Call(func=ast.Name(id="str"), args=[inner]):
                return self.is_harmless(inner)
            case ast.Call(func=function):
                return name_of(function) in self.harmless
            case ast.IfExp(body=one, orelse=other):
                return self.is_harmless(one) and self.is_harmless(other)
            case ast.BinOp(left=left, op=ast.Add() | ast.Mult(), right=right):
                return self.is_harmless(left) and self.is_harmless(right)
            case ast.JoinedStr(values=values):
                return all(self.is_harmless(value) for value in values)
            case ast.FormattedValue(value=value, format_spec=ast.JoinedStr(values=[ast.Constant(value=str(form))])):
                return NUMBER_FORMAT.fullmatch(form) is not None or self.is_harmless(value)
            case ast.FormattedValue(value=value):
                return self.is_harmless(value)
        return False

    def are_harmless(self, lines: ast.expr) -> bool:  # noqa: PLR0911 - the same
        """Whether each of the lines is harmless; a function with `_` that gives lines makes its own `lines`."""
        match lines:
            case ast.List(elts=parts):
                return all(
                    self.are_harmless(part.value) if isinstance(part, ast.Starred) else self.is_harmless(part)
                    for part in parts
                )
            case ast.ListComp(elt=part) | ast.GeneratorExp(elt=part):
                return self.is_harmless(part)
            case ast.IfExp(body=one, orelse=other):
                return self.are_harmless(one) and self.are_harmless(other)
            case ast.Name(id=name):
                return name in LINES
            case ast.Call(func=ast.Name(id="map"), args=[ast.Name(id=function), *_]):
                return function in HARMLESS
            case ast.Call(func=ast.Name(id=function)):
                return function.startswith("_")
        return False


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_markdown(text: ast.JoinedStr) -> bool:
    written = [str(part.value) for part in text.values if isinstance(part, ast.Constant)]
    begins = isinstance(text.values[0], ast.Constant) and MARKDOWN_LINE.match(written[0])
    return bool(begins) or any("](" in part for part in written)


def lines_of(node: ast.AST) -> Iterator[ast.expr]:
    """What a module that writes Markdown makes its lines of."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            yield from (value for name, value in zip(names, values, strict=True) if name_of(name) in LINES)
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in LINES:
            yield value
        case ast.AugAssign(target=ast.Name(id=name), value=value) if name in LINES:
            yield value
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]) if name in LINES:
            yield ast.List([value])


MODULES = sorted(path for room in ("components", "pipelines") for path in (ROOT / room).rglob("*.py"))


def test_nothing_foreign_is_shown_another_way() -> None:
    product = [path for path in MODULES if "tests" not in path.parts and path.name != "markdown.py"]
    found = {str(path.relative_to(ROOT)): violations(path.read_text(encoding="utf-8")) for path in product}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "planted",
    [
        'console.print(f"{name}: done")',
        "console.print(reason, soft_wrap=True)",
        'print("error:", error)',
        'print(f"{name} has {count:d} rows")',
        "table.add_row(row.source, terminal(row.license))",
        "table.add_row(*map(str, cells))",
        'from rich.table import Table\nTable("source", heading)',
        'typer.confirm(f"remove {name}?")',
        "text = f'| {source} | {rows:d} |'",
        "text = f'see [{title}]({address})'",
        "from components.report.markdown import x\nlines = ['# Report', sentence]",
        "from components.report.markdown import x\nlines += [f'**{bold(name)}**', *(check for check in checks)]",
        "from components.report.markdown import x\nlines.append(error)",
    ],
)
def test_the_rule_finds_a_planted_line(planted: str) -> None:
    assert len(violations(planted)) == 1


def test_templates_escape_everything_but_style_script_and_plots() -> None:
    marked = [
        name
        for path in sorted((ROOT / "components/report/templates").glob("*.jinja"))
        for name in re.findall(r"\{\{ *([\w.]+) *\| *safe", path.read_text(encoding="utf-8"))
    ]
    assert sorted(marked) == ["plot.svg", "script", "style"]
    assert environment().autoescape is True
    assert environment().finalize is html.html


# ---- the functions

EVIL = {
    "control": "Apache-2.0\x1b]0;PWNED\x07\x9b2J",
    "lines": "mdset\n\n## Validation: accepted\n\n| a | b |",
    "direction": "safe\u202egpj.exe\u2066",
    "mention": "@acme/release-managers see #12 and &#64;acme",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "image": "![x](https://evil.example/pixel.png) [click](https://evil.example)",
    "address": "https://evil.example www.evil.example a@evil.example",
    "cells": "a | b \\| c | `d` | **e** _f_ ~~g~~",
    "markup": "fixes [/issue-12] [red]x[/red] [link=https://evil.example]y[/link] :boom:",
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_foreign_words_are_text_in_markdown(evil: str) -> None:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = parser.render(f"| source | rows |\n|---|---|\n{table_row(evil, 7)}\n\n{markdown.markdown(evil)}\n")
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert page.count("<td>") == 2
    assert not re.search(r"@\w|#\d", page), "GitHub mentions and links what reads so after it was rendered"
    assert not re.search(r"(?<!\\)://|www\.", table_row(evil))
    assert all(c.isprintable() or c in "\n\u200b" for c in page)


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_foreign_words_are_text_in_code_and_links(evil: str) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    page = parser.render(f"| a | b |\n|---|---|\n{table_row(code(evil), 7)}\n\n{code(evil)} {link('the run', evil)}\n")
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "p", "code"}
    assert page.count("<td>") == 2


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_foreign_words_are_text_on_a_terminal(evil: str) -> None:
    console = Console(force_terminal=True, width=300, color_system="truecolor")
    table = Table(box=None, show_header=False)
    table.add_row(terminal.terminal(evil), terminal.terminal(7))
    with console.capture() as captured:
        console.print(table)
        console.print(terminal.terminal(evil), highlight=False)
    lines = captured.get().splitlines()
    assert len(lines) == 2
    assert all(line.replace("\x1b[0m", "").isprintable() for line in lines)
    assert all(word in lines[1] for word in re.findall(r"\[/?[\w=-]+\]|:boom:", evil))


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL.keys())
def test_foreign_words_are_text_on_a_page(evil: str) -> None:
    page = environment().from_string("<p>{{ view }}</p>").render(view=evil)
    assert re.findall(r"<[^>]*>", page) == ["<p>", "</p>"]
    assert all(c.isprintable() or c == "\n" for c in page)


def test_names_that_real_data_has_stay_as_they_are() -> None:
    for name in (
        "openbmb/UltraFeedback",
        "Anthropic/hh-rlhf v1.0",
        "知乎-问答（2024）",
    ):
        assert records.is_name(name)
        assert str(terminal.terminal(name)) == name
    for name in ("Apache-2.0", "(MIT AND CC-BY-SA-4.0) OR GPL-2.0+", "LicenseRef-scancode-x", "proprietary"):
        assert records.is_name(name)
    assert markdown.markdown("openbmb/UltraFeedback_v1.0-binarized (en)") == "openbmb/UltraFeedback_v1.0-binarized (en)"


def test_without_the_functions_the_attacks_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "one_line", str)
    monkeypatch.setattr(markdown, "SPECIAL", re.compile("(?!)"))
    assert "\n\n| a | b |" in markdown.markdown(EVIL["lines"])
    assert table_row(EVIL["cells"]).count(" | ") > 1
    monkeypatch.setattr(terminal, "one_line", lambda text, indented: str(text))
    assert "\x1b]0;PWNED" in str(terminal.terminal(EVIL["control"]))
    with pytest.raises(Exception, match="closing tag"):
        Console().print(EVIL["markup"])
    monkeypatch.setattr(environment(), "autoescape", False)
    assert "<script>" in environment().from_string("{{ view }}").render(view=EVIL["html"])


# ---- rows


def a_row(**changes: object) -> dict[str, Any]:
    row = {"id": "0" * 16, "group": "0" * 16, "prompt": [{"role": "user", "content": "Why?"}], "lang": "en"}
    return row | {"source": "mine", "license": "MIT", "chosen": "Because.", "rejected": "No."} | changes


@pytest.mark.parametrize("field", ["source", "license"])
@pytest.mark.parametrize("evil", [*EVIL.values(), "", " ", "x" * 101, "MIT\n"])
def test_a_row_with_such_a_name_is_refused_with_its_line_and_value(tmp_path: Path, field: str, evil: str) -> None:
    path = tmp_path / "train.jsonl"
    write_lines(path, [a_row(), a_row(**{field: evil})])
    with pytest.raises(InputError) as refused:
        read_rows(path, Preference)
    with pytest.raises(InputError) as prepared:
        check_names(a_row(**{field: evil}), f"{path}:2")
    for error, where in ((refused, f"{path}: row 2"), (prepared, f"{path}:2")):
        message = str(error.value)
        assert where in message
        assert f"'{field}'" in message
        assert "100 letters" in message
        assert message.isprintable()


def test_without_the_pattern_such_a_row_is_read(tmp_path: Path) -> None:
    """A schema as it was: any text."""
    write_lines(tmp_path / "train.jsonl", [a_row(source=EVIL["lines"])])

    class Loose(Preference):
        source: str  # type: ignore[assignment]

    assert read_rows(tmp_path / "train.jsonl", Loose)[0].source == EVIL["lines"]


# ---- the real commands


def test_a_failed_retraining_is_no_markup_in_its_summary(tmp_path: Path) -> None:
    request = outcome.RetrainRequest("c" * 40, "`k` | @acme/x", "<b>", "https://ok.example/#/runs/details/1")
    message = "\n".join(["step sft failed", *EVIL.values()])
    outcome.write_failure(tmp_path, request, "failed", message)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text.removeprefix(outcome.MARKER))
    assert set(re.findall(r"</?(\w+)", page)) <= {"h2", "blockquote", "p", "ul", "li", "code", "a"}
    assert re.findall(r'href="([^"]*)"', page) == [request.link]
    described = json.loads((tmp_path / "status.json").read_text())["description"]
    assert described.isprintable()
    told = json.loads((tmp_path / "verdict.json").read_text())["error"]
    assert told.replace("\n", "").isprintable()


def history() -> Any:
    return CliRunner().invoke(app, ["history", "--name", NAME, "--project", str(ROOT)], env={"COLUMNS": "300"})


@pytest.mark.integration
def test_a_history_is_shown_whatever_a_reason_says(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason is a parameter of MLflow, which nobody can write again; these were written past the command."""
    monkeypatch.setattr(registry, "console", Console(width=300))
    client = with_versions(store.client(), 2)
    promote(client, NAME, "1", "force", EVIL["markup"], expected="")
    promote(client, NAME, "2", "force", EVIL["control"] + EVIL["direction"], expected="1")
    done = history()
    assert done.exit_code == 0
    assert "fixes [/issue-12] [red]x[/red]" in done.output
    assert done.output.replace("\n", "").isprintable()
    monkeypatch.setattr(registry, "terminal", str)
    assert isinstance(history().exception, MarkupError)


TRAIN = ("preferences", "train")


def pair(question: str, **changes: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    row = a_row(id=content_id(prompt, "Because.", "No."), group=content_id(prompt), prompt=prompt)
    return row | changes


def instruction(row: dict[str, Any]) -> dict[str, Any]:
    shared = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return shared | {"id": content_id(row["prompt"], "Because."), "response": "Because."}


@pytest.mark.integration
def test_a_forged_source_reaches_no_page(tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pages = tmp_path / "data", (tmp_path / "report.html", tmp_path / "report.md")
    forged = [pair(f"forged {name}", source=evil) for name, evil in EVIL.items()]
    for name in DATA_SETS:
        (data / name).mkdir(parents=True)
        for split in SPLITS:
            rows = [pair(f"{split} {name} {number}") for number in range(3)]
            if name == "instructions":
                rows = [instruction(row) for row in rows]
            write_lines(data / name / f"{split}.jsonl", rows + (forged if (name, split) == TRAIN else []))
    config = load_config(ROOT / "params.yaml", ["validate.min_rows=1", "validate.max_quarantined=1"])

    def validate() -> tuple[set[str], str]:
        run_validate(config.validate_, 256, data, base_model, tmp_path / "clean", *pages)
        summary = json.loads((tmp_path / "clean" / "validation.json").read_text(encoding="utf-8"))
        return set(summary["preferences"]["sources"]), "".join(page.read_text(encoding="utf-8") for page in pages)

    sources, shown = validate()
    assert sources == {"mine", records.NO_NAME}
    for word in ("PWNED", "acme", "onerror", "evil.example", "## Validation"):
        assert word not in shown
    aside = [json.loads(line) for line in (tmp_path / "clean" / "quarantine.jsonl").read_text().splitlines()]
    named = [entry for entry in aside if "'source' is '" in entry.get("detail", "")]
    assert len(named) == len(EVIL)
    assert all(entry["detail"].isprintable() and entry["line"] > 3 for entry in named)
    monkeypatch.setattr(scan, "name_of", str)
    sources, _ = validate()
    assert EVIL["html"] in sources, "what the model card and the evaluation list"


def test_rows_of_another_version_are_counted_by_names(tmp_path: Path) -> None:
    for name in DATA_SETS:
        for split in SPLITS:
            (tmp_path / name).mkdir(exist_ok=True)
            write_lines(tmp_path / name / f"{split}.jsonl", [a_row(source=EVIL["html"], lang="\x1b[2J")])
    entries = versions._entries(tmp_path / DATA_SETS[0])
    assert {(entry.lang, entry.source) for found in entries.values() for entry in found} == {(records.NO_NAME,) * 2}
