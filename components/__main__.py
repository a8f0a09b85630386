"""The door to the stages for DVC, `docker run` and Kubernetes: `python -P -m components <stage> --help`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from components.common.config import PARAMS, load_config
from components.common.errors import KubealignError
from components.common.tracking import explain_os_error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def door() -> None:
    """Run one stage of the pipeline on paths, without Kubeflow."""


@app.command()
def prepare(project: Path = Path(), base_model: bool = False) -> None:
    """Make the canonical data sets below data/, or with --base-model the embedded base model."""
    from components.prepare.stage import prepare_base_model, prepare_data

    if base_model:
        prepare_base_model(project / "data")
    else:
        prepare_data(load_config(project / PARAMS).prepare, project / "data")


Params = Annotated[Path, typer.Option(help="The configuration file.")]
DatasetIn = Annotated[Path, typer.Option(help="Folder with preferences/ and instructions/.")]
BaseIn = Annotated[Path, typer.Option(help="Folder of the base model, as fetch writes it.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]


@app.command()
def fetch(out: Out, params: Params = Path(PARAMS)) -> None:
    """Resolve the configured data and base model and bring them to OUT/dataset and OUT/base."""
    from components.fetch.stage import run_fetch
    from components.resolve.base import resolve_base
    from components.resolve.data import resolve_data

    config = load_config(params)
    data = resolve_data(config.data.repo, config.data.revision)
    base = resolve_base(config.model, config.data)
    where = (out / "dataset", out / "base")
    run_fetch(config.data.repo, data.commit, data.digests, config.model, base.reference, base.digest, *where)


@app.command()
def validate(dataset: DatasetIn, base: BaseIn, out: Out, params: Params = Path(PARAMS)) -> None:
    """Check a data set; OUT gets the good rows, the quarantine and the report."""
    from components.validate.stage import run_validate

    config = load_config(params)
    reports = (out / "report.html", out / "report.md")
    run_validate(config.validate_, config.model, dataset, base, out / "clean", *reports)


@app.command()
def sft(dataset: DatasetIn, base: BaseIn, out: Out, params: Params = Path(PARAMS)) -> None:
    """Fine-tune the base model on the instructions of a validated data set."""
    from components.sft.stage import run_sft

    config = load_config(params)
    run_sft(config.sft, config.model, dataset, base, out)


@app.command()
def dpo(
    dataset: DatasetIn,
    base: BaseIn,
    sft_model: Annotated[Path, typer.Option(help="Folder that sft wrote.")],
    out: Out,
    params: Params = Path(PARAMS),
) -> None:
    """Align the SFT model to the preferences of a validated data set."""
    from components.dpo.stage import run_dpo

    config = load_config(params)
    run_dpo(config.dpo, config.model, dataset, base, sft_model, out)


@app.command()
def evaluate(
    dataset: DatasetIn,
    base: BaseIn,
    sft_model: Annotated[Path, typer.Option(help="Folder that sft wrote.")],
    policy: Annotated[Path, typer.Option(help="Folder that dpo wrote.")],
    out: Out,
    incumbent: Annotated[str, typer.Option(help="models:/name/version to beat; the SFT model without.")] = "",
    test_use: Annotated[int, typer.Option(min=1, help="Number of this decision on the same test set.")] = 1,
    data_clean: Annotated[bool, typer.Option(help="Whether a commit records just this data.")] = False,
    params: Params = Path(PARAMS),
) -> None:
    """Judge a policy on the held-out pairs; OUT gets the numbers, the verdict and the report."""
    from components.evaluate.candidates import Inputs
    from components.evaluate.stage import run_evaluate

    config = load_config(params)
    inputs = Inputs(dataset, base, sft_model, policy, incumbent, test_use, data_clean)
    reports = (out / "report.html", out / "report.md")
    run_evaluate(config.evaluate, config.gate, config.model, inputs, {"base_model": config.model.base}, out, *reports)


def main() -> None:
    """Run a stage; what a person is meant to read is shown without a traceback."""
    try:
        app()
    except KubealignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
