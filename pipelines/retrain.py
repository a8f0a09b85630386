"""`kubealign ci retrain`: a model of this commit and its data, once; the verdict in files, whatever happens.

What has been judged before is not trained again: the key of data, settings and code is looked up in MLflow first. On
Kubeflow a run is named by its key, so that whoever comes later, and whatever answer was lost, finds the one that is
under way; a state file keeps its id. A signal cancels it.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from components.common import tracking
from components.common.config import PARAMS, Config, load_config, pipeline_arguments
from components.common.errors import InputError, KubealignError
from components.common.files import digest, read_json, write_json
from components.resolve.data import is_url
from components.resolve.key import Key, resolve_key
from pipelines import notify, outcome
from pipelines.alignment import NAME
from pipelines.display import Display
from pipelines.kubeflow import RunState, Server, ServerTrouble, TimeIsUp, submit
from pipelines.options import run_config
from pipelines.results import load_result, show_result
from pipelines.revisions import find_commit, is_own, opened_repository, origin
from pipelines.runner import Stopped, run_arguments, run_pipeline

STATE = "retrain.json"
TRAINING = (
    "validate_section",
    *("sft_section", "sft_epochs", "sft_lr"),
    *("dpo_section", "dpo_epochs", "dpo_lr", "dpo_beta", "dpo_loss"),
)
JUDGING = ("evaluate_section", "gate_section")
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
CANCEL_WITHIN_S = 6.0
"""CI systems end a job for good some seconds after they asked it to stop; GitHub Actions after ten."""
T = TypeVar("T")


class Unfinished(KubealignError):
    """The run may still come to a verdict; the same command goes on."""


@dataclass(frozen=True)
class Job:
    """One call of the command."""

    root: Path
    config: Config
    """With the data's repository and commit as the runner gets them."""
    runner: str
    commit: str
    key: str
    facts: Key
    again: bool
    out: Path
    patience_s: float
    timeout_s: float
    console: Console

    @property
    def order(self) -> outcome.Order:
        return outcome.Order(self.commit, self.key, next(iter(self.facts.data.digests.values())))

    def say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def make_job(
    root: Path,
    overrides: list[str],
    runner: str,
    again: bool,
    out: Path,
    patience_s: float,
    timeout_s: float,
    console: Console,
) -> Job:
    """Settle what is to be trained: which commit, which data, and the key that they have.

    Raises:
        InputError: the project has uncommitted changes, or something that is named is not there.
    """
    config = run_config(root, overrides)
    commit, own = _checkout(root, config)
    if own and any(override.strip().startswith("data.") for override in overrides):
        raise InputError("the data is in this repository: a retraining takes it from the commit that is checked out")
    local = _with_data(config, str(root), commit) if own else config
    settled = run_arguments(local, root)
    template = json.loads(settled["model_section"])["template"]
    model = local.model.model_copy(update={"base": settled["base_model"], "template": template})
    arguments = pipeline_arguments(local)
    facts = resolve_key(
        local.data, model, [arguments[name] for name in TRAINING], [arguments[name] for name in JUDGING]
    )
    config = _with_data(config, own, commit) if own and runner == "kubeflow" else local
    key = digest([facts.lineage, facts.config, facts.code["evaluate"], config.register_.name])[:16]
    if runner == "kubeflow":
        _refuse_what_only_this_machine_has(config, own)
    return Job(root, config, runner, commit, key, facts, again, out, patience_s, timeout_s, console)


def _checkout(root: Path, config: Config) -> tuple[str, str]:
    """The commit that is checked out, and the URL (or path) of its repository when the data is in it.

    Raises:
        InputError: tracked files differ from the commit.
    """
    from dulwich import porcelain

    with opened_repository(root) as (repo, folder):
        state = porcelain.status(repo, untracked_files="no")
        changed = [*state.unstaged, *(path for paths in state.staged.values() for path in paths)]
        if changed:
            names = ", ".join(os.fsdecode(path) for path in changed[:3])
            raise InputError(f"{names} differ from the commit that is checked out; commit first")
        own = is_own(repo, folder, config.data.repo)
        return find_commit(repo, "HEAD"), (origin(repo) or str(root)) if own else ""


def _with_data(config: Config, repo: str, commit: str) -> Config:
    data = config.data.model_copy(update={"repo": repo, "revision": commit})
    return config.model_copy(update={"data": data})


