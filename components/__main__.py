"""The door to the stages for DVC, `docker run` and Kubernetes: `python -P -m components <stage> --help`."""

import sys
from pathlib import Path

import typer

from components.common.config import load_config
from components.common.errors import KubealignError

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
        prepare_data(load_config(project / "params.yaml").prepare, project / "data")


def main() -> None:
    """Run a stage; what a person is meant to read is shown without a traceback."""
    try:
        app()
    except KubealignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
