"""A retraining on Kubeflow: started once, followed to its end, canceled by a signal.

A run is named by its key, so that whoever comes later, and whatever answer was lost, finds the one that is under way; a
state file keeps its id.
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
    InterruptedRunError,
    KubealignError,
    KubeflowApiError,
    RunPendingError,
    WaitTimeoutError,
)
from components.common.files import read_json, write_json
from components.config.params import PARAMS, load_config
from components.tracking import store
from pipelines.alignment import NAME
from pipelines.ci.job import Job
from pipelines.kubeflow import RunState, Server, submit

STATE = "retrain.json"
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
CANCEL_WITHIN_S = 6.0
"""CI systems end a job for good some seconds after they asked it to stop; GitHub Actions after ten."""
T = TypeVar("T")


def run_on_kubeflow(job: Job) -> tuple[str, str]:
    """Run on Kubeflow, or follow the run that is under way; returns the parent run's id in MLflow and a link."""
    server = Server(job.config.cluster)
    state = _state(job, server)
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
    except (KubeflowApiError, WaitTimeoutError) as error:
        if not error.retryable:
            file.unlink(missing_ok=True)
            raise
        raise RunPendingError(f"{error}\nnothing is lost; the same command goes on: {_command()}") from error
    file.unlink(missing_ok=True)
    if ended.state != "SUCCEEDED":
        raise KubealignError(_failure(server, ended))
    return _parent_of(state["run_id"]), server.link(state["run_id"])


def _state(job: Job, server: Server) -> dict[str, str]:
    """What is known of the run of this key: from the state file, or as it will be."""
    file = job.out / STATE
    if file.is_file():
        found = read_json(file)
        if (found.get("key"), found.get("endpoint")) == (job.key, server.endpoint):
            job.log(f"going on with run {found['run_id'] or '(not started yet)'} of {file}")
            return dict(found)
    name = f"{NAME} {job.commit[:12]} {job.key}" + (f" again {uuid.uuid4().hex[:8]}" if job.rerun else "")
    return {"key": job.key, "endpoint": server.endpoint, "name": name, "run_id": ""}


def _adopt_or_start(job: Job, server: Server, name: str) -> str:
    under_way = server.under_way(name)
    if under_way:
        job.log(f"a run of this key is under way: {under_way[0]}")
        return under_way[0]
    run_id, version = submit(job.config, server, name=name, caching=not job.rerun)
    job.log(f"run {run_id} of version {version}")
    return run_id


def _retry(job: Job, retry_timeout_s: float, call: Callable[[], T]) -> T:
    """Call until the server answers, for a bounded time, with longer and longer pauses."""
    deadline, delay_s = time.monotonic() + retry_timeout_s, FIRST_DELAY_S
    while True:
        try:
            return call()
        except KubeflowApiError as error:
            if not error.retryable or time.monotonic() + delay_s > deadline:
                raise
            job.log(f"{error}; again in {delay_s:.0f} s")
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def _log_changes(job: Job) -> Callable[[RunState], None]:
    """A callback for `Server.wait` that logs each change of a step's state."""
    shown: dict[str, str] = {}

    def on_change(state: RunState) -> None:
        for step in state.steps:
            if shown.get(step.name) != step.state:
                shown[step.name] = step.state
                job.log(f"{step.name}: {step.state.lower()}")

    return on_change


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `InterruptedRunError`, once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, lambda *_: None)
        raise InterruptedRunError(number, "canceled")

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except InterruptedRunError:
        raise  # a second signal must not end the cancelling
    except BaseException:
        _restore(before)
        raise
    else:
        _restore(before)


def _restore(before: dict[signal.Signals, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def cancel_left(root: Path, out: Path) -> list[str]:
    """End the run that the state file in `out` names, if there is one; returns what was done, in sentences."""
    file = out / STATE
    if not file.is_file():
        return ["no run is under way"]
    state = read_json(file)
    server = Server(load_config(root / PARAMS).cluster)
    told = []
    for run_id in [state["run_id"]] if state["run_id"] else server.under_way(state["name"]):
        server.cancel(run_id)
        told.append(f"{run_id}: is being canceled")
    file.unlink()
    return told


def _cancel(job: Job, server: Server, state: dict[str, str]) -> None:
    """End the run, also one whose id was never heard."""

    def cancel() -> None:
        for run_id in [state["run_id"]] if state["run_id"] else server.under_way(state["name"]):
            server.cancel(run_id)
            job.log(f"{run_id}: is being canceled")

    try:
        _retry(job, CANCEL_WITHIN_S, cancel)
    except KubeflowApiError as error:
        print(f"warning: the run could not be canceled: {error}; `kubealign ci cancel` does", file=sys.stderr)
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
    """The parent run in MLflow of a run on Kubeflow."""
    client = store.client()
    query = f"tags.`kubealign.kfp_run` = '{kfp_run}'"
    found = client.search_runs([store.experiment_id(client)], query, max_results=1)
    if not found:
        where = store.without_credentials(store.tracking_uri())
        raise KubealignError(
            f"run {kfp_run} succeeded, but MLflow at {where} knows nothing of it; is it another server?"
        )
    return str(found[0].info.run_id)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
