"""The manifests of every overlay, built once."""

import os
import shutil
from typing import Any

import pytest

from tests.tools.manifests import OVERLAYS, build

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Manifest]]:
    if not shutil.which("kubectl"):
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have kubectl")
        pytest.skip("no kubectl, so no manifest was checked")
    return {name: build(name) for name in OVERLAYS}
