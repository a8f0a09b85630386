"""Options shared by the commands."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of params.yaml.")
]
Project = Annotated[
    Path | None,
    typer.Option("--project", help="Folder with params.yaml; by default this one or the nearest parent."),
]
