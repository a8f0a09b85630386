"""The statement of a version: what was judged, by which rules, with which outcome; signed by whoever registered it.

Whoever acts on a version (evaluate with an incumbent, promote, rollback, verify, CI) calls `check_version` on its
downloaded folder and runs nothing of it before. A version is accepted if a trusted key signed its statement, every file
has the hash that the statement names and no other file is there, and the history of its registered model has an entry
that rests on this statement. Tags and aliases are not read.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from components.common.documents import parse_document
from components.common.errors import EvidenceError
from components.common.files import difference, sha256_file
from components.registry.audit import Audit, ChampionRecord
from components.registry.signing import STATEMENT_TYPE, canonical, opened, signed, statement
from components.tracking.keys import signing_key

STATEMENT = "statement.json"
MODEL_SIGNATURE = "model.sig"
JUDGEMENT = "urn:kubealign:judgement:1"
"""Type of the statement's predicate."""
SCORES = "artifacts/evaluation.json"
MLFLOWS_OWN = "registered_model_meta"
"""A note that MLflow adds to a download; nobody reads it."""
NEWEST = 20
"""Versions that are asked for a statement, the newest first, to see that the history was not shortened."""


class TestSide(TypedDict):
    """The test side of the data."""

    set: str
    """md5 of its pairs, by which decisions are counted."""
    sha256: str
    """Of the pairs that were left after validation."""
    pairs: int


class Incumbent(TypedDict):
    """What the model was compared with."""

    version: str
    """models:/name/version; empty for the SFT model."""
    statement: str
    """sha256 of its statement.json, which names all its files."""


class Previous(TypedDict):
    """The last entry of the history when the statement was made."""

    audit_run: str
    number: int
    sha256: str


class Judgement(TypedDict):
    """The predicate: everything the verdict rests on."""

    model: str
    """The registered model."""
    content: str
    """Digest of the weights, their format and the code that runs them."""
    data: dict[str, str | bool]
    """Commit and digests of the data set."""
    test: TestSide
    base: dict[str, str]
    """Reference, digest, and content of the base model."""
    incumbent: Incumbent
    code: dict[str, str]
    """Commit of the code, and digests of what judged."""
    lineage: str
    config: str
    gate: dict[str, Any]
    """The rules that were applied."""
    verdict: str
    passed: bool
    decision: str
    decision_index: int
    signed_by: str
    """Id of the key."""
    previous: Previous


@dataclass(frozen=True)
class Evidence:
    """A version's statement, its signature verified."""

    judgement: Judgement
    files: dict[str, str]
    """sha256 of every file of the version but the statement."""
    digest: str
    """sha256 of statement.json."""


@dataclass(frozen=True)
class CheckedVersion:
    """An accepted version, with its downloaded files."""

    name: str
    version: str
    folder: Path
    evidence: Evidence
    copied_from: str
    """The registered model that it was judged under, if it is a copy; empty if that is this one."""


def read_statement(folder: Path, where: str) -> Evidence:
    """The statement in a folder.

    Raises:
        EvidenceError: none is there, or a trusted key did not sign it.
    """
    path = folder / STATEMENT
    if not path.is_file() or path.is_symlink():
        raise EvidenceError(
            f"{where}: no {STATEMENT}, so nothing proves what it is; only what `kubealign run` registers has one"
        )
    document = opened(path.read_bytes(), f"{where}: {STATEMENT}")
    if (document.get("_type"), document.get("predicateType")) != (STATEMENT_TYPE, JUDGEMENT):
        raise EvidenceError(f"{where}: {STATEMENT} states something else ({str(document.get('predicateType'))[:60]!r})")
    judgement = parse_document(canonical(document["predicate"]), Judgement, f"{where}: {STATEMENT}", "ignore")
    files = {str(file["name"]): str(file["digest"]["sha256"]) for file in document["subject"]}
    return Evidence(judgement, files, sha256_file(path))


def check_files(folder: Path, evidence: Evidence, where: str) -> None:
    """Check that a folder holds the files of a statement, unchanged, and no others.

    Compiled Python is removed first: whoever loads a model from a folder leaves it, and nothing says what is in it.

    Raises:
        EvidenceError: a file is missing, changed, or not named.
    """
    for compiled in folder.rglob("__pycache__"):
        shutil.rmtree(compiled, ignore_errors=True)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    links = sorted(name for name, path in found.items() if path.is_symlink())
    if links:
        raise EvidenceError(f"{where}: {links[0]} is a link: not what was registered")
    actual = {name: sha256_file(path) for name, path in found.items() if name not in (STATEMENT, MLFLOWS_OWN)}
    if mismatch := difference(evidence.files, actual):
        raise EvidenceError(f"{where}: {mismatch}: not what was registered")


def check_version(client: Any, name: str, version: str, folder: Path) -> CheckedVersion:
    """Check a downloaded version: statement, files, and its place in the history of its registered model.

    Raises:
        EvidenceError: it proves nothing; the message says what is wrong.
    """
    where = f"{name} version {version}"
    evidence = read_statement(folder, where)
    check_files(folder, evidence, where)
    audit = Audit.find(client, name)
    assert audit, "there is a version"
    return CheckedVersion(name, version, folder, evidence, _place(audit, evidence, where))


