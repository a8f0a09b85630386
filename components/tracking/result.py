"""The return value of a stage."""

from typing import NamedTuple


class StageResult(NamedTuple):
    """The id of the stage's MLflow run, and its main metrics for Kubeflow's page."""

    run_id: str
    metrics: dict[str, float]
