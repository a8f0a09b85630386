"""The two images that the components run in; named here so that a component's definition and the build agree."""

import os

VERSION = "0.1.0"
REGISTRY = os.environ.get("KUBEALIGN_REGISTRY", "kubealign")
DATA_IMAGE = f"{REGISTRY}/python-data:{VERSION}"
TRAIN_IMAGE = f"{REGISTRY}/python-train:{VERSION}"
