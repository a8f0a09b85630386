"""Register the evaluated model in MLflow with its lineage, and promote it to champion if the verdict allows.

Never cached. A rerun finds the version that an earlier run registered, and completes what was interrupted.
"""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from components.common.documents import read_document
from components.common.errors import ChampionChangedError, KubealignError
from components.common.files import sha256_file, verify_manifest, write_json
from components.config.gate import GateConfig
from components.dataset.validation import ValidationSummary
from components.gate.results import Evaluation
from components.gate.rules import GateContext, apply_gate
from components.gate.verdict import Verdict
from components.register import package
from components.register.card import model_card
from components.register.config import RegisterConfig
from components.register.result import Decision, Result, StageSummary
from components.registry.audit import CHALLENGER, Audit
from components.registry.champion import ROLLED_BACK, champion_alias, promote, reconcile_alias
from components.tracking.errors import explain_mlflow_error, is_mlflow_failure
from components.tracking.run import SETTINGS, StageRun, parent_run, stage_run
from components.tracking.store import KFP_RUN_VARIABLE
from components.training.documents import read_dpo_training

KFP_URL_VARIABLE = "KUBEALIGN_KFP_URL"
"""Environment variable with the address of the Kubeflow UI, from cluster.ui_url."""


@dataclass(frozen=True)
class Lineage:
    """Provenance of a model; every field becomes a tag of its version."""

    data_commit: str
    preferences_digest: str
    instructions_digest: str
    data_clean: bool
    test_set: str
    git_commit: str
    base_reference: str
    base_digest: str
    config: str
    lineage: str
    incumbent: str
    decision: str
    decision_index: int

    def tags(self) -> dict[str, str]:
        """The fields as tag values: booleans in lower case, numbers as digits."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


@dataclass(frozen=True)
class RegisterInputs:
    """Outputs of earlier steps: the aligned model, its base model, its evaluation, the clean data, and the report."""

    policy: Path
    base: Path
    evaluation: Path
    dataset: Path
    report: Path


def run_register(
    config: RegisterConfig,
    gate: GateConfig,
    lineage: Lineage,
    stage_runs: dict[str, str],
    inputs: RegisterInputs,
    out: Path,
) -> Result:
    """Register a model.

    Args:
        config: the registered model's name and format, and whether a passed gate promotes.
        gate: the rules that the verdict must follow from.
        lineage: becomes the version's tags.
        stage_runs: MLflow run id of every stage; a cached one belongs to an earlier pipeline run.
        inputs: outputs of earlier steps.
        out: gets result.json.

    Returns:
        result.json.

    Raises:
        KubealignError: the verdict is about another model or does not follow from its numbers, a file changed since it
            was written, or MLflow failed.
    """
    with _model_kept_on_failure(inputs.policy), stage_run("register", config.model_dump() | asdict(lineage)) as run:
        verdict, evaluation = check_verdict(inputs, gate, lineage)
        version = _version(run, config, lineage, stage_runs, inputs, verdict, evaluation)
        decided = _decide(run, config, version, verdict, lineage)
        run.client.set_model_version_tag(config.name, version, "kubealign.decided", decided["state"])
        aliases = sorted(run.client.get_model_version(config.name, version).aliases)
        result: Result = {
            "run_id": parent_run() or run.run_id,
            "model": config.name,
            "version": version,
            "model_uri": f"models:/{config.name}/{version}",
            "aliases": aliases,
            "promote": config.promote,
            "verdict": {
                "passed": verdict["passed"],
                "verdict": verdict["verdict"],
                "sentence": verdict["sentence"],
                "incumbent": verdict["incumbent"],
                "decision_index": verdict["decision_index"],
                "alpha_for_decision": verdict["alpha_for_decision"],
                "rules": verdict["rules"],
            },
            "decided": decided,
            "data_commit": lineage.data_commit,
            "preferences_digest": lineage.preferences_digest,
            "instructions_digest": lineage.instructions_digest,
            "data_clean": lineage.data_clean,
            "test_set": lineage.test_set,
            "git_commit": lineage.git_commit,
            "base_reference": lineage.base_reference,
            "base_digest": lineage.base_digest,
            "config": lineage.config,
            "lineage": lineage.lineage,
            "incumbent": lineage.incumbent,
            "decision": lineage.decision,
            "decision_index": lineage.decision_index,
            "metrics": {name: results["overall"] for name, results in evaluation["models"].items()},
            "languages": {name: results["languages"] for name, results in evaluation["models"].items()},
            "comparisons": evaluation["comparisons"],
            "policy_metrics": evaluation["models"]["policy"]["policy_metrics"],
            "stages": _stages(run.client, stage_runs),
        }
        write_json(out, result)
        _update_parent_run(run, result, stage_runs, inputs.report)
        run.log(f"{config.name} version {version}: {', '.join(aliases) or 'no alias'}; {decided['sentence']}")
        return result


def check_verdict(inputs: RegisterInputs, gate: GateConfig, lineage: Lineage) -> tuple[Verdict, Evaluation]:
    """The verdict and its evaluation, if they belong to this very policy and the verdict follows from the numbers.

    Raises:
        InputError: one of them is missing, damaged or from another version of kubealign.
        KubealignError: they do not belong together, or a file of the policy changed since it was written.
    """
    policy_digest = verify_manifest(inputs.policy)
    verdict = read_document(inputs.evaluation / "verdict.json", Verdict)
    evaluation = read_document(inputs.evaluation / "evaluation.json", Evaluation)
    for name, subject in (("verdict", verdict["policy_digest"]), ("evaluation", evaluation["policy_digest"])):
        if subject != policy_digest:
            raise KubealignError(
                f"the {name} is about policy {subject[:12]}, expected {policy_digest[:12]}; evaluate this policy"
            )
    context = GateContext(lineage.incumbent, lineage.decision_index, lineage.data_clean)
    recorded = dict(verdict)
    differing = sorted(key for key, value in apply_gate(evaluation, context, gate).items() if recorded[key] != value)
    if differing:
        raise KubealignError(
            f"{inputs.evaluation / 'verdict.json'}: {', '.join(differing)} do not follow from evaluation.json and"
            " this run's gate; evaluate the model again"
        )
    return verdict, evaluation


def _version(
    run: StageRun,
    config: RegisterConfig,
    lineage: Lineage,
    stage_runs: dict[str, str],
    inputs: RegisterInputs,
    verdict: Verdict,
    evaluation: Evaluation,
) -> str:
    """The version of these weights, registered if necessary, with the tags of this evaluation."""
    model_digest = package.content_digest(inputs.policy, config.format)
    tags = {f"kubealign.{key}": value for key, value in lineage.tags().items()} | {
        "kubealign.base_content": read_dpo_training(inputs.policy)["base_digest"],
        "kubealign.git_dirty": str(lineage.git_commit.endswith("-dirty")).lower(),
        "kubealign.model": model_digest,
        "kubealign.format": config.format,
        "kubealign.verdict": verdict["verdict"],
        "kubealign.passed": str(verdict["passed"]).lower(),
        "kubealign.verdict_digest": sha256_file(inputs.evaluation / "verdict.json"),
        "kubealign.environment": sha256_file(inputs.policy / package.ENVIRONMENT),
        **_kubeflow(),
    }
    version = package.find_version(run.client, config.name, "kubealign.model", model_digest)
    if version:
        # The same weights, evaluated again: the tags describe the latest evaluation, but keep the run that made them.
        run.log(f"these weights are already {config.name} version {version}")
        for key, value in tags.items():
            run.client.set_model_version_tag(config.name, version, key, value)
        return version
    base = ""
    if config.format == "adapter":
        base = package.register_base(run, config.name, inputs.base, tags["kubealign.base_content"])
        tags["kubealign.base_version"] = base
    validation = read_document(inputs.dataset / "validation.json", ValidationSummary)
    card = model_card(config.name, lineage.tags(), verdict, evaluation, validation)
    package_inputs = package.PackageInputs(inputs.policy, inputs.base, inputs.evaluation, _settings(stage_runs))
    tags["kubealign.run"] = parent_run() or run.run_id
    with package.staged(package_inputs, config.format, card, base) as artifacts:
        return package.log_version(
            run, config.name, artifacts, package.requirements(inputs.policy, config.format), tags
        )


def _decide(run: StageRun, config: RegisterConfig, version: str, verdict: Verdict, lineage: Lineage) -> Decision:
    """Record the decision, and promote the version if it passed against the current champion."""
    client, name = run.client, config.name
    client.set_registered_model_alias(name, CHALLENGER, version)
    audit = Audit.open(client, name)
    if not audit.claim_decision(lineage.test_set, lineage.decision_index, lineage.decision):
        return _superseded(f"another run has made decision {lineage.decision_index} on this test set in the meantime")
    client.set_registered_model_tag(name, f"kubealign.test_uses.{lineage.test_set}", str(lineage.decision_index))
    client.set_registered_model_tag(name, "kubealign.audit_run", audit.run_id)
    reconcile_alias(audit)
    veto = _promotion_veto(client, config, version, verdict)
    if veto:
        return veto
    try:
        promote(client, name, version, "gate", verdict["sentence"], lineage.incumbent.rpartition("/")[2], run.run_id)
    except ChampionChangedError as error:
        return _superseded(str(error))
    return {"state": "promoted", "sentence": f"promoted: {verdict['verdict']}"}


def _promotion_veto(client: Any, config: RegisterConfig, version: str, verdict: Verdict) -> Decision | None:
    """The decision against promotion, as far as it does not depend on concurrent runs; None if the version may be
    promoted.
    """
    if champion_alias(client, config.name) == version:
        return {"state": "already_champion", "sentence": "it is already the champion"}
    if not verdict["passed"]:
        return {"state": "gate_failed", "sentence": f"not promoted: {verdict['verdict']}"}
    if not config.promote:
        return {"state": "promotion_disabled", "sentence": "not promoted, because register.promote is off"}
    rolled_back = client.get_model_version(config.name, version).tags.get(ROLLED_BACK)
    if rolled_back:
        return {
            "state": "rolled_back",
            "sentence": f"not promoted: it was champion and was rolled back ({rolled_back}); `kubealign promote"
            f" {version} --force --reason …` overrides that",
        }
    return None


def _superseded(why: str) -> Decision:
    return {"state": "superseded", "sentence": f"not decided: {why}; run again, which repeats only the evaluation"}


class _model_kept_on_failure:  # noqa: N801 - reads as the context manager it is
    """Turn a final failure of MLflow (its client has retried with back-off by then) into an error that says where the
    model is kept and how to finish.
    """

    def __init__(self, policy: Path) -> None:
        self.policy = policy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and is_mlflow_failure(error):
            raise KubealignError(
                f"{explain_mlflow_error(error)}. Nothing is lost: the model is kept in {self.policy}, and its"
                " evaluation beside it; when MLflow answers again, the same `kubealign run` (on Kubeflow: a retry of"
                " this step, or the same submit) finishes the job, with every step before it from the cache"
            ) from error


def _kubeflow() -> dict[str, str]:
    run = os.environ.get(KFP_RUN_VARIABLE, "")
    address = os.environ.get(KFP_URL_VARIABLE, "")
    tags = {"kubealign.kfp_run": run} if run else {}
    if run and address:
        tags["kubealign.kfp_url"] = f"{address.rstrip('/')}/#/runs/details/{run}"
    return tags


def _settings(stage_runs: dict[str, str]) -> str:
    """All settings of the run, as resolve logged them."""
    import mlflow

    return str(mlflow.artifacts.load_text(f"runs:/{stage_runs['resolve']}/{SETTINGS}"))


def _stages(client: Any, stage_runs: dict[str, str]) -> dict[str, StageSummary]:
    stages: dict[str, StageSummary] = {}
    for stage, run_id in stage_runs.items():
        data = client.get_run(run_id).data
        stages[stage] = {
            "run_id": run_id,
            "cached": data.tags.get("mlflow.parentRunId", "") != parent_run(),
            "seconds": data.metrics.get("seconds"),
            "peak_memory_mib": data.metrics.get("peak_memory_mib"),
        }
    return stages


def _update_parent_run(run: StageRun, result: Result, stage_runs: dict[str, str], report: Path) -> None:
    """Log result and report to the parent run, and tag it with the original run of every cached stage."""
    parent = parent_run() or run.run_id
    run.client.log_dict(parent, result, "result.json")
    run.client.log_text(parent, report.read_text(encoding="utf-8"), "report.html")
    for stage, summary in result["stages"].items():
        if summary["cached"]:
            run.client.set_tag(parent, f"kubealign.cached.{stage}", stage_runs[stage])
    tags = {
        "version": result["model_uri"],
        "verdict": result["verdict"]["verdict"],
        "decided": result["decided"]["state"],
        "lineage": result["lineage"],
    }
    for key, value in tags.items():
        run.client.set_tag(parent, f"kubealign.{key}", value)
