"""Commands for the registry: promote, rollback, history, rules, keys, verify, reproduce."""

import re
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from components.common.errors import EvidenceError, InputError, KubealignError
from components.common.foreign import one_line
from components.common.secrets import without_credentials
from components.config.gate import GateConfig
from components.config.params import PARAMS, Config, load_config
from components.gate.rules_of_model import check_rules, rules_of
from components.gate.verdict import Verdict
from components.registry.audit import Rules
from components.registry.evidence import CheckedVersion
from components.tracking import store
from pipelines.commands.options import Project
from pipelines.project import project_folder
from pipelines.terminal import document, terminal
from pipelines.verification import accept

app = typer.Typer()
console = Console()
COPIED_FROM = "kubealign.copied_from"
"""Tag of a copy with its source, for people, and to find it again."""

Version = Annotated[str, typer.Argument(help="Version number.")]
Name = Annotated[str, typer.Option(help="Registered model; by default register.name in params.yaml.")]
Reason = Annotated[str, typer.Option(help="Reason, which is recorded.")]


@app.command("promote", rich_help_panel="Registry")
def promote_(
    version: Version,
    to: Annotated[str, typer.Option(help="Copy it to this registered model and make it champion there.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Promote whatever the verdict; needs --reason.")] = False,
    reason: Reason = "",
    name: Name = "",
    project: Project = None,
) -> None:
    """Make a version the champion: one that passed the gate against the current champion, or any with --force."""
    from components.registry.champion import promote

    client, name = _registry(project, name)
    _version(client, name, version)
    reason = one_line(reason)  # it is recorded for ever
    if force and not reason:
        raise InputError("--force overrides the gate; give the reason with --reason, which is recorded and signed")
    if to:
        console.print(terminal(_copy(client, name, version, to, force, reason, _config(project))), soft_wrap=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        checked, verdict = accept(client, name, version, Path(scratch))
    if not force:
        _check_passed(client, checked, verdict)
    expected = None if force else verdict["incumbent"].rpartition("/")[2]
    why = reason or f"passed the gate: {verdict['verdict']}"
    how = "force" if force else "promote"
    record = promote(client, name, version, how, why, expected, statement=checked.evidence.digest)
    _note_force(client, name, version, record, force)
    by_force = f", by force: {record.reason}" if force else ""
    console.print(terminal(f"{name} version {record.version} is champion since {record.at}{by_force}"), soft_wrap=True)


@app.command("rollback", rich_help_panel="Registry")
def rollback_(
    reason: Annotated[str, typer.Option(help="Reason, recorded in the history and on the version rolled back.")],
    name: Name = "",
    project: Project = None,
) -> None:
    """Restore the previous champion."""
    from components.registry.champion import rollback

    reason = one_line(reason)  # it is recorded for ever
    if not reason:
        raise InputError("--reason is empty; say why the champion is rolled back")
    client, name = _registry(project, name)

    def accepted(version: str) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            return accept(client, name, version, Path(scratch))[0].evidence.digest

    record, removed = rollback(client, name, reason, accepted)
    sentence = f"{name} version {record.version} is champion again, version {removed} is not"
    console.print(terminal(sentence), soft_wrap=True)


@app.command(rich_help_panel="Registry")
def history(
    name: Name = "",
    begin: Annotated[
        bool, typer.Option("--begin", help="Begin the history of a model that has versions but none; needs --reason.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Show what is wrong around the history, one after the other, and mend it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --repair: do not ask.")] = False,
    reason: Reason = "",
    project: Project = None,
) -> None:
    """Show past and current champions, and how often each test set was used; every entry's signature is checked."""
    from components.registry.audit import Audit
    from components.registry.champion import champion_alias
    from components.registry.evidence import check_history

    client, name = _registry(project, name)
    if begin:
        reason = one_line(reason)
        if not reason:
            raise InputError("--begin forgets every earlier champion and use of a test set; say why with --reason")
        Audit.begin(client, name, _rules(_config(project)), reason)
    if repair:
        _repair(client, name, yes)
    audit = Audit.find(client, name)
    if not audit:
        console.print(terminal(f"{name}: no decision yet"))
        return
    check_history(client, audit)
    records = audit.champions()
    table = Table("#", "version", "since", "until", "how", "by", "why", box=box.SIMPLE_HEAD)
    for record, later in zip(records, [*records[1:], None][: len(records)], strict=True):
        until = later.at if later else "now"
        row = (record.number, record.version or "none", record.at, until, record.how, record.by, record.reason)
        table.add_row(*map(terminal, row))
    console.print(table)
    for test_set, uses in audit.test_sets().items():
        console.print(terminal(f"test set {test_set}: {uses} decision{'s' if uses > 1 else ''}"))
    console.print(terminal(f"audit run {audit.run_id}, {len(audit.entries())} signed entries"))
    alias = champion_alias(client, name)
    if records and alias != records[-1].version:
        sentence = (
            f"the alias champion points to version {alias or 'none'}: it was moved by other means, or a promotion was"
            " interrupted; the next run or promotion sets it to the champion of this history"
        )
        console.print(terminal(sentence), soft_wrap=True)


def _repair(client: Any, name: str, yes: bool) -> None:
    from components.registry.repair import next_repair

    done: list[str] = []
    while found := next_repair(client, name):
        if found.sentence in done:
            raise KubealignError(f"{found.sentence}: done, and still so; is somebody else at work?")
        console.print(terminal(found.sentence), soft_wrap=True)
        if not yes and not typer.confirm("do it?"):
            raise typer.Exit(1)
        found.do()
        done.append(found.sentence)
    console.print(f"{len(done)} repaired" if done else "nothing to repair")


@app.command("verify", rich_help_panel="Registry")
def verify_(
    uri: Annotated[str, typer.Argument(help="models:/name@champion or models:/name/version.")] = "",
    project: Project = None,
) -> None:
    """Check a version's signed statement and every hash, judge it again, load it, and compare its logits."""
    from pipelines.verification import verify

    client, name = _registry(project, "")
    checks = verify(client, *_named(client, uri or f"models:/{name}@champion"))
    table = Table("check", "outcome", "details", box=box.SIMPLE_HEAD)
    for check in checks:
        table.add_row(*map(terminal, (check.name, check.outcome, check.sentence)))
    console.print(table)
    failed = [check for check in checks if check.outcome == "fail"]
    if failed:
        raise KubealignError(f"{failed[0].name}: {failed[0].sentence}")


@app.command("rules", rich_help_panel="Registry")
def rules_(reason: Reason = "", name: Name = "", project: Project = None) -> None:
    """Show the gate's rules of the registered model; with --reason, make those of params.yaml its rules."""
    from components.registry.audit import Audit

    client, name = _registry(project, name)
    audit = Audit.find(client, name)
    if not audit:
        raise InputError(f"{name}: no version yet; its first run's section `gate` becomes its rules")
    if reason.strip():
        audit.set_rules(_rules(_config(project)), one_line(reason))
    rules = audit.rules()
    assert rules, "there are versions"
    for key, value in (rules["gate"] | {"answers must be generated": rules["answers"]}).items():
        console.print(terminal(f"{key}: {value}"))


@app.command("keys", rich_help_panel="Registry")
def keys_(
    secret: Annotated[
        bool, typer.Option("--secret", help="Make a new key, and print the Kubernetes secret that holds it.")
    ] = False,
    line: Annotated[
        bool, typer.Option("--line", help="Print this machine's public key alone, as register.public_keys takes it.")
    ] = False,
    project: Project = None,
) -> None:
    """Show the id of this machine's key, its public line, and the keys that are trusted here."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from components.tracking.keys import key_id, public_line, signing_key, trusted_keys

    project_folder(project)
    if secret:
        made = ec.generate_private_key(ec.SECP256R1())
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        values = {"signing_key": pem, "cache_key": secrets.token_hex(32), "public_keys": public_line(made.public_key())}
        found = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "kubealign-signing"}, "type": "Opaque"}
        print(document(yaml.safe_dump(found | {"stringData": values}, sort_keys=False)), end="")
        return
    own = signing_key().public_key()
    if line:
        print(terminal(public_line(own)))
        return
    print("key     ", terminal(key_id(own)))
    print("line    ", terminal(public_line(own)))
    for trusted in trusted_keys():
        print("trusted ", terminal(trusted))


@app.command("reproduce", rich_help_panel="Registry")
def reproduce_(
    version: Version,
    out: Annotated[Path | None, typer.Option(help="Folder to check the code out to; without it, only print.")] = None,
    name: Name = "",
    project: Project = None,
) -> None:
    """Show a version's provenance and check out its code, ready to re-run."""
    from pipelines.verification import reproduce

    root = project_folder(project)
    client, name = _registry(project, name)
    for line in reproduce(_version(client, name, version), root, out):
        console.print(terminal(line), soft_wrap=True)


def _registry(project: Path | None, name: str) -> tuple[Any, str]:
    root = project_folder(project)
    return store.client(), name or load_config(root / PARAMS).register_.name


def _version(client: Any, name: str, version: str) -> Any:
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"\d+", version):
        raise InputError(f"version {version!r}: expected a number, such as 3")
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        where = without_credentials(store.tracking_uri())
        raise InputError(f"{name} version {version}: not in the registry at {where}") from error


