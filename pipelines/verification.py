"""Verification of a registered version: its statement, files, verdict and logits; and its provenance, from which to
reproduce it.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from components.common.documents import JsonObject, parse_document, read_document
from components.common.errors import EvidenceError, InputError, KubealignError
from components.common.files import difference, sha256_file, write_text
from components.common.provenance import environment
from components.config.gate import GateConfig
from components.config.model import ExecutionConfig
from components.config.params import PARAMS
from components.gate.rejudge import judge_again
from components.gate.results import Evaluation
from components.gate.rules import GateContext
from components.gate.verdict import Verdict
from components.register.package import CODE, check_loader
from components.registry.audit import Audit
from components.registry.base import BaseReference
from components.registry.evidence import SCORES, CheckedVersion, check_version, forced
from components.training.documents import DpoTraining
from pipelines import git


@dataclass(frozen=True)
class VersionCheck:
    """The outcome of one check of a version."""

    name: str
    outcome: Literal["pass", "warn", "fail"]
    sentence: str


def accept(client: Any, name: str, version: str, scratch: Path) -> tuple[CheckedVersion, Verdict]:
    """A version as evidence: downloaded, its statement, files and place in the history checked, and judged again from
    the scores that the statement binds. Nothing of it is run.

    Args:
        client: MLflow client.
        name: the registered model.
        version: its version.
        scratch: gets the download.

    Raises:
        EvidenceError: something does not fit; the message says what.
    """
    import mlflow

    uri = f"models:/{name}/{version}"
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(scratch)))
    checked = check_version(client, name, version, folder)
    return checked, _judge_again(checked)


def _judge_again(checked: CheckedVersion) -> Verdict:
    where = f"{checked.name} version {checked.version}"
    stated = checked.evidence.judgement
    evaluation = read_document(checked.folder / SCORES, Evaluation)
    context = GateContext(stated["incumbent"]["version"], stated["decision_index"], bool(stated["data"]["clean"]))
    verdict = judge_again(evaluation, context, GateConfig.model_validate(stated["gate"]), f"{where}: {SCORES}")
    if (verdict["verdict"], verdict["passed"]) != (stated["verdict"], stated["passed"]):
        raise EvidenceError(
            f"{where}: its scores and rules give {verdict['verdict']!r}, its statement says {stated['verdict']!r}"
        )
    return verdict


def verify(client: Any, name: str, version: Any) -> list[VersionCheck]:
    """Check a version against the statement that was signed when it was registered.

    Args:
        client: MLflow client.
        name: the registered model.
        version: MLflow's `ModelVersion`.
    """
    checks = [_check_run(client, version)]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            checked, verdict = accept(client, name, str(version.version), Path(scratch))
            check_loader(checked.folder / "MLmodel", f"{name} version {version.version}")
        except KubealignError as error:
            return [*checks, VersionCheck("evidence", "fail", str(error))]
        sizes = [path.stat().st_size for path in checked.folder.rglob("*") if path.is_file()]
        signer = checked.evidence.judgement["signed_by"][:12]
        sentence = f"signed by {signer}; {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB, are those of the statement"
        checks.append(VersionCheck("evidence", "pass", sentence))
        checks.append(_check_code(checked.folder))
        checks.append(_check_verdict(client, checked, verdict))
        checks.append(_check_logps(checked.folder / "artifacts"))
    return checks


def _check_run(client: Any, version: Any) -> VersionCheck:
    from mlflow.exceptions import MlflowException

    if not version.run_id:
        return VersionCheck("run", "warn", "no run made it")
    try:
        stage = client.get_run(version.run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return VersionCheck("run", "warn", f"the run {version.run_id} that made it no longer exists")
    if stage != "active":
        return VersionCheck(
            "run",
            "warn",
            f"the run {version.run_id} is marked deleted: `mlflow gc` would delete the model with it; `mlflow runs"
            f" restore --run-id {version.run_id}` restores it",
        )
    return VersionCheck("run", "pass", f"run {version.run_id} exists")


def _check_code(folder: Path) -> VersionCheck:
    if sha256_file(folder / CODE.name) == sha256_file(CODE):
        return VersionCheck("code", "pass", f"{CODE.name} is that of this kubealign")
    return VersionCheck("code", "warn", f"{CODE.name} is that of another kubealign, signed like the rest")


def _check_verdict(client: Any, checked: CheckedVersion, verdict: Verdict) -> VersionCheck:
    """The verdict, judged again, and how the version became champion if that was by force."""
    audit = Audit.find(client, checked.name)
    champions = audit.champions() if audit else []
    last = champions[-1] if champions else None
    sentence = f"judged again from its scores: {verdict['sentence']}"
    by_force = forced(champions, checked.evidence.digest)
    if by_force:
        why = f"promoted by force, at {by_force.at} by {by_force.by}: {by_force.reason}"
        return VersionCheck("verdict", "warn", f"{why}; {sentence}")
    if last and last.version == checked.version and not verdict["passed"] and not checked.copied_from:
        return VersionCheck("verdict", "fail", f"it is champion without having passed; {sentence}")
    return VersionCheck("verdict", "pass", sentence)


def _check_logps(artifacts: Path) -> VersionCheck:
    from components.engine.export import EXPORT_TOLERANCE, Fingerprint, logp_error
    from components.engine.models import plain_logps

    stored = read_document(artifacts / "fingerprint.json", Fingerprint)
    found = plain_logps(_load(artifacts), stored["prompt"], stored["completion"]).tolist()
    error, tolerance = logp_error(stored["logps"], found, stored["precision"]), EXPORT_TOLERANCE[stored["precision"]]
    outcome: Literal["pass", "fail"] = "pass" if error <= tolerance else "fail"
    return VersionCheck(
        "log-probs",
        outcome,
        f"loaded; they differ by {error:.1e} nats a token from those of the policy that was trained; at most"
        f" {tolerance:g} is expected",
    )


def _load(artifacts: Path) -> Any:
    """The model of a version, by transformers and peft alone; the version's own code is not run."""
    from peft import PeftModel

    from components.engine.export import load_plain

    merged = (artifacts / "model").is_dir()
    recorded = None if merged else read_document(artifacts / "base.json", BaseReference)
    model: Any = load_plain(_base(recorded) if recorded else artifacts / "model")
    if not recorded:
        return model
    if recorded.get("precision") == "bf16":
        model = model.bfloat16().float()  # as the adapter was trained on it
    return PeftModel.from_pretrained(model, artifacts / "adapter", local_files_only=True).eval()


