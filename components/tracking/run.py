"""What MLflow remembers of a stage, and how a stage speaks: one child run, plain progress lines, one last error line.

Lines that the command line reads begin with a word in brackets, so that they also read well in a pod's log:
`[stage] dpo started`, `[progress] dpo 12/36 loss=0.61 left=3:20`, `[error:2] dpo pairs.jsonl:17: …`
(2 is the exit code).
"""

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from components.common.errors import KubealignError
from components.common.files import write_json
from components.common.memory import peak_memory_mib

HOME_VARIABLE = "KUBEALIGN_HOME"
PARENT_VARIABLES = ("KUBEALIGN_PARENT_RUN", "MLFLOW_RUN_ID")
"""Environment variables that name the parent run: ours, and that of KFP's MLflow plugin."""
KFP_RUN_VARIABLE = "KUBEALIGN_KFP_RUN"
"""Environment variable with the id of the run on Kubeflow, whose parent run in MLflow carries it as a tag."""
EXPERIMENT = "kubealign"
LAST_STAGE = "register"
SETTINGS = "settings.yaml"
"""Artifact of resolve's run: every setting of the pipeline run, as sections of params.yaml."""
PROGRESS_EVERY_S = 1.0


def home() -> Path:
    """The folder for what outlives a stage: checkpoints, caches, the local MLflow."""
    return Path(os.environ.get(HOME_VARIABLE, ".kubealign")).resolve()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or SQLite in the home folder; a relative SQLite path is made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home()}/mlflow.db"
    scheme, relative, path = uri.partition("sqlite:///")
    return f"{relative}{Path(path).resolve()}" if relative and not scheme else uri


def without_credentials(url: str) -> str:
    """The URL as it may be shown: without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)


def client() -> Any:
    """An MLflow client on `tracking_uri`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if tracking_uri().startswith("sqlite:"):
        home().mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri())
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri())
    return mlflow.MlflowClient()


