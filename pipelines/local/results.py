"""Results of finished runs, read from MLflow and shown as a table."""

import hashlib
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from components.common.documents import parse_document
from components.common.errors import EvidenceError, InputError, KubealignError
from components.common.files import write_text
from components.common.secrets import without_credentials
from components.gate.results import Estimate
from components.register.result import Result
from components.registry.evidence import RESULT_SIGNATURE, check_result
from components.tracking import store
from pipelines.local.runner import run_folder
from pipelines.terminal import terminal


class FinishedRun(Result):
    """The result of a run, with its version's current aliases and a local copy of its report."""

    report: str
    """Path of the report page on this machine."""


NAMES = {"sft": "SFT", "policy": "policy", "incumbent": "incumbent"}


def find_run(run: str) -> str:
    """The id of the named pipeline run, or of the latest one if `run` is empty.

    Raises:
        InputError: there is no such run.
        KubealignError: it has not finished, or is not a pipeline run.
    """
    from mlflow.exceptions import MlflowException

    client = store.client()
    if run:
        try:
            pipeline_run = client.get_run(run)
        except MlflowException as error:
            raise InputError(f"run {run}: not found in {without_credentials(store.tracking_uri())}") from error
    else:
        runs = client.search_runs(
            [store.experiment_id(client)],
            "tags.`kubealign.kind` = 'pipeline'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not runs:
            raise InputError("no run yet; start one with `kubealign run`")
        pipeline_run = runs[0]
    info, tags = pipeline_run.info, pipeline_run.data.tags
    if info.status != "FINISHED" or tags.get("kubealign.kind") != "pipeline":
        raise KubealignError(f"run {info.run_id} is not a finished pipeline run (status {info.status})")
    return str(info.run_id)


def load_result(run_id: str) -> FinishedRun:
    """The result of a finished run, with the version's current aliases; the report is downloaded if it is not here.

    Raises:
        InputError: the result is damaged, or was written by another version of kubealign.
        EvidenceError: nobody whom we trust signed it as the result of this run.
        KubealignError: the version is no longer in the registry.
    """
    import mlflow

    client = store.client()
    uri, report = f"runs:/{run_id}/result.json", run_folder(run_id) / "report.html"
    texts = {name: mlflow.artifacts.load_text(f"runs:/{run_id}/{name}") for name in ("result.json", "report.html")}
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    check_result(run_id, files, _signature(run_id))
    result = parse_document(texts["result.json"], Result, uri)
    write_text(report, texts["report.html"])
    parent = client.get_run(run_id)
    query = f"tags.`mlflow.parentRunId` = '{run_id}' AND tags.`kubealign.stage` = 'register'"
    for child in client.search_runs([parent.info.experiment_id], query):
        result["stages"]["register"] = {
            "run_id": child.info.run_id,
            "cached": False,
            "seconds": child.data.metrics.get("seconds"),
            "peak_memory_mib": child.data.metrics.get("peak_memory_mib"),
        }
    try:
        result["aliases"] = sorted(client.get_model_version(result["model"], result["version"]).aliases)
    except mlflow.exceptions.MlflowException as error:
        raise KubealignError(f"{result['model_uri']} is no longer in the registry") from error
    return {**result, "report": str(report)}


def _signature(run_id: str) -> bytes:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return str(mlflow.artifacts.load_text(f"runs:/{run_id}/{RESULT_SIGNATURE}")).encode()
    except MlflowException as error:
        if has_artifact(store.client(), run_id, RESULT_SIGNATURE):
            raise
        raise EvidenceError(f"run {run_id}: no {RESULT_SIGNATURE}, so nothing proves how it ended") from error


def has_artifact(client: Any, run_id: str, name: str) -> bool:
    """Whether a run has an artifact, whether or not it can be read; there need be no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return any(artifact.path == name for artifact in client.list_artifacts(run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def show_result(console: Console, result: FinishedRun) -> None:
    """Print the summary that ends a run."""
    table = Table("model", "pairs", "log-loss", "accuracy", "margin, nats", box=box.SIMPLE_HEAD)
    for name, title in NAMES.items():
        if name in result["metrics"]:
            metrics = result["metrics"][name]
            keys = ("preference_log_loss", "rewards/accuracies", "rewards/margins")
            estimates = (estimate_text(metrics[key]) for key in keys)
            table.add_row(*map(terminal, (title, metrics["rewards/accuracies"]["n"], *estimates)))
    console.print(
        "Held-out pairs: preference log-loss (nats), reward accuracy, margin, with intervals", highlight=False
    )
    console.print(table)
    verdict = "passed the gate" if result["verdict"]["passed"] else f"not promoted: {result['verdict']['verdict']}"
    lines = [
        f"verdict   {verdict}",
        f"          {result['verdict']['sentence']}",
        f"decision  {result['decided']['sentence']}; decision {result['verdict']['decision_index']} on this test set,"
        f" tested at alpha {result['verdict']['alpha_for_decision']:.2g}",
        f"model     {result['model_uri']}  ({', '.join(result['aliases']) or 'no alias'})",
        f"report    {result['report']}",
        "MLflow    kubealign ui",
    ]
    for line in lines:
        console.print(terminal(line, indented=True), soft_wrap=True)


def estimate_text(estimate: Estimate) -> str:
    """An estimate with its confidence interval as text, such as `0.610 [0.500, 0.700]`."""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