def _named(client: Any, uri: str) -> tuple[str, Any]:
    """Resolve a models:/ URI to the registered model's name and the version."""
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if not match:
        raise InputError(f"{uri}: expected models:/name@alias or models:/name/version")
    name, version, alias = match.groups()
    if version:
        return name, _version(client, name, version)
    try:
        return name, client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise InputError(f"{uri}: no version of {name} has that alias") from error


def _check_passed(client: Any, checked: CheckedVersion, verdict: Verdict) -> None:
    """Reject a version that did not pass the gate by the registered model's rules, or was rolled back; the incumbent it
    was compared with is checked later.
    """
    from components.registry.audit import Audit
    from components.registry.evidence import rolled_back

    what, force = f"{checked.name} version {checked.version}", "; --force with --reason overrides that"
    if checked.copied_from:
        raise KubealignError(f"{what} is a copy, judged as {checked.copied_from}; copy the champion there again{force}")
    if not verdict["passed"]:
        raise KubealignError(f"{what} did not pass the gate: {verdict['verdict']}{force}")
    audit = Audit.find(client, checked.name)
    rules = audit.rules() if audit else None
    assert audit and rules, "it has a place in the history"
    answers = not any(rule["name"] == "kl" and rule["outcome"] == "not applicable" for rule in verdict["rules"])
    check_rules(rules, GateConfig.model_validate(verdict["gate"]), answers, checked.name)
    removed = rolled_back(audit.champions(), checked.evidence.digest)
    if removed:
        raise KubealignError(f"{what} was rolled back ({removed.at} {removed.reason}){force}")


