"""The project a command works on: its folder, and the configuration of a run of it."""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from components.common.errors import InputError
from components.common.files import write_json
from components.config.params import PARAMS, Config, load_config
from components.tracking import store
from components.tracking.keys import PUBLIC_KEYS_VARIABLE
from components.tracking.local import IN_USE

MARK = "kubealign-home.json"
"""File with the home folder's own id."""
SIGNS = ("mlflow.db", "signing.key", IN_USE, "kubeflow.json")
"""Files by which the home folder of a version without the mark is known."""
MADE_BEFORE = {"downloads", "remote", "workspace", "inputs", "refusals"}
"""What DVC, `make data`, `data add` and single steps may put there before the first run."""


def project_folder(project: Path | None) -> Path:
    """The given project folder, or the nearest one with params.yaml; also the default of KUBEALIGN_HOME.

    Raises:
        InputError: there is no params.yaml.
    """
    here = Path.cwd()
    folders = [project.resolve()] if project else [here, *here.parents]
    for folder in folders:
        if (folder / PARAMS).is_file():
            if not os.environ.get(store.HOME_VARIABLE, "").strip():
                os.environ[store.HOME_VARIABLE] = str(folder / store.DEFAULT_HOME)
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
        InputError: the folder holds other people's files; or, with `alone`, a run is using it.
    """
    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    _mark(home)
    with (home / IN_USE).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        except BlockingIOError as error:
            raise InputError(f"{home}: a run is using it; wait for it, or stop it, and try again") from error
        yield


def _mark(home: Path) -> None:
    """Mark a home folder as ours, by a file with an id of its own; what is not ours is never marked, and never used.

    Raises:
        InputError: the folder holds files, and nothing says that they are ours.
    """
    if (home / MARK).exists():
        return
    found = sorted(path.name for path in home.iterdir())
    ours = home.name == store.DEFAULT_HOME or set(found) <= MADE_BEFORE or any((home / sign).exists() for sign in SIGNS)
    if not ours:
        raise InputError(
            f"{store.HOME_VARIABLE}={home}: holds files that kubealign did not make, such as {found[0]}; name an empty"
            " or a new folder"
        )
    write_json(home / MARK, {"id": uuid.uuid4().hex})


def run_config(root: Path, overrides: list[str]) -> Config:
    """The configuration of a run; overrides of `prepare` are rejected, since DVC prepares the data before a run."""
    for override in overrides:
        if override.strip().startswith("prepare."):
            raise InputError(
                f"--set {override}: the data is prepared before a run; change params.yaml and run `make data`"
            )
    return load_config(root / PARAMS, overrides)
