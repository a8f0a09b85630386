"""The names of the two images that components run in and of the MLflow server's, for definitions and build."""

import os

VERSION = "0.1.0"
REGISTRY = os.environ.get("KUBEALIGN_REGISTRY", "kubealign")
DATA_IMAGE = f"{REGISTRY}/python-data:{VERSION}"
TRAIN_IMAGE = f"{REGISTRY}/python-train:{VERSION}"
MLFLOW_IMAGE = f"{REGISTRY}/mlflow:{VERSION}"
