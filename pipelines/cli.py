"""`kubealign`: align a language model to preferences, on this machine or on Kubeflow."""

import json
import os
import shutil
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from components.common.errors import InputError, KubealignError
from components.common.identity import ensure_identity
from components.config.params import PARAMS, Config, load_config
from components.tracking import store
from components.tracking.errors import explain_mlflow_error, explain_os_error, is_mlflow_failure
from pipelines.commands import ci, data, kubeflow, registry
from pipelines.commands.options import Overrides, Project
from pipelines.project import home_in_use, project_folder, run_config
from pipelines.terminal import document, terminal

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(kubeflow.app)
app.add_typer(data.app, name="data", rich_help_panel="Data and CI")
app.add_typer(registry.app)
app.add_typer(ci.app, name="ci", rich_help_panel="Data and CI")
console = Console()

PARTS = {
    "steps": "outputs of pipeline steps, which KFP's local cache reuses",
    "checkpoints": "training states from which an interrupted run resumes",
    "cache": "log-probabilities of scored models",
    "runs": "logs and reports of runs",
    "downloads": "packages of data/sources.lock, and partial downloads",
    "workspace": "scratch space of the local runner and of `data add`",
}
"""Folders that `kubealign clean` can remove; the MLflow registry (mlflow.db, mlartifacts) is never touched."""
MAX_JUDGEMENTS = 3
"""Attempts to evaluate a model whose verdict another run superseded; only the evaluation is repeated."""


class Runner(StrEnum):
    """How the steps of a local run are executed."""

    SUBPROCESS = "subprocess"
    DOCKER = "docker"


class Target(StrEnum):
    """Target of a compiled pipeline."""

    LOCAL = "local"
    KUBEFLOW = "kubeflow"


@app.command(rich_help_panel="This machine")
def run(
    overrides: Overrides = [],  # noqa: B006 - typer copies the default
    runner: Annotated[
        Runner, typer.Option(help="Run steps as processes in this environment, or in containers of our images.")
    ] = Runner.SUBPROCESS,
    project: Project = None,
) -> None:
    """Run the whole pipeline on this machine; unchanged steps are cached."""
    from pipelines.local.display import Display
    from pipelines.local.results import load_result, show_result
    from pipelines.local.runner import run_pipeline

    root = project_folder(project)
    config = run_config(root, overrides)
    for _ in range(MAX_JUDGEMENTS):
        result = load_result(run_pipeline(config, root, Display(console), runner.value))
        show_result(console, result)
        if result["decided"]["state"] != "superseded":
            return
        console.print("another run decided first; evaluating again")
    raise KubealignError(f"other runs decided first, {MAX_JUDGEMENTS} times in a row; run again when they are done")


@app.command("compile", rich_help_panel="This machine")
def compile_(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("build/alignment.yaml"),
    target: Annotated[
        Target, typer.Option(help="kubeflow adds images, secrets, resources and volumes from section cluster.")
    ] = Target.KUBEFLOW,
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Compile the pipeline to IR YAML, for upload to Kubeflow Pipelines or KFP's local runner."""
    from components.common.files import replacing
    from pipelines.alignment import compile_pipeline

    config = run_config(project_folder(project), overrides)
    out.parent.mkdir(parents=True, exist_ok=True)
    final = out.with_suffix(".yaml") if out.suffix not in (".yaml", ".yml") else out
    with replacing(final) as staging:
        compiled = staging.with_suffix(".yaml")  # KFP's compiler requires the suffix
        compile_pipeline(config, compiled, target.value)
        compiled.replace(staging)
    console.print(terminal(final), soft_wrap=True)


@app.command(rich_help_panel="This machine")
def images(
    kind: Annotated[str, typer.Argument(help="data, train or mlflow; all by default.")] = "",
    build_args: Annotated[
        bool, typer.Option("--build-args", help="Print the build arguments for `make images` instead.")
    ] = False,
    code: Annotated[
        bool, typer.Option("--code", help="Print the identity of the code in them, their label `kubealign.code`.")
    ] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Print references by digest, as the registry got them in a push.")
    ] = False,
) -> None:
    """Print the image references, for steps and for MLflow in a cluster; `make images` builds them."""
    from components.common.images import DATA_IMAGE, MLFLOW_IMAGE, TRAIN_IMAGE, VERSION
    from components.common.provenance import git_commit
    from pipelines.local.containers import code_in_images, engine, pushed_reference

    if code:
        print(terminal(code_in_images()))
        return
    if build_args:
        facts = {"VERSION": VERSION, "REVISION": git_commit(), "CODE": code_in_images()}
        print(terminal(" ".join(f"--build-arg {name}={value}" for name, value in facts.items())))
        return
    references = {"data": DATA_IMAGE, "train": TRAIN_IMAGE, "mlflow": MLFLOW_IMAGE}
    if kind and kind not in references:
        raise InputError(f"images {kind}: expected {', '.join(references)}")
    chosen = [references[kind]] if kind else [*references.values()]
    client = engine() if digest else None
    for reference in chosen:
        print(terminal(pushed_reference(client, reference) if client else reference))


