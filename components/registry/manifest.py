"""Manifest of a registered version: the hash of each file, to verify downloads against."""

import json
import shutil
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from components.common.errors import KubealignError
from components.common.files import difference, sha256_file

MANIFEST_TAG = "kubealign.manifest"
"""Version tag with the sha256 of each file, as JSON."""
MLFLOWS_OWN = {"registered_model_meta"}
"""Files that MLflow itself adds to a download."""


class BaseReference(TypedDict):
    """base.json of a version that was registered as an adapter: the base model in the registry."""

    reference: str
    """models:/name/version."""
    files: dict[str, str]
    """sha256 of every file by its path."""


def manifest_mismatch(version: Any, folder: Path) -> str:
    """The first difference between a version's downloaded files and its manifest, such as `python_model.pkl is not in
    the manifest`; empty if there is none.

    Compiled Python is removed first: whoever loads a model from a folder leaves it, and nothing says what is in it.

    Raises:
        KubealignError: the version was not registered by this project.
    """
    if MANIFEST_TAG not in version.tags:
        raise KubealignError(f"{version.name} version {version.version} has no manifest; kubealign did not register it")
    for compiled in folder.rglob("__pycache__"):
        shutil.rmtree(compiled, ignore_errors=True)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in MLFLOWS_OWN]
    actual = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    return difference(json.loads(version.tags[MANIFEST_TAG]), actual)