def _refuse_what_only_this_machine_has(config: Config, own: str) -> None:
    if own and not is_url(own):
        raise InputError("the repository has no remote `origin` with a URL, from which Kubeflow could get the data")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise InputError(
            f"MLFLOW_TRACKING_URI is not set; the verdict is read there: the server of cluster.mlflow_uri"
            f" ({config.cluster.mlflow_uri}), as it is reached from here"
        )


def retrain(job: Job) -> int:
    """Come to a verdict.

    Returns:
        the exit code: 0 for any verdict.

    Raises:
        KubealignError: no verdict; why is in the files below `job.out`, too.
    """
    hook = notify.webhook()
    outcome.forget(job.out)
    try:
        return _come_to_a_verdict(job, hook)
    except Exception as error:
        told = error if isinstance(error, KubealignError) else _trouble_with_mlflow(error)
        if told is None:
            raise
        state = "canceled" if isinstance(told, Stopped) else "unfinished" if isinstance(told, Unfinished) else "failed"
        _tell(hook, job, "failed", outcome.write_failure(job.out, job.order, state, str(told)))
        raise told from error


def _come_to_a_verdict(job: Job, hook: notify.Webhook | None) -> int:
    versions = {Path(name).name: value[:8] for name, value in job.facts.data.digests.items()}
    data = ", ".join(f"{name} {value}" for name, value in versions.items())
    job.say(f"commit    {job.commit[:12]}  ({data}; base model {job.facts.base.digest[:8]})")
    job.say(f"key       {job.key}")
    known = None if job.again else judged_before(job)
    if known:
        outcome.write_verdict(job.out, job.order, known, new=False)
        job.say("This commit's data, settings and code have been judged before; --again insists on a new run.")
        show_result(job.console, known)
        return 0
    run_id, link = _on_kubeflow(job) if job.runner == "kubeflow" else _here(job)
    result = _checked(job, load_result(run_id))
    found = outcome.write_verdict(job.out, outcome.Order(**vars(job.order) | {"link": link}), result, new=True)
    show_result(job.console, result)
    _tell(hook, job, "verdict", found)
    return 0


def _trouble_with_mlflow(error: Exception) -> KubealignError | None:
    """A sentence for what MLflow, or the way to it, refused."""
    if not type(error).__module__.startswith(("mlflow.", "sqlalchemy.", "requests.")):
        return None
    where, said = tracking.tracking_uri(), tracking.one_line(str(error))[:300]
    return KubealignError(tracking.without_credentials(f"MLflow at {where}: {said}"))


def _tell(hook: notify.Webhook | None, job: Job, kind: str, data: dict[str, Any]) -> None:
    """Deliver what happened. A receiver that is down changes nothing of it."""
    if hook is None:
        return
    try:
        hook.send(f"retrain.{kind}", data)
    except KubealignError as error:
        print(f"warning: not notified: {error}", file=sys.stderr)


def judged_before(job: Job) -> dict[str, Any] | None:
    """The result of the newest run with the same key whose version still is in the registry."""
    client = tracking.client()
    facts = {"lineage": job.facts.lineage, "config": job.facts.config, "code_evaluate": job.facts.code["evaluate"]}
    query = " AND ".join(["tags.`kubealign.stage` = 'resolve'", *(f"params.{k} = '{v}'" for k, v in facts.items())])
    order = ["attributes.start_time DESC"]
    for found in client.search_runs([tracking.experiment_id(client)], query, order_by=order, max_results=50):
        parent = found.data.tags.get("mlflow.parentRunId")
        tags = client.get_run(parent).data.tags if parent else {}
        if not tags.get("kubealign.version", "").startswith(f"models:/{job.config.register_.name}/"):
            continue
        with contextlib.suppress(KubealignError):  # its version was deleted
            result = load_result(parent)
            if result.get("decided", {}).get("state") != "superseded":
                return result
    return None


