"""A retraining on Kubeflow: start the run at most once, follow it to its end, cancel it on a signal.

The run's name contains its key, so a later call finds the active run even if the server's answer to the start was lost;
a state file records the run's id.
"""

import contextlib
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from components.common.errors import (
    InputError,
    InterruptedRunError,
    KubealignError,
    KubeflowApiError,
    RunPendingError,
)
from components.common.files import read_json, write_json
from components.common.secrets import without_credentials
from components.config.params import PARAMS, load_config
from components.tracking import store
from components.tracking.errors import explain_mlflow_error, is_mlflow_failure
from pipelines.alignment import NAME
from pipelines.ci.job import Job
from pipelines.kubeflow import ENDED, ENDPOINT, RunState, Server, submit
from pipelines.local.results import FinishedRun, load_result
from pipelines.terminal import terminal

STATE = "retrain.json"
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
CANCEL_WITHIN_S = 6.0
"""Time limit for canceling: CI systems kill a job some seconds after asking it to stop, GitHub Actions after ten."""
T = TypeVar("T")


def run_on_kubeflow(job: Job) -> tuple[FinishedRun, str]:
    """Run on Kubeflow, or follow the run already in progress; returns its result and a link.

    The state file stays until the run's end is known and its result was read, or it was canceled.

    Raises:
        RunPendingError: Kubeflow, or MLflow, does not tell us how the run ended.
        KubealignError: the run failed, or could not be started.
    """
    server = Server(job.config.cluster)
    state = _state(job, server)
    try:
        return _follow(job, server, state), server.link(state["run_id"])
    except KubealignError as error:
        error.link = server.link(state["run_id"]) if state["run_id"] else ""
        raise


def _follow(job: Job, server: Server, state: dict[str, str]) -> FinishedRun:
    file = job.out / STATE
    try:
        with _signals():
            if not state["run_id"]:
                write_json(file, state)
                start = partial(_adopt_or_start, job, server, state["name"])
                state["run_id"] = _retry(job, job.retry_timeout_s, start)
                write_json(file, state)
            job.log(server.link(state["run_id"]))
            ended = server.wait(state["run_id"], _log_changes(job), job.timeout_s, job.retry_timeout_s)
    except InterruptedRunError:
        _cancel(job, server, state)
        raise
    except (KubeflowApiError, RunPendingError) as error:
        gone = isinstance(error, KubeflowApiError) and state["run_id"] and error.is_gone(state["run_id"])
        if gone or not (isinstance(error, RunPendingError) or error.about_caller):
            file.unlink(missing_ok=True)
            raise
        raise _pending(str(error)) from error
    if ended.state != "SUCCEEDED":
        file.unlink(missing_ok=True)
        raise KubealignError(_failure(server, ended))
    try:
        result = load_result(_parent_of(state["run_id"]))
    except RunPendingError:
        raise
    except KubealignError:
        file.unlink(missing_ok=True)
        raise
    except Exception as error:
        if is_mlflow_failure(error):  # it says nothing about the run
            raise _pending(explain_mlflow_error(error)) from error
        raise
    file.unlink(missing_ok=True)
    return result


def _pending(message: str) -> RunPendingError:
    return RunPendingError(f"{message}\nnothing is lost; run the same command to resume: {_command()}")


def _state(job: Job, server: Server) -> dict[str, str]:
    """The state of the run with this key: from the state file, or that of a run yet to start."""
    file = job.out / STATE
    if file.is_file():
        state = read_json(file)
        if (state.get("key"), state.get("endpoint")) == (job.key, server.endpoint):
            job.log(f"resuming run {state['run_id'] or '(not started yet)'} from {file}")
            return dict(state)
    name = f"{NAME} {job.commit[:12]} {job.key}" + (f" again {uuid.uuid4().hex[:8]}" if job.rerun else "")
    return {"key": job.key, "endpoint": server.endpoint, "name": name, "run_id": ""}


def _adopt_or_start(job: Job, server: Server, name: str) -> str:
    active = server.active_runs(name)
    if active:
        job.log(f"a run with this key is already in progress: {active[0]}")
        return active[0]
    run_id, version = submit(job.config, server, name=name, caching=not job.rerun, project_commit=job.judges)
    job.log(f"run {run_id} of version {version}")
    return run_id


