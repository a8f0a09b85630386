"""Commands for runs on Kubeflow: submit, status, wait, cancel, schedule."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.common.errors import InputError
from components.common.files import read_json, write_json
from components.config.loading import load_config
from components.config.sections import PARAMS
from components.tracking import run as tracking
from pipelines.commands.options import Overrides, Project
from pipelines.project import project_folder, run_config

if TYPE_CHECKING:  # KFP takes half a second to import, which the other commands need not wait for
    from pipelines.kubeflow import RunState, Server

app = typer.Typer()
console = Console()

RunId = Annotated[str, typer.Argument(help="Id of a run on Kubeflow; by default the last one submitted from here.")]


def _last() -> Path:
    return tracking.home() / "kubeflow.json"


def _run_id(run_id: str) -> str:
    if run_id:
        return run_id
    if not _last().is_file():
        raise InputError("no run was submitted from here; name a run's id")
    return str(read_json(_last())["run_id"])


def _server(project: Path | None) -> "Server":
    from pipelines.kubeflow import Server

    return Server(load_config(project_folder(project) / PARAMS).cluster)


@app.command("submit")
def submit_(
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    overrides: Overrides = [],  # noqa: B006 - typer copies the default
    project: Project = None,
) -> None:
    """Upload the pipeline to Kubeflow as a version named by the git commit, and start a run of it."""
    from pipelines.kubeflow import Server, submit

    config = run_config(project_folder(project), overrides)
    server = Server(config.cluster)
    run_id, version = submit(config, server)
    write_json(_last(), {"run_id": run_id, "version": version, "endpoint": server.endpoint})
    console.print(f"run {run_id} of version {version}\n{server.link(run_id)}", soft_wrap=True)
    if wait_for_it:
        _follow(server, run_id, config.cluster.timeout_s)


@app.command()
def schedule(
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, in UTC: `0 0 3 * * 1` is Mondays at 3.")],
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Run the pipeline on Kubeflow again and again; one run at a time, none is made up for."""
    from pipelines.kubeflow import Server, submit

    if len(cron.split()) != 6:
        raise InputError(f"--cron {cron!r}: expected six fields, seconds first, such as `0 0 3 * * 1`")
    config = run_config(project_folder(project), overrides)
    server = Server(config.cluster)
    recurring, version = submit(config, server, cron)
    link = f"{server.endpoint}/#/recurringrun/details/{recurring}"
    console.print(f"recurring run {recurring} of version {version}\n{link}", soft_wrap=True)


@app.command()
def status(run_id: RunId = "", project: Project = None) -> None:
    """Show how a run on Kubeflow stands, step by step."""
    server = _server(project)
    state = server.state(_run_id(run_id))
    table = Table("step", "state", "message")
    for step in state.steps:
        table.add_row(step.name, step.state, step.error)
    console.print(table)
    console.print(f"{state.state} {state.error}\n{server.link(state.run_id)}", soft_wrap=True)


@app.command()
def wait(
    run_id: RunId = "",
    timeout_s: Annotated[int, typer.Option("--timeout", help="Seconds to wait at most.")] = 86400,
    project: Project = None,
) -> None:
    """Follow a run on Kubeflow to its end; only SUCCEEDED is a success."""
    server = _server(project)
    _follow(server, _run_id(run_id), timeout_s)


@app.command()
def cancel(run_id: RunId = "", project: Project = None) -> None:
    """End a run on Kubeflow."""
    server = _server(project)
    found = _run_id(run_id)
    server.cancel(found)
    console.print(f"{found}: is being canceled")


def _follow(server: "Server", run_id: str, timeout_s: float) -> None:
    shown: dict[str, str] = {}

    def tell(state: "RunState") -> None:
        for step in state.steps:
            if shown.get(step.name) != step.state:
                shown[step.name] = step.state
                console.print(f"{step.name}: {step.state.lower()}")

    state = server.wait(run_id, tell, timeout_s)
    if state.state == "SUCCEEDED":
        console.print(f"succeeded: {server.link(run_id)}", soft_wrap=True)
        return
    print(f"error: run {run_id} ended as {state.state} {state.error}".rstrip(), file=sys.stderr)
    for step in state.steps:
        if step.state == "FAILED":
            print(f"error: step {step.name} failed {step.error}".rstrip(), file=sys.stderr)
            for line in server.log_tail(run_id, step):
                print(f"  {line}", file=sys.stderr)
    sys.exit(1)