def _place(audit: Audit, evidence: Evidence, where: str) -> str:
    """The registered model that a copy was judged under; empty if that is this one.

    Raises:
        EvidenceError: the history does not know the statement.
    """
    judgement, chain = evidence.judgement, audit.entries()
    if judgement["model"] != audit.name:
        # Only `promote --to` makes a version with another model's statement champion, whatever its reason was.
        if any(record.statement == evidence.digest for record in audit.champions()):
            return judgement["model"]
        raise EvidenceError(f"{where}: its statement is about the registered model {judgement['model']}, not this one")
    previous = judgement["previous"]
    at = previous["number"]
    if previous["audit_run"] != audit.run_id or not 0 < at <= len(chain) or chain[at - 1].digest != previous["sha256"]:
        raise EvidenceError(
            f"{where}: its statement follows entry.{at} of audit run {previous['audit_run']}, which the history of"
            f" {audit.name} (audit run {audit.run_id}, {len(chain)} entries) does not have: one of them is not whole"
        )
    made = (judgement["test"]["set"], judgement["decision_index"], judgement["decision"], evidence.digest)
    if not any((d.test_set, d.index, d.decision, d.statement) == made for d in audit.decided()):
        raise EvidenceError(
            f"{where}: no decision in the history rests on its statement: it was superseded, or never decided; run the"
            " pipeline again"
        )
    return ""


def check_history(client: Any, audit: Audit) -> None:
    """Check that the history reaches as far as the newest statement of a version that followed it.

    Raises:
        EvidenceError: it is shorter, or another one.
    """
    chain = audit.entries()
    after = int(chain[0].facts["after"]) if chain else 0
    versions = sorted((int(v.version) for v in client.search_model_versions(f"name = '{audit.name}'")), reverse=True)
    for version in [number for number in versions if number > after][:NEWEST]:
        where = f"{audit.name} version {version}"
        with tempfile.TemporaryDirectory() as scratch:
            try:
                judgement = fetch_statement(audit.name, str(version), Path(scratch)).judgement
            except EvidenceError:  # planted, or of another key: it says nothing about this history
                continue
        if judgement["model"] != audit.name:
            continue
        previous = judgement["previous"]
        entries = {entry.number: entry.digest for entry in chain}
        if previous["audit_run"] == audit.run_id and entries.get(previous["number"]) == previous["sha256"]:
            return
        raise EvidenceError(
            f"the history of {audit.name} (audit run {audit.run_id}, {len(chain)} entries) is shorter than {where}"
            f" knows, whose statement follows entry.{previous['number']} of audit run {previous['audit_run']}; restore"
            " MLflow from a backup"
        )


def fetch_statement(name: str, version: str, scratch: Path) -> Evidence:
    """The statement of a version alone; its files are not looked at.

    Raises:
        EvidenceError: it has none that a trusted key signed.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    where = f"{name} version {version}"
    try:
        uri = f"models:/{name}/{version}/{STATEMENT}"
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(scratch))
    except (MlflowException, FileNotFoundError) as error:
        if isinstance(error, MlflowException) and not _is_missing(error):
            raise
        raise EvidenceError(
            f"{where}: no {STATEMENT}, so nothing proves what it is; only what `kubealign run` registers has one"
        ) from error
    return read_statement(Path(path).parent, where)


def _is_missing(error: Any) -> bool:
    """Whether MLflow says that there is no such artifact, rather than that it cannot serve it now."""
    return error.error_code == "RESOURCE_DOES_NOT_EXIST" or "No such artifact" in str(error) or " 404" in str(error)


def forced(champions: list[ChampionRecord], statement: str) -> ChampionRecord | None:
    """The promotion by force through which a version was last champion; None if it came another way, or never."""
    held = [record for record in champions if record.statement == statement and record.how != "rollback"]
    return held[-1] if held and held[-1].how == "force" else None


def rolled_back(champions: list[ChampionRecord], statement: str) -> ChampionRecord | None:
    """The rollback that removed a version, unless a person has made it champion again by force."""
    told = [r for r in champions if r.removed == statement or (r.statement == statement and r.how == "force")]
    return told[-1] if told and told[-1].removed == statement else None


RESULT = "urn:kubealign:result:1"
"""Type of the statement about a run's result."""
RESULT_SIGNATURE = "result.sig"


def result_statement(run_id: str, files: dict[str, str]) -> bytes:
    """A signed statement that a pipeline run ended with these files, by their sha256."""
    return signed(statement(files, RESULT, {"run": run_id}), signing_key())


def check_result(run_id: str, files: dict[str, str], text: bytes) -> None:
    """Check that a run's result is what register signed for this very run.

    Raises:
        EvidenceError: it is not.
    """
    where = f"run {run_id}: {RESULT_SIGNATURE}"
    document = opened(text, where)
    if document != statement(files, RESULT, {"run": run_id}):
        raise EvidenceError(f"{where}: about another run, or its result or report was changed since")