def _retry(job: Job, retry_timeout_s: float, call: Callable[[], T]) -> T:
    """Call until the server answers, for at most `retry_timeout_s` seconds, with exponential backoff."""
    deadline, delay_s = time.monotonic() + retry_timeout_s, FIRST_DELAY_S
    while True:
        try:
            return call()
        except KubeflowApiError as error:
            if not error.retryable or time.monotonic() + delay_s > deadline:
                raise
            job.log(f"{error}; retrying in {delay_s:.0f} s")
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def _log_changes(job: Job) -> Callable[[RunState], None]:
    """A callback for `Server.wait` that logs every change of a step's state."""
    shown: dict[str, str] = {}

    def on_change(state: RunState) -> None:
        for step in state.steps:
            if shown.get(step.name) != step.state:
                shown[step.name] = step.state
                job.log(f"{step.name}: {step.state.lower()}")

    return on_change


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Make the first SIGINT or SIGTERM raise `InterruptedRunError`; later ones are ignored."""
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in handled}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled_number in handled:
            signal.signal(handled_number, lambda *_: None)
        raise InterruptedRunError(number, "canceled")

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except InterruptedRunError:
        raise  # a second signal must not interrupt the cancellation
    except BaseException:
        _restore(before)
        raise
    else:
        _restore(before)


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def cancel_left(root: Path, out: Path) -> list[str]:
    """Cancel the run that the state file in `out` names, if any; returns log lines of what was done.

    The file stays unless every run is canceled, has ended, or is gone.

    Raises:
        InputError: the run is on another server.
        KubeflowApiError: the server refused, or did not answer.
    """
    file = out / STATE
    if not file.is_file():
        return ["no run is in progress"]
    state = read_json(file)
    server = Server(load_config(root / PARAMS).cluster)
    if state["endpoint"] != server.endpoint:
        raise InputError(
            f"{file}: the run is on {state['endpoint']}; found {ENDPOINT}={server.endpoint}: name that server"
        )
    runs = [state["run_id"]] if state["run_id"] else server.active_runs(state["name"])
    lines = [f"{run_id}: {_end(server, run_id)}" for run_id in runs]
    file.unlink()
    return lines


def _end(server: Server, run_id: str) -> str:
    """Cancel a run; returns what became of it."""
    try:
        server.cancel(run_id)
    except KubeflowApiError as error:
        if error.is_gone(run_id):
            return "no longer exists"
        if error.about_caller or (state := server.state(run_id).state) not in ENDED:
            raise
        return f"had ended as {state}"
    return "cancellation requested"


def _cancel(job: Job, server: Server, state: dict[str, str]) -> None:
    """Cancel the run, even if its id never arrived."""

    def cancel() -> None:
        for run_id in [state["run_id"]] if state["run_id"] else server.active_runs(state["name"]):
            job.log(f"{run_id}: {_end(server, run_id)}")

    try:
        _retry(job, CANCEL_WITHIN_S, cancel)
    except KubeflowApiError as error:
        print(terminal(f"warning: the run could not be canceled: {error}; try `kubealign ci cancel`"), file=sys.stderr)
    else:
        (job.out / STATE).unlink(missing_ok=True)


def _failure(server: Server, ended: RunState) -> str:
    lines = [f"run {ended.run_id} ended as {ended.state} {ended.error}".rstrip()]
    for step in ended.steps:
        if step.state == "FAILED":
            log = server.log_tail(ended.run_id, step)
            lines += [f"step {step.name} failed {step.error}".rstrip(), *(f"  {line}" for line in log)]
    return "\n".join(lines)


def _parent_of(kfp_run: str) -> str:
    """The id of the MLflow parent run of a run on Kubeflow."""
    client = store.client()
    query = f"tags.`kubealign.kfp_run` = '{kfp_run}'"
    runs = client.search_runs([store.experiment_id(client)], query, max_results=1)
    if not runs:
        where = without_credentials(store.tracking_uri())
        raise _pending(
            f"run {kfp_run} succeeded, but MLflow at {where} has no record of it; is MLFLOW_TRACKING_URI the server of"
            " cluster.mlflow_uri?"
        )
    return str(runs[0].info.run_id)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
