"""A stage's run in MLflow: parameters, metrics, data and artifacts, below the parent run of the whole pipeline run."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from components.common.errors import error_chain
from components.common.files import write_json
from components.common.memory import peak_memory_mib
from components.common.secrets import without_credentials
from components.stages import STAGE_NAMES
from components.tracking import events
from components.tracking.errors import is_unreachable
from components.tracking.store import KFP_RUN_VARIABLE, client, experiment_id

PARENT_VARIABLES = ("KUBEALIGN_PARENT_RUN", "MLFLOW_RUN_ID")
"""Environment variables that name the parent run: ours, and that of KFP's MLflow plugin."""
SETTINGS = "settings.yaml"
"""Artifact of resolve's run: every setting of the pipeline run, as sections of params.yaml."""
PROGRESS_EVERY_S = 1.0


def parent_run() -> str:
    """The id of the pipeline run's parent run, or an empty string.

    On Kubeflow it is found by its tag: the first step creates it, and a restarted step finds it.
    """
    named = next((os.environ[name] for name in PARENT_VARIABLES if os.environ.get(name)), "")
    return named or _parent_on_kubeflow(os.environ.get(KFP_RUN_VARIABLE, ""))


@cache
def _parent_on_kubeflow(kfp_run: str) -> str:
    if not kfp_run:
        return ""
    mlflow_client = client()
    experiment = experiment_id(mlflow_client)
    runs = mlflow_client.search_runs([experiment], f"tags.`kubealign.kfp_run` = '{kfp_run}'")
    if runs:
        return str(runs[0].info.run_id)
    tags = {"kubealign.kind": "pipeline", "kubealign.kfp_run": kfp_run}
    return str(mlflow_client.create_run(experiment, tags=tags, run_name=f"kubeflow {kfp_run}").info.run_id)


class StageRun:
    """A stage's run in MLflow, and its notes and progress in the log."""

    def __init__(self, name: str, mlflow_client: Any, run_id: str) -> None:
        self.name = name
        self.client = mlflow_client
        self.run_id = run_id
        self._started_at = time.monotonic()
        self._reported_at = 0.0
        self._first_done = 0

    def log(self, message: str) -> None:
        """Put a note into the log."""
        events.note(self.name, message)

    def progress(self, done: int, total: int, message: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Report how far the stage is, at most once a second, with the time left.

        Args:
            done: how many are done, counted from 1.
            total: how many there are.
            message: what is being done.
            metrics: numbers worth watching.
        """
        now = time.monotonic()
        if done <= 1:
            self._first_done, self._started_at = done, now
        if now - self._reported_at < PROGRESS_EVERY_S and done < total:
            return
        self._reported_at = now
        counted = done - self._first_done
        seconds_left = (now - self._started_at) / counted * (total - done) if counted > 0 else None
        events.progress(self.name, done, total, message, metrics or {}, seconds_left)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters."""
        from mlflow.entities import Param

        entities = [Param(key, without_credentials(str(value))[:6000]) for key, value in params.items()]
        for first in range(0, len(entities), 100):
            self.client.log_batch(self.run_id, params=entities[first : first + 100])

    def log_metrics(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        """Record the metrics of many steps in few requests."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, value, now, step) for step, values in rows for key, value in values.items()]
        for first in range(0, len(entities), 1000):
            self.client.log_batch(self.run_id, metrics=entities[first : first + 1000])

    def log_dataset(self, name: str, origin: Mapping[str, str], digest: str, context: str) -> None:
        """Record which data the stage read: its origin and DVC digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": origin["path"], **origin})
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_artifact(self, path: Path) -> None:
        """Record a file."""
        self.client.log_artifact(self.run_id, str(path))


class NoOpRun(StageRun):
    """The run of every process but the main one: it records and reports nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None, "")

    def log(self, message: str) -> None:
        """Do nothing."""

    def progress(self, done: int, total: int, message: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Do nothing."""

    def log_metrics(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        """Do nothing."""


def is_main_process() -> bool:
    """Whether this is rank 0; False in the other processes that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def stage_run(name: str, params: Mapping[str, Any]) -> Iterator[StageRun]:
    """Open the stage's child run in MLflow; finished or failed, it records the seconds and the peak memory."""
    if not is_main_process():
        yield NoOpRun(name)
        return
    mlflow_client = client()
    tags = {"mlflow.runName": name, "kubealign.stage": name}
    if parent_run():
        tags["mlflow.parentRunId"] = parent_run()
    _begin_on_kubeflow(mlflow_client, name)
    created = mlflow_client.create_run(experiment_id(mlflow_client), tags=tags, run_name=name)
    run = StageRun(name, mlflow_client, created.info.run_id)
    run.log_params(params)
    status = "FAILED"
    started = time.monotonic()
    try:
        yield run
        status = "FINISHED"
    except Exception as error:
        # More requests to an unresponsive MLflow would each be retried for minutes.
        if any(is_unreachable(cause) for cause in error_chain(error)):
            status = ""
        raise
    finally:
        if status:
            _end_run(run, name, status, time.monotonic() - started)


def _end_run(run: StageRun, name: str, status: str, seconds: float) -> None:
    run.log_metrics([(0, {"seconds": seconds, "peak_memory_mib": peak_memory_mib()})])
    run.client.set_terminated(run.run_id, status)
    if os.environ.get(KFP_RUN_VARIABLE) and (status == "FAILED" or name == STAGE_NAMES[-1]):
        run.client.set_terminated(parent_run(), status)


def _begin_on_kubeflow(mlflow_client: Any, stage: str) -> None:
    """Close the stage run that an evicted pod left open and set the parent to running, which Kubeflow does not do."""
    if not os.environ.get(KFP_RUN_VARIABLE):
        return
    query = (
        f"tags.`mlflow.parentRunId` = '{parent_run()}' AND tags.`kubealign.stage` = '{stage}'"
        " AND attributes.status = 'RUNNING'"
    )
    for left in mlflow_client.search_runs([experiment_id(mlflow_client)], query):
        mlflow_client.set_terminated(left.info.run_id, "KILLED")
    mlflow_client.update_run(parent_run(), "RUNNING")


def show_metrics(artifact: Any, values: Mapping[str, float]) -> None:
    """Log values to a KFP Metrics artifact and write them to its path: KFP's local cache treats an output without a
    file as lost and would run the step again.
    """
    for name, value in values.items():
        artifact.log_metric(name, value)
    write_json(Path(artifact.path), values)