def experiment_id(mlflow_client: Any) -> str:
    """The experiment of all runs (MLFLOW_EXPERIMENT_NAME or `kubealign`), made if it is not there."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = mlflow_client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    local = tracking_uri().startswith("sqlite:")
    return str(mlflow_client.create_experiment(name, (home() / "mlartifacts").as_uri() if local else None))


def parent_run() -> str:
    """Id of the pipeline run's parent run, or nothing.

    On Kubeflow it is found by its tag; the first step makes it, and a step that is started again finds it.
    """
    named = next((os.environ[name] for name in PARENT_VARIABLES if os.environ.get(name)), "")
    return named or _parent_on_kubeflow(os.environ.get(KFP_RUN_VARIABLE, ""))


@cache
def _parent_on_kubeflow(kfp_run: str) -> str:
    if not kfp_run:
        return ""
    mlflow_client = client()
    experiment = experiment_id(mlflow_client)
    found = mlflow_client.search_runs([experiment], f"tags.`kubealign.kfp_run` = '{kfp_run}'")
    if found:
        return str(found[0].info.run_id)
    tags = {"kubealign.kind": "pipeline", "kubealign.kfp_run": kfp_run}
    return str(mlflow_client.create_run(experiment, tags=tags, run_name=f"kubeflow {kfp_run}").info.run_id)


class StageRun:
    """A stage's run in MLflow, and its voice."""

    def __init__(self, name: str, mlflow_client: Any, run_id: str) -> None:
        self.name = name
        self.client = mlflow_client
        self.run_id = run_id
        self._phase = time.monotonic()
        self._shown = 0.0
        self._first = 0

    def say(self, sentence: str) -> None:
        """Print a line for the log."""
        print(f"[note] {self.name} {sentence}", flush=True)

    def progress(self, done: int, total: int, **fields: str) -> None:
        """Print how far the stage is, at most once a second, with the time left; `done` counts from 1."""
        now = time.monotonic()
        if done <= 1:
            self._first, self._phase = done, now
        if now - self._shown < PROGRESS_EVERY_S and done < total:
            return
        self._shown = now
        seconds = (now - self._phase) / max(1, done - self._first) * (total - done)
        words = [f"{name}={value}" for name, value in fields.items()]
        if done > self._first:
            words.append(f"left={int(seconds) // 60}:{int(seconds) % 60:02d}")
        print(f"[progress] {self.name} {done}/{total} {' '.join(words)}", flush=True)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters."""
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for first in range(0, len(entities), 100):
            self.client.log_batch(self.run_id, params=entities[first : first + 100])

    def log_metrics(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        """Record metrics of many steps in few requests."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, value, now, step) for step, values in rows for key, value in values.items()]
        for first in range(0, len(entities), 1000):
            self.client.log_batch(self.run_id, metrics=entities[first : first + 1000])

    def log_dataset(self, name: str, origin: Mapping[str, str], digest: str, context: str) -> None:
        """Record which data the stage read: where it comes from, and its DVC digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": origin["path"], **origin})
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def log_artifact(self, path: Path) -> None:
        """Record a file."""
        self.client.log_artifact(self.run_id, str(path))


class SilentRun(StageRun):
    """What a stage's further processes have in place of a run: nothing is printed or recorded."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None, "")

    def say(self, sentence: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, **fields: str) -> None:
        """Nothing."""

    def log_metrics(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        """Nothing."""


def is_main_process() -> bool:
    """False in all processes but the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def stage_run(name: str, params: Mapping[str, Any]) -> Iterator[StageRun]:
    """Open the stage's child run in MLflow; it ends with the seconds and the peak memory, finished or failed."""
    if not is_main_process():
        yield SilentRun(name)
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
        # Each further request to an MLflow that does not answer would be retried for minutes.
        if any(is_unreachable(cause) for cause in causes(error)):
            status = ""
        raise
    finally:
        if status:
            _end_run(run, name, status, time.monotonic() - started)


def _end_run(run: StageRun, name: str, status: str, seconds: float) -> None:
    run.log_metrics([(0, {"seconds": seconds, "peak_memory_mib": peak_memory_mib()})])
    run.client.set_terminated(run.run_id, status)
    if os.environ.get(KFP_RUN_VARIABLE) and (status == "FAILED" or name == LAST_STAGE):
        run.client.set_terminated(parent_run(), status)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_mlflow_failure(error: BaseException) -> bool:
    """Whether MLflow or the way to it failed, rather than we."""
    return type(error).__module__.startswith(("mlflow.", "sqlalchemy.", "requests.", "urllib3."))


def is_unreachable(error: BaseException) -> bool:
    """Whether MLflow does not answer, or answers that it cannot serve now."""
    if type(error).__module__.startswith(("requests.", "urllib3.")):
        return True
    text = str(error)
    return is_mlflow_failure(error) and (
        "Max retries exceeded" in text or "too many 5" in text or "failed with exception" in text
    )


def explain_mlflow(error: BaseException) -> str:
    """A sentence for the failures of MLflow that a person can mend."""
    where = without_credentials(tracking_uri())
    said = without_credentials(one_line(str(error)))[:300]
    status = getattr(error, "get_http_status_code", lambda: 0)()
    if status in (401, 403):
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or "nobody (MLFLOW_TRACKING_USERNAME is not set)"
        return (
            f"MLflow at {where} does not let {user} do this ({said}); to write runs it takes EDIT on the experiment, to"
            " register and promote EDIT on the registered model, and their owner or an administrator grants it"
        )
    return f"MLflow at {where}: {said}"


def _begin_on_kubeflow(mlflow_client: Any, stage: str) -> None:
    """On Kubeflow nobody else closes what an evicted pod left open: the run of its stage, and the parent's status."""
    if not os.environ.get(KFP_RUN_VARIABLE):
        return
    query = (
        f"tags.`mlflow.parentRunId` = '{parent_run()}' AND tags.`kubealign.stage` = '{stage}'"
        " AND attributes.status = 'RUNNING'"
    )
    for left in mlflow_client.search_runs([experiment_id(mlflow_client)], query):
        mlflow_client.set_terminated(left.info.run_id, "KILLED")
    mlflow_client.update_run(parent_run(), "RUNNING")


@contextmanager
def boundary(name: str) -> Iterator[None]:
    """The edge between a stage and Kubeflow: a failure becomes one `[error:…]` line and an exit code.

    An error meant for a person is shown as it is; anything else after its traceback.
    """
    print(f"[stage] {name} started", flush=True)
    try:
        yield
    except KubealignError as error:
        print(f"[error:{error.exit_code}] {name} {one_line(str(error))}", flush=True)
        sys.exit(error.exit_code)
    except OSError as error:
        print(without_credentials(traceback.format_exc()))
        print(f"[error:1] {name} {one_line(explain_os_error(error))}", flush=True)
        sys.exit(1)
    except Exception as error:
        print(without_credentials(traceback.format_exc()))
        message = without_credentials(one_line(str(error)))
        said = explain_mlflow(error) if is_mlflow_failure(error) else f"{type(error).__name__}: {message}"
        print(f"[error:1] {name} {said}", flush=True)
        sys.exit(1)
    print(f"[stage] {name} finished", flush=True)


def show_metrics(artifact: Any, values: Mapping[str, float]) -> None:
    """Put values on a KFP Metrics artifact, and into a file at its path: to KFP's local cache an output without a file
    is a lost one, and the step would run again.
    """
    for name, value in values.items():
        artifact.log_metric(name, value)
    write_json(Path(artifact.path), values)


def explain_os_error(error: OSError) -> str:
    """A sentence for the failures of a disk that a person can mend."""
    where = error.filename2 or error.filename or "the disk"
    if error.errno == errno.ENOSPC:
        return f"{where}: no space left; free some (`kubealign clean` shows what runs left behind) and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: cannot be written or read ({error.strerror}); check its owner and mode and run again"
    return f"{type(error).__name__}: {error}"


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