def _copy(client: Any, name: str, version: str, to: str, force: bool, reason: str, config: Config) -> str:
    """Copy a champion to another registered model, for example from dev to prod, and make it champion there."""
    from components.registry.audit import Audit
    from components.registry.champion import champion_version, promote
    from components.registry.evidence import forced

    if to == name:
        raise InputError(f"--to {to}: the version is in that model already; name another registered model")
    audit = Audit.find(client, name)
    if not force and champion_version(audit) != version:
        raise KubealignError(
            f"{name} version {version} is not its champion; promote it there first, or use --force with --reason"
        )
    with tempfile.TemporaryDirectory() as scratch:
        checked, _ = accept(client, name, version, Path(scratch))
    statement = checked.evidence.digest
    by_force = forced(audit.champions() if audit else [], statement)
    told = f" by force ({by_force.reason})" if by_force else ""
    Audit.open(client, to, _rules(config))
    copied = _copied(client, f"models:/{name}/{version}", to, statement)
    why = f"{reason}; from" if reason else "from"
    how = "force" if force or by_force else "copy"
    record = promote(
        client, to, copied, how, f"{why} {name} version {version}, champion there{told}", statement=statement
    )
    _note_force(client, to, copied, record, force)
    return f"{to} version {copied}, a copy of {name} version {version}, is champion since {record.at}"


def _copied(client: Any, source: str, to: str, statement: str) -> str:
    """The version that is a copy of a source, with its statement and its files; made if there is none."""
    from components.register.package import find_versions

    known = find_versions(client, to, COPIED_FROM, source)
    for version in known:
        if _has_statement(to, version, statement):
            return version
    copied = str(client.copy_model_version(source, to).version)
    client.set_model_version_tag(to, copied, COPIED_FROM, source)
    if not _has_statement(to, copied, statement):
        raise EvidenceError(f"{to} version {copied} is not the copy of {source} that was asked for; run this again")
    return copied


def _has_statement(name: str, version: str, statement: str) -> bool:
    """Whether a version holds this very statement and the files that it names."""
    import mlflow

    from components.registry.evidence import check_files, read_statement

    where, uri = f"{name} version {version}", f"models:/{name}/{version}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
        try:
            evidence = read_statement(folder, where)
            check_files(folder, evidence, where)
        except EvidenceError:
            return False
    return evidence.digest == statement


def _config(project: Path | None) -> Config:
    return load_config(project_folder(project) / PARAMS)


def _rules(config: Config) -> Rules:
    return rules_of(config.gate, config.evaluate.generations_per_language > 0)


def _note_force(client: Any, name: str, version: str, record: Any, force: bool) -> None:
    """Tag a version that was promoted by force, for people; the history is what counts."""
    from components.registry.champion import ROLLED_BACK

    if not force:
        return
    client.set_model_version_tag(name, version, "kubealign.forced", f"{record.at} {record.by}: {record.reason}")
    if ROLLED_BACK in client.get_model_version(name, version).tags:
        client.delete_model_version_tag(name, version, ROLLED_BACK)
