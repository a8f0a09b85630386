"""Put the judged model into the MLflow registry with its lineage, and decide by the verdict whether it is champion.

Never cached; run again it finds the version that it made before, and completes what was interrupted.
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
from components.tracking.run import KFP_RUN_VARIABLE, SETTINGS, StageRun, parent_run, stage_run
from components.training.documents import read_dpo_training

KFP_URL_VARIABLE = "KUBEALIGN_KFP_URL"
"""Environment variable with the address of the Kubeflow UI, from cluster.ui_url."""


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from; every field becomes a tag of its version."""

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
        """As text: true and false in lower case, numbers as digits."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


@dataclass(frozen=True)
class Judged:
    """Folders of earlier steps: the aligned model, its base model, its evaluation, the clean data; and the report."""

    policy: Path
    base: Path
    evaluation: Path
    dataset: Path
    report: Path


def run_register(
    config: RegisterConfig, gate: GateConfig, lineage: Lineage, stage_runs: dict[str, str], judged: Judged, out: Path
) -> Result:
    """Register a model.

    Args:
        config: the registered model's name and format, and whether a passed gate promotes.
        gate: the rules that the verdict must follow from.
        lineage: for the version's tags.
        stage_runs: MLflow run of every stage; a cached one belongs to an earlier pipeline run.
        judged: the model and everything about it.
        out: JSON file that gets the result.

    Returns:
        result.json.

    Raises:
        KubealignError: the verdict is about another model or does not follow from its numbers, a file changed since it
            was written, or MLflow does not do its part.
    """
    with _kept(judged.policy), stage_run("register", config.model_dump() | asdict(lineage)) as run:
        verdict, evaluation = check_verdict(judged, gate, lineage)
        version = _version(run, config, lineage, stage_runs, judged, verdict, evaluation)
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
        _update_parent_run(run, result, stage_runs, judged.report)
        run.log(f"{config.name} version {version}: {', '.join(aliases) or 'no alias'}; {decided['sentence']}")
        return result


def check_verdict(judged: Judged, gate: GateConfig, lineage: Lineage) -> tuple[Verdict, Evaluation]:
    """The verdict and its evaluation, if they belong to this very policy and the verdict follows from the numbers.

    Raises:
        InputError: one of them is missing, damaged or of another version of kubealign.
        KubealignError: they do not belong together, or a file of the policy changed since it was written.
    """
    policy_digest = verify_manifest(judged.policy)
    verdict = read_document(judged.evaluation / "verdict.json", Verdict)
    evaluation = read_document(judged.evaluation / "evaluation.json", Evaluation)
    for name, about in (("verdict", verdict["policy_digest"]), ("evaluation", evaluation["policy_digest"])):
        if about != policy_digest:
            raise KubealignError(f"the {name} is about policy {about[:12]}, this is {policy_digest[:12]}; evaluate it")
    context = GateContext(lineage.incumbent, lineage.decision_index, lineage.data_clean)
    written = dict(verdict)
    differing = sorted(key for key, value in apply_gate(evaluation, context, gate).items() if written[key] != value)
    if differing:
        raise KubealignError(
            f"{judged.evaluation / 'verdict.json'}: {', '.join(differing)} do not follow from evaluation.json and the"
            " gate of this run; evaluate the model again"
        )
    return verdict, evaluation


def _version(
    run: StageRun,
    config: RegisterConfig,
    lineage: Lineage,
    stage_runs: dict[str, str],
    judged: Judged,
    verdict: Verdict,
    evaluation: Evaluation,
) -> str:
    """The version of these weights, made if need be, with the tags of this judgement."""
    model_digest = package.content_digest(judged.policy, config.format)
    tags = {f"kubealign.{key}": value for key, value in lineage.tags().items()} | {
        "kubealign.base_content": read_dpo_training(judged.policy)["base_digest"],
        "kubealign.git_dirty": str(lineage.git_commit.endswith("-dirty")).lower(),
        "kubealign.model": model_digest,
        "kubealign.format": config.format,
        "kubealign.verdict": verdict["verdict"],
        "kubealign.passed": str(verdict["passed"]).lower(),
        "kubealign.verdict_digest": sha256_file(judged.evaluation / "verdict.json"),
        "kubealign.environment": sha256_file(judged.policy / package.ENVIRONMENT),
        **_kubeflow(),
    }
    version = package.find_version(run.client, config.name, "kubealign.model", model_digest)
    if version:
        # The same weights, judged anew: the tags tell of the newest judgement, and still which run made them.
        run.log(f"these weights are {config.name} version {version} already")
        for key, value in tags.items():
            run.client.set_model_version_tag(config.name, version, key, value)
        return version
    base = ""
    if config.format == "adapter":
        base = package.register_base(run, config.name, judged.base, tags["kubealign.base_content"])
        tags["kubealign.base_version"] = base
    validation = read_document(judged.dataset / "validation.json", ValidationSummary)
    card = model_card(config.name, lineage.tags(), verdict, evaluation, validation)
    sources = package.Sources(judged.policy, judged.base, judged.evaluation, _settings(stage_runs))
    tags["kubealign.run"] = parent_run() or run.run_id
    with package.staged(sources, config.format, card, base) as artifacts:
        return package.log_version(
            run, config.name, artifacts, package.requirements(judged.policy, config.format), tags
        )


def _decide(run: StageRun, config: RegisterConfig, version: str, verdict: Verdict, lineage: Lineage) -> Decision:
    """Count the decision, and make the version champion if it passed against the champion that there is now."""
    client, name = run.client, config.name
    client.set_registered_model_alias(name, CHALLENGER, version)
    audit = Audit.open(client, name)
    if not audit.claim_decision(lineage.test_set, lineage.decision_index, lineage.decision):
        return _superseded(f"another run made decision {lineage.decision_index} on this test set meanwhile")
    client.set_registered_model_tag(name, f"kubealign.test_uses.{lineage.test_set}", str(lineage.decision_index))
    client.set_registered_model_tag(name, "kubealign.audit_run", audit.run_id)
    reconcile_alias(audit)
    against = _against_promotion(client, config, version, verdict)
    if against:
        return against
    try:
        promote(client, name, version, "gate", verdict["sentence"], lineage.incumbent.rpartition("/")[2], run.run_id)
    except ChampionChangedError as error:
        return _superseded(str(error))
    return {"state": "promoted", "sentence": f"promoted: {verdict['verdict']}"}


def _against_promotion(client: Any, config: RegisterConfig, version: str, verdict: Verdict) -> Decision | None:
    """Why the version does not become champion, as far as that does not depend on others; None when it may."""
    if champion_alias(client, config.name) == version:
        return {"state": "already_champion", "sentence": "it is the champion already"}
    if not verdict["passed"]:
        return {"state": "gate_failed", "sentence": f"not promoted: {verdict['verdict']}"}
    if not config.promote:
        return {"state": "promotion_disabled", "sentence": "not promoted, as register.promote is off"}
    rolled_back = client.get_model_version(config.name, version).tags.get(ROLLED_BACK)
    if rolled_back:
        return {
            "state": "rolled_back",
            "sentence": f"not promoted: it was champion and was rolled back ({rolled_back}); `kubealign promote"
            f" {version} --force --reason …` overrules that",
        }
    return None


def _superseded(why: str) -> Decision:
    return {"state": "superseded", "sentence": f"not decided: {why}; run again, only the evaluation is repeated"}


class _kept:  # noqa: N801 - reads as the context manager it is
    """When MLflow fails for good (its client has retried with back-off by then): say that nothing is lost, and what
    finishes the job.
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
    """All settings of the run, which resolve wrote down."""
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
    """Let the parent run carry result and report, and name the original run of every cached stage."""
    parent = parent_run() or run.run_id
    run.client.log_dict(parent, result, "result.json")
    run.client.log_text(parent, report.read_text(encoding="utf-8"), "report.html")
    for stage, found in result["stages"].items():
        if found["cached"]:
            run.client.set_tag(parent, f"kubealign.cached.{stage}", stage_runs[stage])
    tags = {
        "version": result["model_uri"],
        "verdict": result["verdict"]["verdict"],
        "decided": result["decided"]["state"],
        "lineage": result["lineage"],
    }
    for key, value in tags.items():
        run.client.set_tag(parent, f"kubealign.{key}", value)
