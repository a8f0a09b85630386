"""What has been judged, according to the signed results in MLflow: commits of the project, and keys of models."""

from collections.abc import Callable, Iterator
from typing import Any

from components.common.errors import InputError, KubealignError
from components.tracking import store
from components.tracking.errors import explain_mlflow_error, is_mlflow_failure
from pipelines.ci.job import Job
from pipelines.local.results import FinishedRun, has_artifact, load_result

MAX_RUNS = 200
"""Runs to look at, the latest first; any may be unfinished or forged."""


def last_judged(name: str, log: Callable[[str], None]) -> str:
    """The commit of the project that `kubealign ci retrain` judged last for a registered model; empty before the first.

    Raises:
        InputError: MLflow does not say.
    """
    results = _results(name, "params.project_commit != ''", log)
    return next((commit for result in results if (commit := result.get("project_commit", ""))), "")


def judged_before(job: Job) -> FinishedRun | None:
    """The result of the latest run with the same key whose version is still in the registry.

    Raises:
        InputError: MLflow does not say.
    """
    facts = {"lineage": job.facts.lineage, "config": job.facts.config}
    condition = " AND ".join(f"params.{key} = '{value}'" for key, value in facts.items())
    results = _results(job.config.register_.name, condition, job.log)
    return next((result for result in results if facts.items() <= result.items()), None)


def _results(name: str, condition: str, log: Callable[[str], None]) -> Iterator[FinishedRun]:
    """The signed verdicts on a registered model whose run of resolve meets a condition, the latest first."""
    query = f"tags.`kubealign.stage` = 'resolve' AND {condition}"
    order = ["attributes.start_time DESC"]
    try:
        client = store.client()
        for run in client.search_runs([store.experiment_id(client)], query, order_by=order, max_results=MAX_RUNS):
            result = _signed_result(client, run.data.tags.get("mlflow.parentRunId", ""), log)
            if result and result["model"] == name and result["decided"]["state"] != "superseded":
                yield result
    except Exception as error:
        if not is_mlflow_failure(error):
            raise
        raise InputError(
            f"{explain_mlflow_error(error)}; so it is not known what has been judged: run it again when MLflow answers"
        ) from error


def _signed_result(client: Any, run_id: str, log: Callable[[str], None]) -> FinishedRun | None:
    """The result of a run, if it has one that is signed: the run itself may be anyone's.

    Raises:
        MlflowException: it has one that cannot be read.
    """
    from mlflow.exceptions import MlflowException

    try:
        return load_result(run_id)
    except KubealignError as error:  # unfinished or forged, or its version was deleted, or another kubealign wrote it
        log(f"passed over: {error}")
    except MlflowException as error:
        # MLflow says "does not exist" of whatever it cannot read.
        unknown = error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        if run_id and (unknown or has_artifact(client, run_id, "result.json")):
            raise
    return None
