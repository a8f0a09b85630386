"""`kubealign run`: open the parent run in MLflow, start the child that runs the pipeline, show what it says, and leave
nothing behind when it is stopped.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from components.common.errors import InputError, KubealignError
from components.common.provenance import git_commit
from components.config.loading import pipeline_arguments
from components.config.sections import Config
from components.sources.data import is_url
from components.stages import STAGES
from components.tracking import run as tracking
from pipelines.local.containers import containers_for_a_run
from pipelines.local.display import Display

STOP_AFTER_S = 5.0
QUIET = {
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    # Threads that wait for each other by spinning stall on a shared machine: two processes on two cores were each 3.3
    # times as slow as one alone. A short spin makes that 2 times, and costs nothing when alone.
    "GOMP_SPINCOUNT": "10000",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment of every step, unless it is set already: no telemetry, no hub, no bars that a pipe tears apart."""

SPOKEN = re.compile(r"\s*\[(stage|progress|note|error)(?::(\d+))?\] (\w+) (.*)")
CACHE_HIT = re.compile(r"Task \W*(?:\x1b\[[0-9;]*m)*'?([\w-]+?)'?(?:\x1b\[[0-9;]*m)*\W* cache hit")


class StepFailed(KubealignError):
    """A step failed; the message is the step's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(KubealignError):
    """The run was stopped by a signal."""

    def __init__(
        self, number: int, message: str = "stopped; the same command goes on from the last finished step and checkpoint"
    ) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass
class Told:
    """What the child has said so far."""

    stage: str = ""
    errors: list[tuple[str, str, int]] = field(default_factory=list)


def run_pipeline(config: Config, project: Path, display: Display, runner: str, caching: bool = True) -> str:
    """Run the pipeline on this machine.

    Args:
        config: the whole configuration.
        project: the folder with params.yaml; relative names in the configuration are relative to it.
        display: shows progress.
        runner: `subprocess` for steps in processes of this environment, `docker` for steps in our images.
        caching: whether a step that has run with the same inputs is served from the cache.

    Returns:
        id of the parent run in MLflow.

    Raises:
        StepFailed: a step failed.
        Stopped: SIGINT or SIGTERM arrived; every child is gone.
    """
    arguments = run_arguments(config, project)
    store = tracking.tracking_uri()
    with containers_for_a_run() if runner == "docker" else nullcontext():
        return _run_pipeline(arguments, project, display, {"runner": runner, "store": store, "caching": caching})


def _run_pipeline(arguments: dict[str, Any], project: Path, display: Display, how: dict[str, Any]) -> str:
    client = tracking.client()
    parent = client.create_run(
        tracking.experiment_id(client), tags={"kubealign.kind": "pipeline", "kubealign.git_commit": git_commit()}
    )
    run_id: str = parent.info.run_id
    status = "FAILED"
    try:
        _run_child({"arguments": arguments, "project": str(project)} | how, run_id, display)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        _close_runs(client, run_id, status)
    return run_id


def run_folder(run_id: str) -> Path:
    """Where the log and the report of a run lie on this machine."""
    return tracking.home() / "runs" / run_id


def _run_child(order: dict[str, Any], run_id: str, display: Display) -> None:
    folder = run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **QUIET,
        **os.environ,
        "KUBEALIGN_PARENT_RUN": run_id,
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
        tracking.HOME_VARIABLE: str(tracking.home()),
    }
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipelines.local.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=order["project"],
        env=environment,
        start_new_session=True,
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    told = Told()
    try:
        assert child.stdin and child.stdout
        with (folder / "log.txt").open("w", encoding="utf-8") as log, display:
            child.stdin.write(json.dumps(order | {"home": str(tracking.home())}))
            child.stdin.close()
            for line in child.stdout:
                log.write(line)
                log.flush()
                _hear(line, told, display)
        code = child.wait()
    finally:
        _end(child)
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        _fail(told, folder / "log.txt")


def run_arguments(config: Config, project: Path) -> dict[str, Any]:
    """The pipeline's arguments, with local paths made absolute."""
    arguments = pipeline_arguments(config)
    data = json.loads(arguments["data_section"])
    if not is_url(data["repo"]):
        data["repo"] = str((project / data["repo"]).resolve())
    arguments["data_section"] = json.dumps(data, sort_keys=True)
    if (project / arguments["base_model"]).is_dir():
        arguments["base_model"] = str((project / arguments["base_model"]).resolve())
    model = json.loads(arguments["model_section"])
    if (project / model["template"]).is_file():
        model["template"] = str((project / model["template"]).resolve())
    arguments["model_section"] = json.dumps(model, sort_keys=True)
    for value in arguments.values():
        if isinstance(value, str) and "python3" in value:
            raise InputError(
                "a path or setting contains the word `python3`, which KFP's local runner replaces wherever it stands;"
                f" rename it: {tracking.without_credentials(value)}"
            )
    return arguments


def _hear(line: str, told: Told, display: Display) -> None:
    hit = CACHE_HIT.search(line)
    if hit and hit.group(1) in STAGES:
        display.cached(hit.group(1))
        return
    spoken = SPOKEN.match(line)
    if not spoken:
        return
    kind, code, stage, rest = spoken.groups()
    told.stage = stage
    if kind == "error":
        told.errors.append((stage, rest, int(code or 1)))
    elif kind == "progress":
        display.progress(stage, rest)
    elif kind == "note":
        display.note(stage, rest)
    elif rest == "started":
        display.started(stage)
    else:
        display.finished(stage)


def _fail(told: Told, log: Path) -> NoReturn:
    if told.errors:
        stage, message, code = told.errors[-1]
        raise StepFailed(f"{stage}: {message}\n(whole log: {log})", code)
    knobs = (
        f" (what helps: a lower {told.stage}.max_tokens_per_step, model.gradient_checkpointing=true)"
        if told.stage in ("sft", "dpo")
        else ""
    )
    raise StepFailed(
        f"{told.stage or 'the pipeline'} ended without a message, perhaps killed for want of memory{knobs}; the log"
        f" says more: {log}",
        1,
    )


def _end(child: subprocess.Popen[str]) -> None:
    """End the child's whole process group, and wait until nothing of it is left."""
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
    """End the parent run, and the stage runs that a kill left open.

    After a failure MLflow may be what failed; then the runs stay open, and the step's own message is what counts.
    """
    try:
        _end_runs(client, run_id, status)
    except Exception as error:
        if status == "FINISHED" or not tracking.is_mlflow_failure(error):
            raise


def _end_runs(client: Any, run_id: str, status: str) -> None:
    client.set_terminated(run_id, status)
    experiment = client.get_run(run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{run_id}' AND attributes.status = 'RUNNING'"
    for left in client.search_runs([experiment], query):
        client.set_terminated(left.info.run_id, "KILLED")
