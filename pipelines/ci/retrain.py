"""`kubealign ci retrain`: train and evaluate the checked-out commit once; write the outcome to files, whatever happens.

A model that was evaluated before is not trained again: the key of data, settings and code is looked up in MLflow first.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from components.common.errors import EvidenceError, InputError, InterruptedRunError, KubealignError, RunPendingError
from components.common.secrets import without_credentials
from components.config.params import PARAMS, load_config
from components.tracking import store
from components.tracking.errors import explain_mlflow_error, is_mlflow_failure
from pipelines.ci import notify, outcome
from pipelines.ci.follow import run_on_kubeflow
from pipelines.ci.job import Job
from pipelines.ci.judged import judged_before
from pipelines.local.display import Display
from pipelines.local.results import FinishedRun, load_result, show_result
from pipelines.local.runner import run_pipeline
from pipelines.terminal import terminal


def retrain(job: Job) -> int:
    """Train and evaluate a model, or find the verdict of an earlier run; write the outcome to files.

    Returns:
        the exit code: 0 for any verdict.

    Raises:
        KubealignError: there is no verdict; the files in `job.out` also say why.
    """
    hook = notify.webhook()
    outcome.clear_outputs(job.out)
    try:
        return _run_or_reuse(job, hook)
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            raise
        state = _state_after(explained)
        request = outcome.RetrainRequest(**vars(job.request) | {"link": explained.link})
        failure = outcome.write_failure(job.out, request, state, str(explained))
        _notify(hook, job, "unfinished" if state == "unfinished" else "failed", failure)
        raise explained from error


def _state_after(error: KubealignError) -> str:
    if isinstance(error, InterruptedRunError):
        return "canceled"
    return "unfinished" if isinstance(error, RunPendingError) else "failed"


def _run_or_reuse(job: Job, hook: notify.Webhook | None) -> int:
    facts = job.facts
    data = f"preferences {facts.preferences_digest[:8]}, instructions {facts.instructions_digest[:8]}"
    job.log(f"commit    {job.commit[:12]}  ({data}; base model {facts.base_digest[:8]})")
    job.log(f"key       {job.key}")
    previous = None if job.rerun else judged_before(job)
    if previous:
        outcome.write_verdict(job.out, job.request, previous, new=False)
        job.log("This commit's data, settings and code were judged before; --rerun forces a new run.")
        show_result(job.console, previous)
        return 0
    result, link = run_on_kubeflow(job) if job.runner == "kubeflow" else _run_here(job)
    _check(job, result)
    verdict = outcome.write_verdict(
        job.out, outcome.RetrainRequest(**vars(job.request) | {"link": link}), result, new=True
    )
    show_result(job.console, result)
    _notify(hook, job, "verdict", verdict)
    return 0


def _explained(error: Exception) -> KubealignError | None:
    """The error in the user's terms; None if it is a bug."""
    if isinstance(error, KubealignError):
        return error
    return KubealignError(explain_mlflow_error(error)) if is_mlflow_failure(error) else None


def _notify(hook: notify.Webhook | None, job: Job, kind: str, data: Mapping[str, object]) -> None:
    """Deliver an event to the webhook; a receiver that is down only causes a warning."""
    if hook is None:
        return
    try:
        hook.send(f"retrain.{kind}", data)
    except KubealignError as error:
        print(terminal(f"warning: not notified: {error}"), file=sys.stderr)


def _check(job: Job, result: FinishedRun) -> None:
    """Check that a result belongs to the requested key.

    Raises:
        KubealignError: the run used other data, settings or code.
    """
    if (result["lineage"], result["config"]) != (job.facts.lineage, job.facts.config):
        raise KubealignError(
            f"the run made {result['model_uri']} from something other than commit {job.commit[:12]} (lineage"
            f" {result['lineage'][:12]}, expected {job.facts.lineage[:12]}); most likely the images hold other code:"
            " run `make images`, push them, and run again with cluster.pull_policy=Always"
        )


def _run_here(job: Job) -> tuple[FinishedRun, str]:
    """Run on this machine; returns the result and an empty link."""
    display = Display(job.console)
    run_id = run_pipeline(job.config, job.root, display, job.runner, not job.rerun, project_commit=job.judges)
    return load_result(run_id), ""


def version_summary(root: Path, version: str) -> str:
    """The verdict on a version of the configured model, as Markdown.

    Raises:
        InputError: no run made or evaluated it.
        EvidenceError: nobody whom we trust signed the result.
    """
    client = store.client()
    uri = f"models:/{load_config(root / PARAMS).register_.name}/{version}"
    query = f"tags.`kubealign.version` = '{uri}'"
    if not version.isdigit():
        raise InputError(f"version {version!r}: expected a number, such as 3")
    order = ["attributes.start_time DESC"]
    runs = client.search_runs([store.experiment_id(client)], query, order_by=order, max_results=1)
    if not runs:
        where = without_credentials(store.tracking_uri())
        raise InputError(f"{uri}: no run at {where} made or evaluated it")
    result = load_result(runs[0].info.run_id)
    if result["model_uri"] != uri:
        raise EvidenceError(
            f"run {result['run_id']}: tagged with {uri}, but its signed result is {result['model_uri']}"
        )
    facts = outcome.RetrainRequest(result["git_commit"], "", result["preferences_digest"])
    return outcome.summary(facts, result, new=True)
