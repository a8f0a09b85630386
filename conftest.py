"""Fixtures for the tests beside the components, which are no part of the package `tests`."""

from pathlib import Path

import pytest

from tests.conftest import base_model, tiny_model
from tests.support import programs
from tests.support.component_kit import chain, empty_mlflow, orders, own_home, runs
from tests.support.stages import fast_compiler, stages

__all__ = ["base_model", "chain", "empty_mlflow", "fast_compiler", "orders", "own_home", "runs", "stages", "tiny_model"]
COMPONENTS = Path(__file__).with_name("components")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures of any scope: only a marked test may start servers and programs."""
    programs.allow({marker.name for marker in item.iter_markers()})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: a file is the work of one process, and the longest must not be the last to begin."""
    items.sort(key=lambda item: not item.path.is_relative_to(COMPONENTS.with_name("tests") / "pipeline"))


@pytest.fixture(autouse=True)
def _home_of_a_component(request: pytest.FixtureRequest) -> None:
    """Every test beside a component has a home of its own; the other tests see to theirs."""
    if request.path.is_relative_to(COMPONENTS):
        request.getfixturevalue("own_home")
