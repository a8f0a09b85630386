"""Options that the commands share, and what they mean."""

import os
from pathlib import Path
from typing import Annotated

import typer

from components.common import tracking
from components.common.config import PARAMS, Config
from components.common.errors import InputError
from components.common.settings import load_config

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of params.yaml for this call.")
]
Project = Annotated[
    Path | None, typer.Option("--project", help="Folder with params.yaml; by default this one or the nearest above.")
]


def project_folder(project: Path | None) -> Path:
    here = Path.cwd()
    folders = [project.resolve()] if project else [here, *here.parents]
    for folder in folders:
        if (folder / PARAMS).is_file():
            os.environ.setdefault(tracking.HOME_VARIABLE, str(folder / ".kubealign"))
            return folder
    raise InputError(f"{folders[0]}: no {PARAMS} here or above; go to the project's folder or name it with --project")


def run_config(root: Path, overrides: list[str]) -> Config:
    """The configuration of a run, in which `prepare` cannot be changed: DVC's stage has done that part before."""
    for override in overrides:
        if override.strip().startswith("prepare."):
            raise InputError(f"--set {override}: the data is made before a run; change params.yaml and run `make data`")
    return load_config(root / PARAMS, overrides)
