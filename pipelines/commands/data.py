"""`kubealign data`: add your own pairs, and see how the data changed."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.common.documents import JsonObject
from components.common.errors import InputError
from components.config.data import DataConfig
from components.config.params import PARAMS, load_config
from pipelines.commands.options import Overrides, Project
from pipelines.project import project_folder
from pipelines.terminal import document, terminal

if TYPE_CHECKING:  # imports pandas indirectly, for which the other commands need not wait
    from collections.abc import Callable

    from pipelines.data.add import Preview

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()
SHOWN = 5
"""Quarantine reasons shown."""
SHOWN_CHARACTERS = 240
"""Of a text in the preview."""

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@app.command()
def add(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="JSON lines, JSON, CSV or Parquet; gzip, zstd, bzip2 or xz.")
    ],
    instructions: Annotated[
        bool, typer.Option("--instructions", help="The rows are prompts with one answer each, for SFT alone.")
    ] = False,
    format_name: Annotated[
        str, typer.Option("--format", help="A format of components/prepare/README.md; detected by default.")
    ] = "",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column that is no part of the conversation; repeatable."),
    ] = None,
    group: Annotated[
        str, typer.Option(metavar="COLUMN", help="Rows with the same value there stay on one side of the split.")
    ] = "",
    language: Annotated[str, typer.Option(help="en, zh or auto (by script), for rows that name neither.")] = "auto",
    licence: Annotated[str, typer.Option("--licence", "--license", help="Licence of rows that do not name one.")] = "",
    source: Annotated[str, typer.Option(help="Source name; by default the file name without extension.")] = "",
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Add your own pairs to the data: convert, check and version them; shows the changes and asks first."""
    from components.dataset.records import LANGUAGES
    from components.prepare.convert import AUTO, RowDefaults
    from components.prepare.formats import FORMATS
    from components.prepare.sources import SourceKind
    from pipelines.data.add import add as add_files

    if format_name and format_name not in FORMATS:
        raise InputError(f"--format {format_name}: expected one of {', '.join(FORMATS)}")
    if language not in (*LANGUAGES, AUTO):
        raise InputError(f"--language {language}: expected {', '.join(LANGUAGES)} or {AUTO}")
    root = project_folder(project)
    kind: SourceKind = "instructions" if instructions else "preferences"
    if format_name and FORMATS[format_name].kind != kind:
        named = FORMATS[format_name].kind
        raise InputError(
            f"--format {format_name}: its rows are {named}; {'drop' if instructions else 'add'} --instructions"
        )
    ignored = (*(ignore or ()), *([group] if group else []))
    defaults = RowDefaults(format_name, language, licence.strip(), source, kind, ignored, group)
    config = load_config(root / PARAMS)
    _tell(add_files(root, config, [path.absolute() for path in files], defaults, _confirm(yes)))


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The source, as `kubealign data log` names it.")],
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Take a source that you added out of the data, with its rows; shows the changes and asks first.

    Its rows stay in earlier versions, in git and in the DVC cache and remote: `dvc gc` says how to delete them there.
    """
    from pipelines.data.add import remove as remove_source

    root = project_folder(project)
    _tell(remove_source(root, load_config(root / PARAMS), name, _confirm(yes)))


@app.command()
def rename(
    name: Annotated[str, typer.Argument(help="The source, as `kubealign data log` names it.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Give a source that you added another name, also in its rows; shows the changes and asks first."""
    from pipelines.data.add import rename as rename_source

    root = project_folder(project)
    _tell(rename_source(root, load_config(root / PARAMS), name, new, _confirm(yes)))


def _confirm(yes: bool) -> "Callable[[Preview], bool]":
    def confirm(preview: "Preview") -> bool:
        _show(preview)
        if preview.known and not preview.difference:
            return True  # an earlier call may have been stopped just before its last step
        if yes:
            return True
        if not sys.stdin.isatty():
            raise InputError("confirmation needed and there is no terminal; pass --yes")
        return typer.confirm("write this?")

    return confirm


