"""Names of the two images that components run in and of the MLflow server's image."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
"""The single source of the version: beside the package in a checkout and in the images."""
VERSION = str(
    tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    if PYPROJECT.is_file()
    else metadata.version("kubealign")
)
REGISTRY = os.environ.get("KUBEALIGN_REGISTRY", "kubealign")
DATA_IMAGE = f"{REGISTRY}/python-data:{VERSION}"
TRAIN_IMAGE = f"{REGISTRY}/python-train:{VERSION}"
MLFLOW_IMAGE = f"{REGISTRY}/mlflow:{VERSION}"