@app.command(rich_help_panel="This machine")
def report(
    run: Annotated[str, typer.Argument(help="MLflow id of a pipeline run; by default the latest.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    project: Project = None,
) -> None:
    """Show the outcome of a finished run."""
    from pipelines.local.results import find_run, load_result, show_result

    project_folder(project)
    result = load_result(find_run(run))
    if as_json:
        print(document(json.dumps(result, indent=1, ensure_ascii=False)))
    else:
        show_result(console, result)


@app.command(rich_help_panel="This machine")
def ui(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    project: Project = None,
) -> None:
    """Serve the MLflow UI for this project until Ctrl-C."""
    project_folder(project)
    uri = store.tracking_uri()
    if uri.startswith("http"):
        console.print(terminal(f"MLflow is at {uri}"))
        return
    store.client()
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    console.print(terminal(f"MLflow: http://127.0.0.1:{port} (Ctrl-C to stop)"))
    program = str(Path(sys.executable).with_name("mlflow"))
    artifacts = (store.home() / "mlartifacts").as_uri()
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not on the command line, as it may hold a password
    args = ["server", "--artifacts-destination", artifacts, "--host", "127.0.0.1"]
    os.execv(program, [program, *args, "--port", str(port)])  # noqa: S606 - our own program and arguments


@app.command(rich_help_panel="This machine")
def config(
    explain: Annotated[bool, typer.Option("--explain", help="Explain every key.")] = False,
    overrides: Overrides = [],  # noqa: B006
    project: Project = None,
) -> None:
    """Show the effective configuration."""
    effective = load_config(project_folder(project) / PARAMS, overrides)
    if not explain:
        print(document(yaml.safe_dump(effective.sections(), sort_keys=False, allow_unicode=True)), end="")
        return
    table = Table("key", "value", "meaning")
    for key, value, meaning in _explained(effective):
        table.add_row(*map(terminal, (key, value, meaning)))
    console.print(table)


def _explained(config: Config) -> list[tuple[str, str, str]]:
    """The name, value and description of every key."""
    rows = []
    for name, section_field in type(config).model_fields.items():
        section: Any = getattr(config, name)
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            shown = value.model_dump() if hasattr(value, "model_dump") else value
            rows.append((f"{section_field.alias or name}.{key}", str(shown), field.description or ""))
    return rows


@app.command(rich_help_panel="This machine")
def clean(
    parts: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join(PARTS)}, or all; by default only show.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    project: Project = None,
) -> None:
    """Show, and optionally delete, local run data; the MLflow registry stays."""
    project_folder(project)
    home = store.home()
    chosen = list(PARTS) if parts and "all" in parts else parts or []
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise InputError(f"clean {unknown[0]}: expected {', '.join(PARTS)} or all")
    table = Table("part", "MB", "contents")
    for part, meaning in PARTS.items():
        table.add_row(*map(terminal, (part, f"{_size(home / part) / 1e6:.0f}", meaning)))
    console.print(table)
    if not chosen:
        sentence = f"{home}: name parts to remove, such as `kubealign clean checkpoints`, or `all`"
        console.print(terminal(sentence), soft_wrap=True)
        return
    if not yes and not typer.confirm(str(terminal(f"remove {', '.join(chosen)} below {home}?"))):
        return
    with home_in_use(alone=True):
        for part in chosen:
            shutil.rmtree(home / part, ignore_errors=True)
    console.print(terminal(f"removed {', '.join(chosen)}"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Entry point; expected failures become one line and an exit code."""
    from pipelines.quiet import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        ensure_identity()
        app()
    except KubealignError as error:
        print(terminal(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(terminal(f"error: {explain_os_error(error)}"), file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if is_mlflow_failure(error):
            print(terminal(f"error: {explain_mlflow_error(error)}"), file=sys.stderr)
        else:
            for line in traceback.format_exc().splitlines():
                print(terminal(line, indented=True), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