def _tell(written: dict[str, Path] | None) -> None:
    if written is None:
        console.print("nothing was written")
    else:
        console.print("the data is ready; to keep this version:\n  git add data dvc.lock\n  git commit && dvc push")


@app.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="REV_A", help="Branch, tag, commit, or `workspace`.")] = "HEAD",
    new: Annotated[str, typer.Argument(metavar="REV_B", help="Branch, tag, commit, or `workspace`.")] = "workspace",
    as_json: Json = False,
    project: Project = None,
) -> None:
    """Show which rows were added, removed and changed between two versions, by language and source."""
    from pipelines.data import versions as data_versions

    difference = data_versions.diff(_data(project), old, new)
    if as_json:
        keys = ("data_set", "language", "source")
        rows = [dict(zip(keys, key, strict=True)) | _counts(counts) for key, counts in difference.items()]
        print(document(json.dumps(rows, ensure_ascii=False, indent=1)))
    elif difference:
        console.print(_table(difference))
    else:
        console.print(terminal(f"{old} and {new} hold the same rows"))


@app.command()
def show(
    row: Annotated[str, typer.Argument(help="Its number among the training rows, or the beginning of its id.")] = "1",
    tokens: Annotated[bool, typer.Option("--tokens", help="Its tokens, and which of them are predicted.")] = False,
    instructions: Annotated[bool, typer.Option("--instructions", help="A row for SFT instead of a pair.")] = False,
    as_json: Json = False,
    overrides: Overrides = [],  # noqa: B006 - typer copies the default
    project: Project = None,
) -> None:
    """Show a row of the data as the model reads it."""
    from components.dataset.records import Instruction, Preference
    from pipelines.data.tokens import find_row, tokens_of

    root = project_folder(project)
    config = load_config(root / PARAMS, overrides)
    folder = root / "data" / ("instructions" if instructions else "preferences")
    split, found = find_row(folder, Instruction if instructions else Preference, row)
    facts = {"split": split} | found.model_dump(mode="json")
    every = tokens_of(config, root, found) if tokens else []
    if as_json:
        print(document(json.dumps(facts | {"tokens": [vars(token) for token in every]}, ensure_ascii=False, indent=1)))
        return
    for name, value in facts.items():
        if name == "prompt":
            for message in found.prompt:
                console.print(terminal(f"{message.role}: {message.content}"))
        else:
            console.print(terminal(f"{name}: {value}"))
    if tokens:
        table = Table("part", "id", "token", "predicted")
        for token in every:
            table.add_row(*map(terminal, (token.part, token.id, repr(token.text), "yes" if token.predicted else "")))
        console.print(table)


def _passed_over(why: str) -> None:
    print(terminal(f"passed over: {why}"), file=sys.stderr)


@app.command()
def log(
    revision: Annotated[str, typer.Argument(help="Branch, tag or commit to start from.")] = "HEAD",
    as_json: Json = False,
    project: Project = None,
) -> None:
    """List the versions of the data, newest first."""
    from components.common.urls import is_url
    from components.sources.data import opened
    from pipelines.data import versions as data_versions

    data = _data(project)
    with opened(data.repo, revision) as fs:
        scm = fs.repo.scm
        versions = data_versions.log(Path(scm.root_dir), scm.resolve_rev(revision), data.path, _passed_over)
    if as_json:
        print(document(json.dumps(versions, ensure_ascii=False, indent=1)))
        return
    if not versions:
        where = data.repo if is_url(data.repo) else "this repository"
        raise InputError(
            f"{where} has no version of the data at {revision}; `git add data dvc.lock && git commit` after `dvc repro`"
            " makes one"
        )
    table = Table("commit", "date", "preferences", "instructions", "MB", "own sources", "message")
    for version in versions:
        name = " ".join([version["commit"][:10], *version["tags"]])
        day = time.strftime("%Y-%m-%d", time.gmtime(version["time"]))
        digests = (version[key][:10] for key in ("preferences", "instructions"))
        megabytes = f"{version['bytes'] / 1e6:.1f}"
        cells = (name, day, *digests, megabytes, ", ".join(version["added"]), version["message"])
        table.add_row(*map(terminal, cells))
    console.print(table)


