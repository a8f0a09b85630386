"""`kubealign`: align a language model to preferences, on this machine or on Kubeflow."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from components.common import tracking
from components.common.config import PARAMS, Config, load_config
from components.common.errors import InputError, KubealignError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of params.yaml for this call.")
]
Project = Annotated[
    Path | None, typer.Option("--project", help="Folder with params.yaml; by default this one or the nearest above.")
]

PARTS = {
    "steps": "outputs of pipeline steps, which KFP's cache serves again",
    "checkpoints": "training states that an interrupted run goes on from",
    "cache": "log-probabilities of models that have been scored",
    "runs": "logs and reports of runs",
    "workspace": "scratch folder of the local runner",
}
"""What `kubealign clean` removes; the MLflow registry (mlflow.db, mlartifacts) is never touched."""


def _project(project: Path | None) -> Path:
    here = Path.cwd()
    folders = [project.resolve()] if project else [here, *here.parents]
    for folder in folders:
        if (folder / PARAMS).is_file():
            os.environ.setdefault(tracking.HOME_VARIABLE, str(folder / ".kubealign"))
            return folder
    raise InputError(f"{folders[0]}: no {PARAMS} here or above; go to the project's folder or name it with --project")


def _run_config(root: Path, overrides: list[str]) -> Config:
    """The configuration of a run, in which `prepare` cannot be changed: DVC's stage has done that part before."""
    for override in overrides:
        if override.strip().startswith("prepare."):
            raise InputError(f"--set {override}: the data is made before a run; change params.yaml and run `make data`")
    return load_config(root / PARAMS, overrides)


@app.command()
def run(overrides: Overrides = [], project: Project = None) -> None:  # noqa: B006 - typer copies the default
    """Run the whole pipeline on this machine; what has not changed is served from the cache."""
    from pipelines.display import Display
    from pipelines.results import load_result, show_result
    from pipelines.runner import run_pipeline

    root = _project(project)
    config = _run_config(root, overrides)
    run_id = run_pipeline(config, root, Display(console))
    show_result(console, load_result(run_id))


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("build/alignment.yaml"),
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Write the pipeline as IR YAML, for upload to Kubeflow Pipelines."""
    from components.common.files import replacing
    from pipelines.alignment import compile_pipeline

    config = _run_config(_project(project), overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    final = out.with_suffix(".yaml") if out.suffix not in (".yaml", ".yml") else out
    with replacing(final) as aside:
        whole = aside.with_suffix(".yaml")
        compile_pipeline(config, whole)
        whole.replace(aside)
    console.print(f"{final}", soft_wrap=True)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="MLflow id of a pipeline run; by default the last one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    project: Project = None,
) -> None:
    """Show the outcome of a finished run."""
    from pipelines.results import find_run, load_result, show_result

    _project(project)
    result = load_result(find_run(run))
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show_result(console, result)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    project: Project = None,
) -> None:
    """Open MLflow on the runs and models of this project, until Ctrl-C."""
    _project(project)
    uri = tracking.tracking_uri()
    if uri.startswith("http"):
        console.print(f"MLflow is at {tracking.without_credentials(uri)}")
        return
    tracking.client()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    console.print(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    program = str(Path(sys.executable).with_name("mlflow"))
    artifacts = (tracking.home() / "mlartifacts").as_uri()
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not a word of the command, as it may hold a password
    words = ["server", "--artifacts-destination", artifacts, "--host", "127.0.0.1"]
    os.execv(program, [program, *words, "--port", str(port)])  # noqa: S606 - our own program and words


@app.command()
def config(
    explain: Annotated[bool, typer.Option("--explain", help="With the meaning of every key.")] = False,
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Show the configuration as it would be used."""
    found = load_config(_project(project) / PARAMS, overrides)
    if not explain:
        print(yaml.safe_dump(found.sections(), sort_keys=False, allow_unicode=True), end="")
        return
    table = Table("key", "value", "meaning")
    for key, value, meaning in _explained(found):
        table.add_row(key, value, meaning)
    console.print(table)


def _explained(found: Config) -> list[tuple[str, str, str]]:
    rows = []
    for name, fields in type(found).model_fields.items():
        section: Any = getattr(found, name)
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            shown = value.model_dump() if hasattr(value, "model_dump") else value
            rows.append((f"{fields.alias or name}.{key}", str(shown), field.description or ""))
    return rows


@app.command()
def clean(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of: {', '.join(PARTS)}, all. Without: show only.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    project: Project = None,
) -> None:
    """Show what runs have left on this machine and how big it is, and remove it; the MLflow registry stays."""
    _project(project)
    home = tracking.home()
    chosen = list(PARTS) if parts and "all" in parts else parts or []
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise InputError(f"clean {unknown[0]}: expected {', '.join(PARTS)} or all")
    table = Table("part", "MB", "what it is")
    for part, meaning in PARTS.items():
        table.add_row(part, f"{_size(home / part) / 1e6:.0f}", meaning)
    console.print(table)
    if not chosen:
        console.print(f"{home}: name parts to remove, such as `kubealign clean checkpoints`, or `all`", soft_wrap=True)
        return
    if not yes and not typer.confirm(f"remove {', '.join(chosen)} below {home}?"):
        return
    for part in chosen:
        shutil.rmtree(home / part, ignore_errors=True)
    console.print(f"removed {', '.join(chosen)}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Entry point: failures that are meant for a person are one line and an exit code."""
    from pipelines.runner import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except KubealignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {tracking.explain_os_error(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow.", "sqlalchemy.")):
            raise
        where = tracking.without_credentials(tracking.tracking_uri())
        print(
            f"error: MLflow at {where}: {tracking.without_credentials(tracking.one_line(str(error)))[:300]}",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
