"""`kubealign run`: open the parent run in MLflow, start the child that executes the pipeline, show its events, and
leave no process behind when it is interrupted.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from components.common.errors import InputError, InterruptedRunError, StepFailedError
from components.common.provenance import git_commit
from components.common.secrets import MaskedStream, without_credentials
from components.common.urls import is_url
from components.config.params import Config, pipeline_arguments
from components.stages import BY_NAME
from components.tracking import store
from components.tracking.errors import is_mlflow_failure
from components.tracking.events import EVENTS_VARIABLE, Event, EventReader
from components.tracking.keys import check_own_key
from pipelines.local.containers import containers_for_a_run
from pipelines.local.display import Display
from pipelines.platform import for_its_hardware
from pipelines.project import home_in_use
from pipelines.quiet import QUIET

STOP_AFTER_S = 5.0

LOG_FILE, EVENTS_FILE = "log.txt", "events.jsonl"
"""Files in a run's folder: the complete output of its steps, and their events."""
POLL_S = 0.1


@dataclass
class ChildState:
    """The state of the child, from the events it has reported so far."""

    stage: str = ""
    errors: list[Event] = field(default_factory=list)


def run_pipeline(
    config: Config, project: Path, display: Display, runner: str, caching: bool = True, project_commit: str = ""
) -> str:
    """Run the pipeline on this machine.

    Args:
        config: the whole configuration.
        project: the folder with params.yaml; local paths in the configuration are relative to it.
        display: shows progress.
        runner: `subprocess` for steps in processes of this environment, `docker` for steps in our images.
        caching: whether a step that has run with the same inputs is served from the cache.
        project_commit: as in `pipeline_arguments`.

    Returns:
        the id of the parent run in MLflow.

    Raises:
        StepFailedError: a step failed.
        InterruptedRunError: SIGINT or SIGTERM arrived; every child process is gone.
    """
    if runner == "docker":
        config = for_its_hardware(config, runner)
    arguments = run_arguments(config, project, project_commit)
    uri = store.tracking_uri()
    with home_in_use():
        check_own_key()
    store.client()  # re-bases a home folder that was moved, which it does to none that is in use
    with home_in_use(), containers_for_a_run() if runner == "docker" else nullcontext():
        return _run_pipeline(arguments, project, display, {"runner": runner, "store": uri, "caching": caching})


def _run_pipeline(arguments: dict[str, Any], project: Path, display: Display, options: dict[str, Any]) -> str:
    client = store.client()
    parent = client.create_run(
        store.experiment_id(client), tags={"kubealign.kind": "pipeline", "kubealign.git_commit": git_commit()}
    )
    run_id: str = parent.info.run_id
    status = "FAILED"
    try:
        _run_child({"arguments": arguments, "project": str(project)} | options, run_id, display)
        status = "FINISHED"
    except InterruptedRunError:
        status = "KILLED"
        raise
    finally:
        _close_runs(client, run_id, status)
    return run_id


def run_folder(run_id: str) -> Path:
    """The folder with a run's log, events and report on this machine."""
    return store.home() / "runs" / run_id


def _run_child(request: dict[str, Any], run_id: str, display: Display) -> None:
    folder = run_folder(run_id)
    events = _new_events_file(folder)
    environment = {
        **QUIET,
        **os.environ,
        "KUBEALIGN_PARENT_RUN": run_id,
        EVENTS_VARIABLE: str(events),
        "MLFLOW_TRACKING_URI": store.tracking_uri(),
        store.HOME_VARIABLE: str(store.home()),
    }
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipelines.local.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=request["project"],
        env=environment,
        start_new_session=True,
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise InterruptedRunError(number)

    for number in before:
        signal.signal(number, stop)
    state = ChildState()
    try:
        assert child.stdin
        with display:
            child.stdin.write(json.dumps(request | {"home": str(store.home())}).encode())
            child.stdin.close()
            _follow(child, folder / LOG_FILE, EventReader(events), state, display)
        code = child.wait()
    finally:
        _end(child)
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        _fail(state, folder / LOG_FILE)


def _new_events_file(folder: Path) -> Path:
    """Create an empty events file, writable for the home folder's owner, as whom steps in containers run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EVENTS_FILE
    path.touch()
    if os.geteuid() == 0:
        owner = store.home().stat()
        os.chown(path, owner.st_uid, owner.st_gid)
    return path


def _follow(
    child: subprocess.Popen[bytes], log_file: Path, reader: EventReader, state: ChildState, display: Display
) -> None:
    """Copy the child's output to the log and handle its events until it closes its output.

    The output is copied byte for byte, whatever libraries print, but for secrets; only events are parsed.
    """
    assert child.stdout
    masked = MaskedStream()
    with log_file.open("wb", buffering=0) as log, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        is_open = True
        while is_open:
            if selector.select(POLL_S):
                chunk = os.read(child.stdout.fileno(), 1 << 16)
                log.write(masked.feed(chunk))
                is_open = bool(chunk)
            for event in reader.read():
                _handle_event(event, state, display)


def run_arguments(config: Config, project: Path, project_commit: str = "") -> dict[str, Any]:
    """The pipeline's arguments, with local paths made absolute.

    Raises:
        InputError: a value that KFP's local runner would change.
    """
    arguments = pipeline_arguments(with_absolute_paths(config, project), project_commit)
    for value in arguments.values():
        if isinstance(value, str) and "python3" in value:
            raise InputError(
                "a path or setting contains `python3`, which KFP's local runner replaces everywhere;"
                f" rename it: {without_credentials(value)}"
            )
    return arguments


def with_absolute_paths(config: Config, project: Path) -> Config:
    """The configuration with its local paths, relative to the project, made absolute."""
    data, model = config.data, config.model
    if not is_url(data.repo):
        data = data.model_copy(update={"repo": str((project / data.repo).resolve())})
    if (project / model.base).is_dir():
        model = model.model_copy(update={"base": str((project / model.base).resolve())})
    return config.model_copy(update={"data": data, "model": model})


def _handle_event(event: Event, state: ChildState, display: Display) -> None:
    if event.kind != "cached":
        state.stage = event.stage
    if event.kind == "error":
        state.errors.append(event)
    display.show(event)


def _fail(state: ChildState, log: Path) -> NoReturn:
    if state.errors:
        last = state.errors[-1]
        raise StepFailedError(f"{last.stage}: {last.message}\n(full log: {log})", last.exit_code or 1)
    hint = (
        f" (try a lower {state.stage}.max_tokens_per_microbatch, or model.gradient_checkpointing=true)"
        if state.stage in BY_NAME and BY_NAME[state.stage].trains
        else ""
    )
    raise StepFailedError(
        f"{state.stage or 'the pipeline'} ended without a message, possibly killed: out of memory{hint}; see the log:"
        f" {log}",
        1,
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group and wait for the child to exit."""
    deadline = time.monotonic() + STOP_AFTER_S
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.02)
    child.wait()


def _close_runs(client: Any, run_id: str, status: str) -> None:
    """End the parent run and the stage runs that a kill left open.

    If MLflow itself failed, the runs stay open, so that the step's own error is the one reported.
    """
    try:
        _end_runs(client, run_id, status)
    except Exception as error:
        if status == "FINISHED" or not is_mlflow_failure(error):
            raise


def _end_runs(client: Any, run_id: str, status: str) -> None:
    client.set_terminated(run_id, status)
    experiment = client.get_run(run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{run_id}' AND attributes.status = 'RUNNING'"
    for stage_run in client.search_runs([experiment], query):
        client.set_terminated(stage_run.info.run_id, "KILLED")
