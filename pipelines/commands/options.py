"""Options that the commands share, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of params.yaml for this call.")
]
Project = Annotated[
    Path | None, typer.Option("--project", help="Folder with params.yaml; by default this one or the nearest above.")
]
