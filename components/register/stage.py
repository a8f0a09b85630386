"""Register the evaluated model in MLflow with its lineage, and promote it to champion if the verdict allows.

Never cached. A rerun finds the version that an earlier run registered, and completes what was interrupted.
"""

import hashlib
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from components.common.documents import read_document
from components.common.errors import ChampionChangedError, EvidenceError, KubealignError
from components.common.files import sha256_file, verify_manifest, write_json
from components.config.gate import GateConfig
from components.dataset.validation import ValidationSummary
from components.gate.rejudge import judge_again
from components.gate.results import SEAL, Evaluation
from components.gate.rules import GateContext
from components.gate.rules_of_model import check_rules, rules_of
from components.gate.verdict import Verdict
from components.register import package
from components.register.card import model_card
from components.register.config import RegisterConfig
from components.register.result import Decision, Result, StageSummary
from components.registry.audit import CHALLENGER, Audit
from components.registry.champion import current_champion, promote, reconcile_alias
from components.registry.evidence import (
    RESULT_SIGNATURE,
    Judgement,
    check_files,
    check_history,
    read_statement,
    result_statement,
    rolled_back,
)
from components.tracking.errors import explain_mlflow_error, is_mlflow_failure
from components.tracking.keys import check_own_key, is_sealed, key_id, signing_key
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
    project_commit: str
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
        check_own_key()
        verdict, evaluation = check_verdict(inputs, gate, lineage)
        audit = _history(run, config.name, gate, lineage, evaluation)
        version, statement = _version(run, config, audit, lineage, stage_runs, inputs, verdict, evaluation)
        decided = _decide(run, config, audit, version, statement, verdict, lineage)
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
            "project_commit": lineage.project_commit,
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
        _update_parent_run(run, result, out, stage_runs, inputs.report)
        run.log(f"{config.name} version {version}: {', '.join(aliases) or 'no alias'}; {decided['sentence']}")
        return result


def check_verdict(inputs: RegisterInputs, gate: GateConfig, lineage: Lineage) -> tuple[Verdict, Evaluation]:
    """The verdict and its evaluation, if our evaluate made them of these very inputs and the verdict follows from the
    scores of the pairs.

    Raises:
        InputError: one of them is missing, damaged or from another version of kubealign.
        EvidenceError: they do not belong together, or the numbers do not follow.
        KubealignError: a file of the policy changed since it was written.
    """
    policy_digest = verify_manifest(inputs.policy)
    path = inputs.evaluation / "evaluation.json"
    verdict = read_document(inputs.evaluation / "verdict.json", Verdict)
    evaluation = read_document(path, Evaluation)
    seal = inputs.evaluation / SEAL
    if not seal.is_file() or not is_sealed(SEAL, path.read_bytes(), seal.read_text(encoding="utf-8")):
        raise EvidenceError(
            f"{path}: no step of this pipeline sealed it (or {SEAL} is another key's): it is not known who wrote it;"
            " evaluate again"
        )
    for name, subject in (("verdict", verdict["policy_digest"]), ("evaluation", evaluation["policy_digest"])):
        if subject != policy_digest:
            raise EvidenceError(
                f"the {name} is about policy {subject[:12]}, expected {policy_digest[:12]}; evaluate this policy"
            )
    _check_inputs(evaluation, inputs, lineage, str(path))
    context = GateContext(lineage.incumbent, lineage.decision_index, lineage.data_clean)
    expected = judge_again(evaluation, context, gate, str(path))
    recorded = dict(verdict)
    differing = sorted(key for key, value in expected.items() if recorded[key] != value)
    if differing:
        raise EvidenceError(
            f"{inputs.evaluation / 'verdict.json'}: {', '.join(differing)} do not follow from evaluation.json and"
            " this run's gate; evaluate the model again"
        )
    return verdict, evaluation


