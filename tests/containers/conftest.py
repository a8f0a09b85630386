"""The container engine, and the user of the images."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from components.common.errors import InputError
from pipelines.local import containers

IMAGE_USER = 10001


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """The engine, with fresh images in it."""
    try:
        engine = containers.engine()
    except InputError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have a container engine: {error}")
        pytest.skip(f"no container engine answers, so no container test was run: {str(error)[:80]}")
    containers.check_images(engine)
    yield engine
    engine.close()
