"""Commands for the registry: promote, rollback, history, verify, reproduce."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from components.common.errors import InputError, KubealignError
from components.config.params import PARAMS, load_config
from components.tracking import store
from pipelines.commands.options import Project
from pipelines.project import project_folder

app = typer.Typer()
console = Console()

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
    found = _version(client, name, version)
    if force and not reason.strip():
        raise InputError("--force overrides the gate; give the reason with --reason, which is recorded on the version")
    if to:
        console.print(_copy(client, name, version, to, force, reason), soft_wrap=True)
        return
    if not force:
        _check_evidence(name, version, found.tags)
    expected = None if force else found.tags["kubealign.incumbent"].rpartition("/")[2]
    why = reason or f"passed the gate: {found.tags['kubealign.verdict']}"
    record = promote(client, name, version, "force" if force else "promote", why, expected)
    _note_force(client, name, version, record, force)
    console.print(f"{name} version {record.version} is champion since {record.at}", soft_wrap=True)


@app.command("rollback", rich_help_panel="Registry")
def rollback_(
    reason: Annotated[str, typer.Option(help="Reason, recorded in the history and on the version rolled back.")],
    name: Name = "",
    project: Project = None,
) -> None:
    """Restore the previous champion."""
    from components.registry.champion import rollback

    if not reason.strip():
        raise InputError("--reason is empty; say why the champion is rolled back")
    client, name = _registry(project, name)
    record, removed = rollback(client, name, reason)
    console.print(f"{name} version {record.version} is champion again, version {removed} is not", soft_wrap=True)


@app.command(rich_help_panel="Registry")
def history(name: Name = "", project: Project = None) -> None:
    """Show past and current champions, and how often each test set was used."""
    from components.registry.audit import Audit
    from components.registry.champion import champion_alias

    client, name = _registry(project, name)
    audit = Audit.find(client, name)
    if not audit:
        console.print(f"{name}: no decision yet")
        return
    records = audit.champions()
    table = Table("#", "version", "since", "until", "how", "by", "why", box=box.SIMPLE_HEAD)
    for record, later in zip(records, [*records[1:], None], strict=True):
        until = later.at if later else "now"
        row = (record.version or "none", record.at, until, record.how, record.by, record.reason)
        table.add_row(str(record.number), *row)
    console.print(table)
    for test_set, uses in audit.test_sets().items():
        console.print(f"test set {test_set}: {uses} decision{'s' if uses > 1 else ''}", highlight=False)
    console.print(f"audit run {audit.run_id}", highlight=False)
    alias = champion_alias(client, name)
    if records and alias != records[-1].version:
        console.print(
            f"the alias champion points to version {alias or 'none'}: it was moved by other means, or a promotion was"
            " interrupted; the next run or promotion reconciles it",
            soft_wrap=True,
        )


@app.command("verify", rich_help_panel="Registry")
def verify_(
    uri: Annotated[str, typer.Argument(help="models:/name@champion or models:/name/version.")] = "",
    project: Project = None,
) -> None:
    """Check every hash of a version, load it, and compare its logits with those recorded at registration."""
    from pipelines.verification import verify

    client, name = _registry(project, "")
    checks = verify(client, *_named(client, uri or f"models:/{name}@champion"))
    table = Table("check", "outcome", "details", box=box.SIMPLE_HEAD)
    for check in checks:
        table.add_row(check.name, check.outcome, check.sentence)
    console.print(table)
    failed = [check for check in checks if check.outcome == "fail"]
    if failed:
        raise KubealignError(f"{failed[0].name}: {failed[0].sentence}")


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
        console.print(line, markup=False, highlight=False, soft_wrap=True)


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
        where = store.without_credentials(store.tracking_uri())
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


def _check_evidence(name: str, version: str, tags: dict[str, str]) -> None:
    """Reject a version that did not pass the gate; the incumbent it was compared with is checked later."""
    from components.registry.champion import ROLLED_BACK

    what = f"{name} version {version}"
    force = "; --force with --reason overrides that"
    if "kubealign.passed" not in tags:
        raise KubealignError(f"{what} has no gate verdict{force}")
    if tags["kubealign.passed"] != "true":
        raise KubealignError(f"{what} did not pass the gate: {tags['kubealign.verdict']}{force}")
    if tags.get("kubealign.decided") == "superseded":
        raise KubealignError(f"the verdict of {what} was superseded; run the pipeline again{force}")
    if ROLLED_BACK in tags:
        raise KubealignError(f"{what} was rolled back ({tags[ROLLED_BACK]}){force}")


def _copy(client: Any, name: str, version: str, to: str, force: bool, reason: str) -> str:
    """Copy a champion to another registered model, for example from dev to prod, and make it champion there."""
    from components.register.package import find_version
    from components.registry.champion import champion_alias, promote

    if to == name:
        raise InputError(f"--to {to}: the version is in that model already; name another registered model")
    if not force and champion_alias(client, name) != version:
        raise KubealignError(
            f"{name} version {version} is not its champion; promote it there first, or use --force with --reason"
        )
    content = client.get_model_version(name, version).tags.get("kubealign.model", "")
    copied = find_version(client, to, "kubealign.model", content) if content else ""
    if not copied:
        copied = str(client.copy_model_version(f"models:/{name}/{version}", to).version)
        client.set_model_version_tag(to, copied, "kubealign.copied_from", f"models:/{name}/{version}")
    record = promote(client, to, copied, "copy", reason or f"from {name} version {version}, champion there")
    _note_force(client, to, copied, record, force)
    return f"{to} version {copied}, a copy of {name} version {version}, is champion since {record.at}"


def _note_force(client: Any, name: str, version: str, record: Any, force: bool) -> None:
    from components.registry.champion import ROLLED_BACK

    if not force:
        return
    client.set_model_version_tag(name, version, "kubealign.forced", f"{record.at} {record.by}: {record.reason}")
    if ROLLED_BACK in client.get_model_version(name, version).tags:
        client.delete_model_version_tag(name, version, ROLLED_BACK)
