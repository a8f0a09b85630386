"""The names of the two images that components run in and of the MLflow server's, for definitions and build."""

import os
import tomllib
from importlib import metadata
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
"""The version's one source: in a checkout and in the images it lies beside the package."""
VERSION = str(
    tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
    if PYPROJECT.is_file()
    else metadata.version("kubealign")
)
REGISTRY = os.environ.get("KUBEALIGN_REGISTRY", "kubealign")
DATA_IMAGE = f"{REGISTRY}/python-data:{VERSION}"
TRAIN_IMAGE = f"{REGISTRY}/python-train:{VERSION}"
MLFLOW_IMAGE = f"{REGISTRY}/mlflow:{VERSION}"
