"""Commands for runs on Kubeflow: submit, status, wait, cancel, schedule, schedules, unschedule."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.common.errors import InputError
from components.common.files import read_json, write_json
from components.config.params import PARAMS, load_config
from components.tracking import store
from pipelines.commands.options import Overrides, Project
from pipelines.project import project_folder, run_config
from pipelines.terminal import terminal

if TYPE_CHECKING:  # KFP takes half a second to import, which the other commands need not wait for
    from pipelines.kubeflow import RunState, Server

app = typer.Typer()
console = Console()

RunId = Annotated[str, typer.Argument(help="Kubeflow run id; by default the last run submitted from here.")]


def _last() -> Path:
    return store.home() / "kubeflow.json"


def _run_id(run_id: str) -> str:
    if run_id:
        return run_id
    if not _last().is_file():
        raise InputError("no run was submitted from here; give a run id")
    return str(read_json(_last())["run_id"])


def _server(project: Path | None) -> "Server":
    from pipelines.kubeflow import Server

    return Server(load_config(project_folder(project) / PARAMS).cluster)


@app.command("submit", rich_help_panel="Kubeflow")
def submit_(
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    overrides: Overrides = [],  # noqa: B006 - typer copies the default
    project: Project = None,
) -> None:
    """Upload the pipeline to Kubeflow as a version named after the git commit, and start a run."""
    from pipelines.kubeflow import Server, submit

    config = run_config(project_folder(project), overrides)
    server = Server(config.cluster)
    run_id, version = submit(config, server)
    write_json(_last(), {"run_id": run_id, "version": version, "endpoint": server.endpoint})
    console.print(terminal(f"run {run_id} of version {version}"), soft_wrap=True)
    console.print(terminal(server.link(run_id)), soft_wrap=True)
    if wait_for_it:
        _follow(server, run_id, config.cluster.timeout_s)


@app.command(rich_help_panel="Kubeflow")
def schedule(
    cron: Annotated[str, typer.Option(help="Six fields, seconds first, in UTC: `0 0 3 * * 1` is Mondays at 3.")],
    name: Annotated[str, typer.Option(help="The schedule's name; by default that of the registered model.")] = "",
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Schedule recurring runs on Kubeflow (one at a time, no catch-up); replaces the schedule of that name."""
    from pipelines.kubeflow import Server, submit

    if len(cron.split()) != 6:
        raise InputError(f"--cron {cron!r}: expected six fields, seconds first, such as `0 0 3 * * 1`")
    config = run_config(project_folder(project), overrides)
    server = Server(config.cluster)
    name = name or config.register_.name
    recurring, version = submit(config, server, cron, name)
    link = f"{server.endpoint}/#/recurringrun/details/{recurring}"
    console.print(terminal(f"schedule {name}: recurring run {recurring} of version {version}"), soft_wrap=True)
    # The new one first: a schedule is never lost. All but the newest go, so that of two who schedule at once one stays.
    for older in [one for one in server.schedules() if one.name == name][1:]:
        server.unschedule(older.recurring_id)
        words = f"replaces {older.recurring_id} of version {older.version} ({older.cron})"
        console.print(terminal(words), soft_wrap=True)
    console.print(terminal(link), soft_wrap=True)


@app.command(rich_help_panel="Kubeflow")
def schedules(project: Project = None) -> None:
    """List the schedules of this pipeline on Kubeflow."""
    found = _server(project).schedules()
    if not found:
        console.print("no schedule; `kubealign schedule --cron …` makes one")
        return
    for one in found:
        when = f"{one.cron} UTC{'' if one.enabled else ', disabled'}"
        sentence = f"{one.name}: {when}, version {one.version}, recurring run {one.recurring_id}"
        console.print(terminal(sentence), soft_wrap=True)


@app.command(rich_help_panel="Kubeflow")
def unschedule(
    name: Annotated[str, typer.Argument(help="The schedule's name, as `kubealign schedules` lists it.")],
    project: Project = None,
) -> None:
    """Remove a schedule from Kubeflow; runs that it has started go on."""
    server = _server(project)
    found = server.schedules()
    of_that_name = [one for one in found if one.name == name]
    if not of_that_name:
        known = ", ".join(sorted({one.name for one in found})) or "none"
        raise InputError(f"no schedule is called {name!r}; there are: {known}")
    for one in of_that_name:
        server.unschedule(one.recurring_id)
        console.print(terminal(f"removed {one.name}: {one.recurring_id} ({one.cron})"), soft_wrap=True)


@app.command(rich_help_panel="Kubeflow")
def status(run_id: RunId = "", project: Project = None) -> None:
    """Show a Kubeflow run's status, step by step."""
    server = _server(project)
    state = server.state(_run_id(run_id))
    table = Table("step", "state", "message")
    for step in state.steps:
        table.add_row(*map(terminal, (step.name, step.state, step.error)))
    console.print(table)
    console.print(terminal(f"{state.state} {state.error}"), soft_wrap=True)
    console.print(terminal(server.link(state.run_id)), soft_wrap=True)


@app.command(rich_help_panel="Kubeflow")
def wait(
    run_id: RunId = "",
    timeout_s: Annotated[int, typer.Option("--timeout", help="Longest time to wait, in seconds.")] = 86400,
    project: Project = None,
) -> None:
    """Follow a Kubeflow run to its end; only SUCCEEDED is a success."""
    server = _server(project)
    _follow(server, _run_id(run_id), timeout_s)


@app.command(rich_help_panel="Kubeflow")
def cancel(run_id: RunId = "", project: Project = None) -> None:
    """Cancel a Kubeflow run."""
    server = _server(project)
    run_id = _run_id(run_id)
    server.cancel(run_id)
    console.print(terminal(f"{run_id}: cancellation requested"))


def _follow(server: "Server", run_id: str, timeout_s: float) -> None:
    shown: dict[str, str] = {}

    def on_change(state: "RunState") -> None:
        for step in state.steps:
            if shown.get(step.name) != step.state:
                shown[step.name] = step.state
                console.print(terminal(f"{step.name}: {step.state.lower()}"))

    state = server.wait(run_id, on_change, timeout_s)
    if state.state == "SUCCEEDED":
        console.print(terminal(f"succeeded: {server.link(run_id)}"), soft_wrap=True)
        return
    print(terminal(f"error: run {run_id} ended as {state.state} {state.error}"), file=sys.stderr)
    for step in state.steps:
        if step.state == "FAILED":
            print(terminal(f"error: step {step.name} failed {step.error}"), file=sys.stderr)
            for line in server.log_tail(run_id, step):
                print("  ", terminal(line), sep="", file=sys.stderr)
    sys.exit(1)