def _check_inputs(evaluation: Evaluation, inputs: RegisterInputs, lineage: Lineage, where: str) -> None:
    """Check that the evaluation is about this run's data, base model and test set."""
    found = dict(evaluation["judged"])
    pairs = inputs.dataset / "preferences"
    expected = {
        "test_set": lineage.test_set,
        "test_sha256": sha256_file(pairs / "test.jsonl"),
        "validation_sha256": sha256_file(pairs / "validation.jsonl"),
        "base": verify_manifest(inputs.base),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise EvidenceError(
                f"{where}: judged with {name} {str(found[name])[:12]!r}, expected {value[:12]!r}; evaluate again"
            )


def _history(run: StageRun, name: str, gate: GateConfig, lineage: Lineage, evaluation: Evaluation) -> Audit:
    """The registered model's history, if this run's rules are as strict as it demands and its incumbent is in there.

    Raises:
        InputError: a rule is looser than the registered model's.
        EvidenceError: the history is damaged, or the incumbent was never champion with these files.
    """
    answers = evaluation["models"]["policy"]["generation"] is not None
    audit = Audit.open(run.client, name, rules_of(gate, answers))
    check_history(run.client, audit)
    rules = audit.rules()
    assert rules, "the history is open"
    check_rules(rules, gate, answers, name)
    version, statement = lineage.incumbent.rpartition("/")[2], evaluation["judged"]["incumbent_statement"]
    if version and not any((r.version, r.statement) == (version, statement) for r in audit.champions()):
        raise EvidenceError(
            f"the policy was compared with statement {statement[:12] or 'none'} of {lineage.incumbent}, which was never"
            " champion; evaluate again"
        )
    return audit


def _version(
    run: StageRun,
    config: RegisterConfig,
    audit: Audit,
    lineage: Lineage,
    stage_runs: dict[str, str],
    inputs: RegisterInputs,
    verdict: Verdict,
    evaluation: Evaluation,
) -> tuple[str, str]:
    """The version of these weights and this decision, registered if necessary; and the sha256 of its statement.

    The same weights under another decision are another version: a version has one statement.
    """
    model_digest = package.content_digest(inputs.policy, config.format)
    found = _registered(run, config.name, model_digest, lineage)
    if found:
        run.log(f"this decision on these weights is already {config.name} version {found[0]}")
        return found
    tags = {f"kubealign.{key}": value for key, value in lineage.tags().items()} | {
        "kubealign.base_content": read_dpo_training(inputs.policy)["base_digest"],
        "kubealign.git_dirty": str(lineage.git_commit.endswith("-dirty")).lower(),
        "kubealign.model": model_digest,
        "kubealign.format": config.format,
        "kubealign.verdict": verdict["verdict"],
        "kubealign.passed": str(verdict["passed"]).lower(),
        "kubealign.verdict_digest": sha256_file(inputs.evaluation / "verdict.json"),
        "kubealign.environment": sha256_file(inputs.policy / package.ENVIRONMENT),
        "kubealign.run": parent_run() or run.run_id,
        **_kubeflow(),
    }
    base = ""
    if config.format == "adapter":
        base = package.register_base(run, config.name, inputs.base, tags["kubealign.base_content"])
        tags["kubealign.base_version"] = base
    validation = read_document(inputs.dataset / "validation.json", ValidationSummary)
    card = model_card(config.name, lineage.tags(), verdict, evaluation, validation, read_dpo_training(inputs.policy))
    package_inputs = package.PackageInputs(inputs.policy, inputs.base, inputs.evaluation, _settings(stage_runs))
    judgement = _judgement(config.name, audit, lineage, model_digest, verdict, evaluation)
    with package.staged(package_inputs, config.format, card, base) as artifacts:
        required = package.requirements(inputs.policy, config.format)
        return package.log_version(run, config.name, artifacts, required, tags, judgement)


def _registered(run: StageRun, name: str, model_digest: str, lineage: Lineage) -> tuple[str, str] | None:
    """A version that an earlier attempt of this decision made, and the sha256 of its statement.

    Only what we signed counts, with every file as it was: anyone may have written the tag that finds it.
    """
    import mlflow

    for version in package.find_versions(run.client, name, "kubealign.model", model_digest):
        where = f"{name} version {version}"
        with tempfile.TemporaryDirectory() as scratch:
            uri = f"models:/{name}/{version}"
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
            try:
                evidence = read_statement(folder, where)
                check_files(folder, evidence, where)
            except EvidenceError as error:
                run.log(f"passed over: {error}")
                continue
        made = evidence.judgement
        wanted = (name, model_digest, lineage.decision, lineage.decision_index, lineage.test_set)
        if (made["model"], made["content"], made["decision"], made["decision_index"], made["test"]["set"]) == wanted:
            return version, evidence.digest
    return None


def _judgement(
    name: str, audit: Audit, lineage: Lineage, model_digest: str, verdict: Verdict, evaluation: Evaluation
) -> Judgement:
    """What the version's statement says."""
    judged, last = evaluation["judged"], audit.entries()[-1]
    return {
        "model": name,
        "content": model_digest,
        "data": {
            "commit": lineage.data_commit,
            "preferences": lineage.preferences_digest,
            "instructions": lineage.instructions_digest,
            "clean": lineage.data_clean,
            "validation_sha256": judged["validation_sha256"],
        },
        "test": {
            "set": lineage.test_set,
            "sha256": judged["test_sha256"],
            "pairs": evaluation["pairs"]["test"],
        },
        "base": {"reference": lineage.base_reference, "digest": lineage.base_digest, "files": judged["base"]},
        "incumbent": {"version": lineage.incumbent, "statement": judged["incumbent_statement"]},
        "code": {"commit": lineage.git_commit, "evaluate": judged["code"]},
        "lineage": lineage.lineage,
        "config": lineage.config,
        "gate": dict(verdict["gate"]),
        "verdict": verdict["verdict"],
        "passed": verdict["passed"],
        "decision": lineage.decision,
        "decision_index": lineage.decision_index,
        "signed_by": key_id(signing_key().public_key()),
        "previous": {"audit_run": audit.run_id, "number": last.number, "sha256": last.digest},
    }


def _decide(
    run: StageRun,
    config: RegisterConfig,
    audit: Audit,
    version: str,
    statement: str,
    verdict: Verdict,
    lineage: Lineage,
) -> Decision:
    """Record the decision, and promote the version if it passed against the current champion."""
    client, name, index = run.client, config.name, lineage.decision_index
    client.set_registered_model_alias(name, CHALLENGER, version)
    if not audit.claim_decision(lineage.test_set, index, lineage.decision, version, statement):
        return _superseded(f"another run has made decision {index} on this test set in the meantime")
    client.set_registered_model_tag(name, f"kubealign.test_uses.{lineage.test_set}", str(index))
    client.set_registered_model_tag(name, "kubealign.audit_run", audit.run_id)
    reconcile_alias(audit)
    veto = _promotion_veto(audit, config, version, statement, verdict)
    if veto:
        return veto
    incumbent = lineage.incumbent.rpartition("/")[2]
    try:
        promote(client, name, version, "gate", verdict["sentence"], incumbent, run.run_id, statement)
    except ChampionChangedError as error:
        return _superseded(str(error))
    return {"state": "promoted", "sentence": f"promoted: {verdict['verdict']}"}


def _promotion_veto(
    audit: Audit, config: RegisterConfig, version: str, statement: str, verdict: Verdict
) -> Decision | None:
    """The decision against promotion, as far as it does not depend on concurrent runs; None if the version may be
    promoted.
    """
    champion = current_champion(audit)
    if champion and champion.version == version:
        return {"state": "already_champion", "sentence": "it is already the champion"}
    if not verdict["passed"]:
        return {"state": "gate_failed", "sentence": f"not promoted: {verdict['verdict']}"}
    if not config.promote:
        return {"state": "promotion_disabled", "sentence": "not promoted, because register.promote is off"}
    removed = rolled_back(audit.champions(), statement)
    if removed:
        return {
            "state": "rolled_back",
            "sentence": f"not promoted: it was champion and was rolled back ({removed.at} {removed.reason});"
            f" `kubealign promote {version} --force --reason …` overrides that",
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


def _update_parent_run(
    run: StageRun, result: Result, result_file: Path, stage_runs: dict[str, str], report: Path
) -> None:
    """Log result and report, signed, to the parent run, and tag it with the original run of every cached stage."""
    parent = parent_run() or run.run_id
    files = {}
    for path, name in ((result_file, "result.json"), (report, "report.html")):
        text = path.read_text(encoding="utf-8")
        run.client.log_text(parent, text, name)
        files[name] = hashlib.sha256(text.encode()).hexdigest()
    run.client.log_text(parent, result_statement(parent, files).decode(), RESULT_SIGNATURE)
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