def _data(project: Path | None) -> DataConfig:
    """The configured data repository; a relative path is relative to the project."""
    from components.common.urls import is_url

    root = project_folder(project)
    data = load_config(root / PARAMS).data
    return data if is_url(data.repo) else data.model_copy(update={"repo": str((root / data.repo).resolve())})


def _show(preview: "Preview") -> None:
    table = Table("source", "file", "format", "rows", "quarantined")
    for name, converted in preview.converted.items():
        for index, (path, format_name) in enumerate(converted.formats.items()):
            counts = (str(converted.rows), str(converted.quarantined)) if index == 0 else ("", "")
            table.add_row(*map(terminal, (name if index == 0 else "", Path(path).name, format_name, *counts)))
    if preview.converted:
        console.print(table)
    for name, rows in preview.removed.items():
        what = "replaces" if name in preview.converted else "removes"
        console.print(terminal(f"{what} the source {name} of now ({rows} rows)"), soft_wrap=True)
    for converted in preview.converted.values():
        for reason, count in converted.reasons.most_common(SHOWN):
            sentence = f"quarantined: {count} because {reason}, first at {converted.first[reason]}"
            console.print(terminal(sentence), soft_wrap=True)
        for note, count in converted.notes.items():
            sentence = f"warning: {count} rows: {note}; first at {converted.first[note]}"
            console.print(terminal(sentence), soft_wrap=True)
        for number, row in enumerate(converted.samples, start=1):
            console.print(terminal(f"row {number} as it will be trained:"))
            for speaker, text in _turns(row):
                console.print(" ", terminal(f"{speaker}: {_short(text)}"), soft_wrap=True)
    if preview.converted:
        _show_findings(preview)
    for refusal in preview.refusals:
        console.print(terminal(f"warning: a run with these data would stop: {refusal}"), soft_wrap=True)
    sides = ", ".join(f"{pairs} in {split}" for split, pairs in preview.sides.items())
    console.print(terminal(f"preference pairs afterwards: {sides}"))
    console.print(_table(preview.difference) if preview.difference else "no rows change")


def _turns(row: JsonObject) -> list[tuple[str, str]]:
    """Who says what in a row, in order; its answers last."""
    turns = [(message["role"], message["content"]) for message in row["prompt"]]
    return turns + [(name, row[name]) for name in ("chosen", "rejected", "response") if name in row]


def _short(text: str) -> str:
    """A text on one line, without control characters, its middle cut out where it is long."""
    line = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
    return (
        line
        if len(line) <= SHOWN_CHARACTERS
        else f"{line[: SHOWN_CHARACTERS * 2 // 3]} … {line[-SHOWN_CHARACTERS // 3 :]}"
    )


def _show_findings(preview: "Preview") -> None:
    if preview.findings is None:
        console.print("validation checks the pairs in the next run: there is no tokenizer here, or a split is empty")
        return
    table = Table("check", "severity", "new rows", "what to do")
    for finding in preview.findings:
        table.add_row(*map(terminal, (finding.check, finding.severity, finding.rows, finding.advice)))
    console.print(table if preview.findings else "the new pairs pass every validation check")


def _table(difference: dict[tuple[str, str, str], Counter[str]]) -> Table:
    table = Table("data set", "language", "source", "added", "removed", "changed")
    total: Counter[str] = Counter()
    for key, counts in difference.items():
        table.add_row(*map(terminal, (*key, *_counts(counts).values())))
        total += counts
    table.add_section()
    table.add_row("all", "", "", *map(terminal, _counts(total).values()))
    return table


def _counts(counts: Counter[str]) -> dict[str, int]:
    """The counts in a fixed order, zeros included."""
    from pipelines.data.versions import KINDS

    return {kind: counts[kind] for kind in KINDS}
