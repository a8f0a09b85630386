"""`kubealign ci`: commands for CI systems, for when data, settings or code change; the workflows call only these."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.common.errors import InputError
from components.common.files import read_json, write_text
from components.report.markdown import markdown as harmless
from components.report.markdown import table_row
from pipelines.commands.options import Overrides, Project
from pipelines.project import project_folder
from pipelines.terminal import document, terminal

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()

OUT = Path("build/ci")
Base = Annotated[
    str,
    typer.Option(
        help="Commit to compare with; by default where the head branched from main, or the previous commit on main."
    ),
]
PlanBase = Annotated[
    str,
    typer.Option(
        help="Commit to compare with; by default where the head branched from main, and on main the last judged commit."
    ),
]
Head = Annotated[str, typer.Option(help="Commit to examine.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]


class Runner(StrEnum):
    """Where the steps of a retraining run."""

    KUBEFLOW = "kubeflow"
    SUBPROCESS = "subprocess"
    DOCKER = "docker"


Where = Annotated[Runner, typer.Option(envvar="KUBEALIGN_RUNNER", help="Where the steps run.")]


@app.command("plan")
def plan_(
    base: PlanBase = "",
    head: Head = "HEAD",
    runner: Where = Runner.KUBEFLOW,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
    outputs: Annotated[
        Path | None, typer.Option(help="File to append lines such as `retrain=true` to: $GITHUB_OUTPUT.")
    ] = None,
    project: Project = None,
) -> None:
    """Show what changed since BASE, which steps must run, and why; exit code 1 if dvc.lock is stale."""
    from pipelines.ci.plan import make_plan

    def log(line: str) -> None:
        print(terminal(line), file=sys.stderr)

    plan = make_plan(project_folder(project), base, head, runner.value, log)
    if as_json:
        print(document(json.dumps(plan.as_dict(), indent=1, ensure_ascii=False)))
    elif markdown:
        lines = ["| step | state | why |", "|---|---|---|"]
        lines += [table_row(row.step, row.state, "; ".join(row.reasons)) for row in plan.rows]
        print(document("\n".join([*lines, "", harmless(plan.sentence()), *map(harmless, plan.errors)])))
    else:
        table = Table("step", "state", "why")
        for row in plan.rows:
            table.add_row(*map(terminal, (row.step, row.state, "; ".join(row.reasons))))
        console.print(table)
        console.print(terminal(plan.sentence()), soft_wrap=True)
    if outputs:
        with outputs.open("a", encoding="utf-8") as file:
            file.writelines(f"{name}={str(value).lower()}\n" for name, value in plan.outputs().items())
    for error in plan.errors:
        print(terminal(f"error: {error}"), file=sys.stderr)
    if plan.errors:
        sys.exit(1)


@app.command("data-report")
def data_report_(base: Base = "", head: Head = "HEAD", out: Out = OUT, project: Project = None) -> None:
    """Report what changed in the data and what validation finds (also in OUT/data.md); exit code 1 if rejected."""
    from pipelines.ci.data_report import data_report

    report = data_report(project_folder(project), base, head)
    write_text(out / "data.md", report.text)
    print(document(report.text), end="")
    if not report.accepted:
        print("error: the data was rejected; the report says which rows and why", file=sys.stderr)
        sys.exit(1)


@app.command("retrain")
def retrain_(
    runner: Where = Runner.KUBEFLOW,
    rerun: Annotated[
        bool,
        typer.Option("--rerun", envvar="KUBEALIGN_RERUN", help="Train again what was judged before, without cache."),
    ] = False,
    out: Out = OUT,
    retry_timeout_s: Annotated[
        float, typer.Option("--retry-timeout", help="Seconds to keep retrying while Kubeflow does not answer.")
    ] = 600,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest wait for the run, in seconds.")] = 86400,
    overrides: Overrides = [],  # noqa: B006 - typer copies the default
    project: Project = None,
) -> None:
    """Train and evaluate the checked-out commit; writes summary.md, verdict.json, report.html and status.json to OUT.

    What was judged before is not trained again. Any verdict is a success. Running the same command again resumes
    following a run in progress; SIGTERM and SIGINT cancel it.
    """
    from pipelines.ci.job import make_job
    from pipelines.ci.retrain import retrain

    root = project_folder(project)
    retrain(make_job(root, overrides, runner.value, rerun, out, retry_timeout_s, timeout_s, console))


@app.command()
def cancel(out: Out = OUT, project: Project = None) -> None:
    """Cancel the Kubeflow run that an interrupted `ci retrain` left behind."""
    from pipelines.ci.follow import cancel_left

    for line in cancel_left(project_folder(project), out):
        console.print(terminal(line), soft_wrap=True)


@app.command()
def summary(
    version: Annotated[str, typer.Option(help="Summarize this registered version instead.")] = "",
    out: Out = OUT,
    project: Project = None,
) -> None:
    """Print the outcome of the last `ci retrain` as Markdown."""
    if version:
        from pipelines.ci.retrain import version_summary

        print(document(version_summary(project_folder(project), version)), end="")
        return
    if not (out / "summary.md").is_file():
        raise InputError(f"{out / 'summary.md'}: not found; `kubealign ci retrain` writes it")
    print(document((out / "summary.md").read_text(encoding="utf-8")), end="")


@app.command()
def comment(
    file: Annotated[Path, typer.Argument(help="Markdown, such as build/ci/data.md.")],
    pull_request: Annotated[int, typer.Option(help="Number of the pull request.")] = 0,
    commit: Annotated[str, typer.Option(help="Or a commit: its pull requests.")] = "",
    update_only: Annotated[
        bool, typer.Option("--update-only", envvar="KUBEALIGN_UPDATE_ONLY", help="Only update an existing comment.")
    ] = False,
) -> None:
    """Post a Markdown file as a comment on a GitHub pull request; an earlier one of the same kind is updated."""
    from pipelines.ci.notify import GitHub

    if bool(pull_request) == bool(commit):
        raise InputError("give either --pull-request or --commit")
    if not file.is_file():
        raise InputError(f"{file}: not found")
    github = GitHub()
    for number in [pull_request] if pull_request else github.pull_requests(commit):
        done = github.comment(file.read_text(encoding="utf-8"), number, update_only)
        console.print(terminal(f"pull request {number}: comment {done}"))


@app.command()
def status(commit: Annotated[str, typer.Option(help="The commit.")], out: Out = OUT) -> None:
    """Set a commit's status on GitHub to the outcome of the last `ci retrain`."""
    from pipelines.ci.notify import GitHub

    found = read_json(out / "status.json")
    GitHub().status(commit, found)
    console.print(terminal(f"{commit[:12]}: {found['state']}: {found['description']}"))
