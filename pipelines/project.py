"""The project a command works on: its folder, and the configuration of a run of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from components.common.errors import InputError
from components.config.params import PARAMS, Config, load_config
from components.tracking import store
from components.tracking.keys import PUBLIC_KEYS_VARIABLE

IN_USE = ".in-use.lock"
"""File in the home folder that is locked while a run lives."""


def project_folder(project: Path | None) -> Path:
    """The given project folder, or the nearest one with params.yaml; also the default of KUBEALIGN_HOME.

    Raises:
        InputError: there is no params.yaml.
    """
    here = Path.cwd()
    folders = [project.resolve()] if project else [here, *here.parents]
    for folder in folders:
        if (folder / PARAMS).is_file():
            os.environ.setdefault(store.HOME_VARIABLE, str(folder / ".kubealign"))
            _trust(folder / PARAMS)
            return folder
    raise InputError(f"{folders[0]}: no {PARAMS} here or above; go to the project's folder or name it with --project")


def _trust(params: Path) -> None:
    """Trust the keys that the project lists, unless the environment says whom to trust."""
    with suppress(yaml.YAMLError, OSError, AttributeError, TypeError):  # whoever reads the settings says what is wrong
        listed = (yaml.safe_load(params.read_text(encoding="utf-8")).get("register") or {}).get("public_keys")
        if listed:
            os.environ.setdefault(PUBLIC_KEYS_VARIABLE, " ".join(listed))


@contextmanager
def home_in_use(alone: bool = False) -> Iterator[None]:
    """Hold the home folder while a run lives; runs share it, and whoever deletes from it has it alone.

    The lock ends with the process that holds it, however that ends.

    Raises:
        InputError: with `alone`, a run is using the folder.
    """
    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    with (home / IN_USE).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        except BlockingIOError as error:
            raise InputError(f"{home}: a run is using it; wait for it, or stop it, and try again") from error
        yield


def run_config(root: Path, overrides: list[str]) -> Config:
    """The configuration of a run; overrides of `prepare` are rejected, since DVC prepares the data before a run."""
    for override in overrides:
        if override.strip().startswith("prepare."):
            raise InputError(
                f"--set {override}: the data is prepared before a run; change params.yaml and run `make data`"
            )
    return load_config(root / PARAMS, overrides)
