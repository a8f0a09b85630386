"""The two images that the components run in, and that of the MLflow server in a cluster; named here so that a
component's definition and the build agree.
"""

import os

VERSION = "0.1.0"
REGISTRY = os.environ.get("KUBEALIGN_REGISTRY", "kubealign")
DATA_IMAGE = f"{REGISTRY}/python-data:{VERSION}"
TRAIN_IMAGE = f"{REGISTRY}/python-train:{VERSION}"
MLFLOW_IMAGE = f"{REGISTRY}/mlflow:{VERSION}"