def _checked(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The result, if it is of what was asked for.

    Raises:
        KubealignError: the run had other data or other code.
    """
    wanted = {"lineage": job.facts.lineage, "config": job.facts.config}
    if any(result[name] != value for name, value in wanted.items()):
        raise KubealignError(
            f"the run made {result['model_uri']} of something else than commit {job.commit[:12]} (lineage"
            f" {result['lineage'][:12]}, expected {job.facts.lineage[:12]}); most likely the images are of other code:"
            " `make images`, push them, and run again with cluster.pull_policy=Always"
        )
    return result


def _here(job: Job) -> tuple[str, str]:
    """Run on this machine; returns the parent run's id and no link."""
    return run_pipeline(job.config, job.root, Display(job.console), job.runner, caching=not job.again), ""


# ---- Kubeflow


def _on_kubeflow(job: Job) -> tuple[str, str]:
    """Run on Kubeflow, or follow the run that is under way; returns the parent run's id in MLflow and a link."""
    server = Server(job.config.cluster)
    state = _state(job, server)
    file = job.out / STATE
    try:
        with _signals():
            if not state["run_id"]:
                write_json(file, state)
                state["run_id"] = _patiently(job, job.patience_s, lambda: _adopt_or_start(job, server, state["name"]))
                write_json(file, state)
            job.say(server.link(state["run_id"]))
            ended = server.wait(state["run_id"], _teller(job), job.timeout_s, job.patience_s)
    except Stopped:
        _cancel(job, server, state)
        raise
    except (ServerTrouble, TimeIsUp) as error:
        if isinstance(error, ServerTrouble) and not error.passing:
            file.unlink(missing_ok=True)
            raise
        raise Unfinished(f"{error}\nnothing is lost; the same command goes on: {_command()}") from error
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
            job.say(f"going on with run {found['run_id'] or '(not started yet)'} of {file}")
            return dict(found)
    name = f"{NAME} {job.commit[:12]} {job.key}" + (f" again {uuid.uuid4().hex[:8]}" if job.again else "")
    return {"key": job.key, "endpoint": server.endpoint, "name": name, "run_id": ""}


def _adopt_or_start(job: Job, server: Server, name: str) -> str:
    under_way = server.under_way(name)
    if under_way:
        job.say(f"a run of this key is under way: {under_way[0]}")
        return under_way[0]
    run_id, version = submit(job.config, server, name=name, caching=not job.again)
    job.say(f"run {run_id} of version {version}")
    return run_id


def _patiently(job: Job, patience_s: float, call: Callable[[], T]) -> T:
    """Call until the server answers, for a bounded time, with longer and longer pauses."""
    deadline, delay_s = time.monotonic() + patience_s, FIRST_DELAY_S
    while True:
        try:
            return call()
        except ServerTrouble as error:
            if not error.passing or time.monotonic() + delay_s > deadline:
                raise
            job.say(f"{error}; again in {delay_s:.0f} s")
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def _teller(job: Job) -> Callable[[RunState], None]:
    shown: dict[str, str] = {}

    def tell(state: RunState) -> None:
        for step in state.steps:
            if shown.get(step.name) != step.state:
                shown[step.name] = step.state
                job.say(f"{step.name}: {step.state.lower()}")

    return tell


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`, once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, lambda *_: None)
        raise Stopped(number, "canceled")

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except Stopped:
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


def version_summary(root: Path, version: str) -> str:
    """The verdict on a version of the configured model, as Markdown.

    Raises:
        InputError: there is no run that made or judged it.
    """
    client = tracking.client()
    uri = f"models:/{load_config(root / PARAMS).register_.name}/{version}"
    query = f"tags.`kubealign.version` = '{uri}'"
    if not version.isdigit():
        raise InputError(f"version {version!r}: expected a number, such as 3")
    order = ["attributes.start_time DESC"]
    found = client.search_runs([tracking.experiment_id(client)], query, order_by=order, max_results=1)
    if not found:
        where = tracking.without_credentials(tracking.tracking_uri())
        raise InputError(f"{uri}: no run at {where} judged it")
    result = load_result(found[0].info.run_id)
    facts = outcome.Order(result["git_commit"], "", result["preferences_digest"])
    return outcome.markdown(facts, result, new=True)


def _cancel(job: Job, server: Server, state: dict[str, str]) -> None:
    """End the run, also one whose id was never heard."""

    def cancel() -> None:
        for run_id in [state["run_id"]] if state["run_id"] else server.under_way(state["name"]):
            server.cancel(run_id)
            job.say(f"{run_id}: is being canceled")

    try:
        _patiently(job, CANCEL_WITHIN_S, cancel)
    except ServerTrouble as error:
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
    client = tracking.client()
    query = f"tags.`kubealign.kfp_run` = '{kfp_run}'"
    found = client.search_runs([tracking.experiment_id(client)], query, max_results=1)
    if not found:
        where = tracking.without_credentials(tracking.tracking_uri())
        raise KubealignError(
            f"run {kfp_run} succeeded, but MLflow at {where} knows nothing of it; is it another server?"
        )
    return str(found[0].info.run_id)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
