"""Fixtures for the tests beside the components, which are no part of the package `tests`."""

from tests.component_kit import chain, empty_mlflow, facts, own_home, runs
from tests.conftest import base_model, tiny_model

__all__ = ["base_model", "chain", "empty_mlflow", "facts", "own_home", "runs", "tiny_model"]
