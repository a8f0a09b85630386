"""The door to the stages for DVC, `docker run` and Kubernetes: `python -P -m components <stage> --help`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from components.common.errors import KubealignError
from components.common.foreign import one_line
from components.common.identity import ensure_identity
from components.config.params import PARAMS, load_config
from components.tracking import storage
from components.tracking.errors import explain_os_error
from components.tracking.result import StageResult
from components.tracking.run import is_main_process

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def door() -> None:
    """Run one stage of the pipeline on paths, without Kubeflow."""


@app.command()
def prepare(project: Path = Path(), base_model: bool = False, code: bool = False) -> None:
    """Make the canonical data sets below data/, or with --base-model the embedded base model.

    With --code write data/prepare.code, which names the code that makes the data: DVC goes by it.
    """
    from components.common.provenance import write_code_of_data
    from components.prepare.stage import prepare_base_model, prepare_data

    if code:
        write_code_of_data(project / "data")
    elif base_model:
        prepare_base_model(project / "data")
    else:
        prepare_data(load_config(project / PARAMS).prepare, project / "data")


SECRETS_VARIABLE = "KUBEALIGN_SECRETS"
"""Environment variable with a folder of further ones, a file each: secrets that a pod gets as files."""

Params = Annotated[Path, typer.Option(parser=storage.materialize, metavar="LOCATION", help="The configuration file.")]
DatasetIn = Annotated[
    Path,
    typer.Option(parser=storage.materialize, metavar="LOCATION", help="Folder with preferences/ and instructions/."),
]
BaseIn = Annotated[
    Path,
    typer.Option(parser=storage.materialize, metavar="LOCATION", help="Folder of the base model, as fetch writes it."),
]
SftIn = Annotated[Path, typer.Option(parser=storage.materialize, metavar="LOCATION", help="Folder that sft wrote.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
OutLocation = Annotated[str, typer.Option(metavar="LOCATION", help="Folder to write; a path or s3://bucket/prefix.")]
Result = Annotated[str, typer.Option(metavar="LOCATION", help="JSON file for the MLflow run's id and the metrics.")]


@app.command()
def fetch(out: Out, params: Params = Path(PARAMS)) -> None:
    """Resolve the configured data and base model and bring them to OUT/dataset and OUT/base."""
    from components.fetch.stage import run_fetch
    from components.sources.base_model import resolve_base
    from components.sources.data import data_folders, resolve_data

    config = load_config(params)
    version = resolve_data(config.data.repo, config.data.revision, data_folders(config.data.path))
    data = config.data.model_copy(update={"revision": version.commit})
    base = resolve_base(config.model, config.data)
    folders = (out / "dataset", out / "base")
    template = (config.model.chat_template, config.model.template_date)
    run_fetch(data, version.digests, *template, base.reference, base.digest, *folders)


@app.command()
def validate(dataset: DatasetIn, base: BaseIn, out: Out, params: Params = Path(PARAMS)) -> None:
    """Check a data set; OUT gets the good rows, the quarantine and the report."""
    from components.validate.stage import run_validate

    config = load_config(params)
    reports = (out / "report.html", out / "report.md")
    run_validate(config.validate_, config.model.max_length, dataset, base, out / "clean", *reports)


@app.command()
def sft(dataset: DatasetIn, base: BaseIn, out: OutLocation, params: Params = Path(PARAMS), result: Result = "") -> None:
    """Fine-tune the base model on the instructions of a validated data set."""
    from components.sft.stage import run_sft

    config = load_config(params)
    with storage.output(out) as folder:
        done = run_sft(config.sft, config.model, dataset, base, folder)
    _write_result(result, done)


@app.command()
def dpo(
    dataset: DatasetIn,
    base: BaseIn,
    sft_model: SftIn,
    out: OutLocation,
    params: Params = Path(PARAMS),
    result: Result = "",
) -> None:
    """Align the SFT model to the preferences of a validated data set."""
    from components.dpo.stage import run_dpo

    config = load_config(params)
    with storage.output(out) as folder:
        done = run_dpo(config.dpo, config.model, dataset, base, sft_model, folder)
    _write_result(result, done)


@app.command()
def evaluate(
    dataset: DatasetIn,
    base: BaseIn,
    sft_model: SftIn,
    policy: Annotated[Path, typer.Option(help="Folder that dpo wrote.")],
    out: Out,
    incumbent: Annotated[str, typer.Option(help="models:/name/version to beat; empty before the first champion.")] = "",
    decision_index: Annotated[int, typer.Option(min=1, help="Number of this decision on the same test set.")] = 1,
    data_clean: Annotated[bool, typer.Option(help="Whether a commit records just this data.")] = False,
    params: Params = Path(PARAMS),
) -> None:
    """Judge a policy on the held-out pairs; OUT gets the numbers, the verdict and the report."""
    from components.common.provenance import code_digest
    from components.evaluate.candidates import Inputs
    from components.evaluate.stage import run_evaluate

    config = load_config(params)
    inputs = Inputs(dataset, base, sft_model, policy, incumbent, decision_index, data_clean, test_set="")
    facts, reports = {"base_model": config.model.base}, (out / "report.html", out / "report.md")
    code = code_digest("evaluate")
    run_evaluate(config.evaluate, config.gate, config.model, inputs, facts, code, out, *reports)


def _write_result(result: str, done: StageResult) -> None:
    """Write what a stage gives besides its files, by the main process; last, so that it stands for a finished stage."""
    if result and is_main_process():
        storage.write(result, json.dumps(done._asdict()))


def read_secrets() -> None:
    """Put the files of the folder that KUBEALIGN_SECRETS names into the environment, unless it has them."""
    folder = os.environ.get(SECRETS_VARIABLE)
    for file in Path(folder).iterdir() if folder else ():
        if file.is_file() and not file.name.startswith("."):
            os.environ.setdefault(file.name, file.read_text(encoding="utf-8").strip())


def main() -> None:
    """Run a stage; what a person is meant to read is shown without a traceback."""
    try:
        ensure_identity()
        read_secrets()
        app()
    except KubealignError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {one_line(explain_os_error(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