def _base(recorded: BaseReference) -> Path:
    """The base model of an adapter, its files checked; KUBEALIGN_BASE may name a folder that holds it."""
    import mlflow

    named = os.environ.get("KUBEALIGN_BASE")
    folder = Path(named or mlflow.artifacts.download_artifacts(artifact_uri=recorded["reference"]))
    actual = {name: sha256_file(folder / name) for name in recorded["files"] if (folder / name).is_file()}
    if mismatch := difference(recorded["files"], actual):
        raise EvidenceError(f"{recorded['reference']} in {folder}: {mismatch}: not the base model of the adapter")
    return folder


def reproduce(version: Any, project: Path, out: Path | None) -> Iterator[str]:
    """Check out a version's code, and yield its provenance and how to reproduce it, line by line.

    Args:
        version: MLflow's `ModelVersion`.
        project: this project's folder, whose git history holds the commit.
        out: folder for the checkout; None for the lines alone.

    Raises:
        InputError: `out` is not empty, or the commit is not in the project's history.
        KubealignError: kubealign did not register the version.
    """
    import mlflow

    tags = {key.removeprefix("kubealign."): value for key, value in version.tags.items()}
    if "lineage" not in tags:
        raise KubealignError(
            f"{version.name} version {version.version} has no lineage tag: kubealign did not register it"
        )
    commit = tags["git_commit"].removesuffix("-dirty")
    yield f"code      commit {commit}"
    digests = f"preferences {tags['preferences_digest']}, instructions {tags['instructions_digest']}"
    yield f"data      {tags['data_commit']}: {digests}"
    yield f"base      {tags['base_reference']}, digest {tags['base_digest']}"
    yield f"lineage   {tags['lineage']}; a run with the same lineage reproduces this version"
    if tags["git_dirty"] == "true":
        yield "warning   the code had uncommitted changes; the run will have another lineage"
    if tags["data_clean"] != "true":
        yield "warning   the data did not match any commit; compare the digests above"
    with tempfile.TemporaryDirectory() as scratch:
        source = f"models:/{version.name}/{version.version}/artifacts"
        recorded, settings, training = (
            Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{source}/{name}", dst_path=scratch)).read_text(
                "utf-8"
            )
            for name in ("environment.txt", "settings.yaml", "training.json")
        )
        yield from _packages(recorded)
        facts = parse_document(training, DpoTraining, f"{source}/training.json", unknown="ignore")
        yield from _hardware(yaml.safe_load(settings)["model"], facts["precision"])
        if out is None:
            yield "to check it out, add --out FOLDER"
            return
        _check_out(project, commit, out)
        _write_params(out, yaml.safe_load(settings), project, tags["data_commit"])
        write_text(out / "environment.txt", recorded)
    yield f"checked out to {out}, with that run's settings in {PARAMS} and its packages in environment.txt; next:"
    yield f"  cd {out} && make data && .venv/bin/kubealign run"


def _packages(recorded: str) -> Iterator[str]:
    then, now = (dict(line.split("==") for line in text.split()) for text in (recorded, environment()))
    differing = [f"{name} {then[name]} (here {now.get(name, 'none')})" for name in then if now.get(name) != then[name]]
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    comparison = f"different here: {', '.join(differing[:8])}{more}" if differing else "same as here"
    yield f"packages  {len(then)}, {comparison}"


def _hardware(model: dict[str, Any], precision: str) -> Iterator[str]:
    """The hardware and precision that a version was trained with, and a warning if this machine's differ."""
    from components.engine.hardware import hardware

    settings = {"precision": precision, "hardware": model.get("hardware", "auto")}
    trained = ExecutionConfig.model_validate(settings).resolved(hardware())
    here = ExecutionConfig.model_validate({"precision": precision}).resolved(hardware())
    yield f"hardware  {trained.hardware}, in {trained.precision}"
    if trained.hardware != here.hardware:
        yield (
            f"warning   this machine is {here.hardware}, where these settings would give other weights, so a run here"
            f" rejects them; a run with --set model.hardware={here.hardware} has another lineage"
        )


def _check_out(project: Path, commit: str, out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; name a new folder")
    repo = git.top_folder(project)
    sha = git.find_commit(repo, commit)
    git.run(repo, "clone", "--quiet", "--no-checkout", "--", str(repo), str(out.resolve()))
    git.run(out, "reset", "--quiet", "--hard", sha)


def _write_params(out: Path, settings: JsonObject, project: Path, data_commit: str) -> None:
    """Write the run's settings to the checkout's params.yaml; if the project held the data, the checkout does now."""
    path = out / PARAMS
    raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if Path(settings["data"]["repo"]) == project:
        settings["data"]["repo"] = "."
    if data_commit != "workspace":
        settings["data"]["revision"] = data_commit
    text = yaml.safe_dump(raw | settings, sort_keys=False, allow_unicode=True)
    write_text(path, f"# The settings of the run to reproduce.\n{text}")
