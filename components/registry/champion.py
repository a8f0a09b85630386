"""Promotion and rollback: the signed history decides who is champion, the alias `champion` follows.

A promotion claims the next champion's entry, which only one caller can get, sets the alias, and checks for later
claims, so the last alias write always reflects the latest claim. If a process dies between claim and alias, or somebody
moves the alias, the next caller puts it right.
"""

from collections.abc import Callable
from typing import Any

from components.common.errors import ChampionChangedError, InputError
from components.registry.audit import CHAMPION, Audit, ChampionRecord
from components.tracking import store

ROLLED_BACK = "kubealign.rolled_back"
"""Tag of a version that was rolled back, with the reason, for people; the history is what counts."""


def promote(
    client: Any,
    name: str,
    version: str,
    how: str,
    reason: str,
    expected: str | None = None,
    run: str = "",
    statement: str = "",
) -> ChampionRecord:
    """Make a version the champion, whose evidence the caller has checked.

    Args:
        client: MLflow client.
        name: registered model.
        version: its version.
        how: see `ChampionRecord`.
        reason: recorded with the promotion.
        expected: version that must be champion now, empty for no champion; None accepts any.
        run: MLflow run that made the decision.
        statement: sha256 of the version's statement.

    Raises:
        ChampionChangedError: another version is champion; nothing was changed.
    """
    audit = Audit.find(client, name)
    if not audit:
        raise InputError(f"{name}: no such registered model; `kubealign run` registers one")
    while True:
        last = reconcile_alias(audit)
        current = last.version if last else ""
        if last and current == version:
            return last
        if expected is not None and current != expected:
            raise ChampionChangedError(
                f"{name} version {version} was evaluated against {_named(expected)}, but the champion is"
                f" {_named(current)}"
            )
        record = audit.claim_champion((last.number if last else 0) + 1, version, how, reason, run, statement)
        if record:
            break
    follow(audit)
    return record


def rollback(client: Any, name: str, reason: str, accepted: Callable[[str], str]) -> tuple[ChampionRecord, str]:
    """Restore the previous champion and tag the removed one with the reason.

    Args:
        client: MLflow client.
        name: registered model.
        reason: recorded with the rollback.
        accepted: checks a version's evidence and returns the sha256 of its statement, or raises.

    Returns:
        the new record, and the version that was rolled back.

    Raises:
        InputError: there was no previous champion, or it is no longer in the registry.
        ChampionChangedError: the champion was changed at the same moment.
    """
    audit = Audit.find(client, name)
    last = reconcile_alias(audit) if audit else None
    if not audit or not last:
        raise InputError(f"{name} has no recorded champion; there is nothing to roll back to")
    if not last.version:
        raise InputError(f"{name} has no champion now ({last.reason}); `kubealign promote` makes a version champion")
    path = rollback_path(audit.champions())
    if len(path) < 2:
        raise InputError(f"{name} version {last.version} is the first champion; there is nothing to roll back to")
    current, previous = path[-1].version, path[-2].version
    if why := gone(audit, path[-2]):
        raise InputError(
            f"the previous champion, {name} version {previous}, is no longer in the registry ({why}); promote another"
            " version"
        )
    statement = accepted(previous)
    record = audit.claim_champion(last.number + 1, previous, "rollback", reason, "", statement, last.statement)
    if not record:
        raise ChampionChangedError(f"the champion of {name} changed in the meantime; check `kubealign history`")
    client.set_model_version_tag(name, current, ROLLED_BACK, f"{record.at} {reason}")
    follow(audit)
    return record, current


def rollback_path(records: list[ChampionRecord]) -> list[ChampionRecord]:
    """Champions that a rollback walks back along, the current one last; each rollback drops the last one."""
    path: list[ChampionRecord] = []
    for record in records:
        if record.how == "rollback" and len(path) > 1:
            path.pop()
        elif record.version:
            path.append(record)
    return path


def reconcile_alias(audit: Audit) -> ChampionRecord | None:
    """Make the alias agree with the history; return the current record.

    The alias lags behind when a promotion was interrupted, and anyone who may edit the model can move it; neither
    makes a champion. Only a champion that no longer exists is recorded as "no champion".
    """
    while True:
        records = audit.champions()
        last = records[-1] if records else None
        if not last or not (why := gone(audit, last)):
            return follow(audit)
        audit.claim_champion(last.number + 1, "", "outside", why)


def follow(audit: Audit) -> ChampionRecord | None:
    """Set the alias to the latest claim; repeat while later claims appear."""
    while True:
        last = current_champion(audit)
        alias = champion_alias(audit.client, audit.name)
        wanted = last.version if last else ""
        if alias == wanted:
            return last
        if wanted:
            audit.client.set_registered_model_alias(audit.name, CHAMPION, wanted)
        else:
            audit.client.delete_registered_model_alias(audit.name, CHAMPION)
        if current_champion(audit) == last:
            return last


def current_champion(audit: Audit) -> ChampionRecord | None:
    """The last record of the history; None before the first champion."""
    return next(reversed(audit.champions()), None)


def champion_version(audit: Audit | None) -> str:
    """The version that is champion by the history, or an empty string; without one in the registry there is none."""
    last = current_champion(audit) if audit else None
    return last.version if audit and last and not gone(audit, last) else ""


def champion_alias(client: Any, name: str) -> str:
    """The version that the alias points to, or an empty string."""
    if not store.is_registered(client, name):
        return ""
    return str(client.get_registered_model(name).aliases.get(CHAMPION, ""))


def gone(audit: Audit, record: ChampionRecord) -> str:
    """Why the version of a record is no longer in the registry; empty if it is there, or if there is no champion."""
    from mlflow.exceptions import MlflowException

    if not record.version:
        return ""
    try:
        found = audit.client.get_model_version(audit.name, record.version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return f"version {record.version} was deleted"
    if record.created and int(found.creation_timestamp) != record.created:
        return f"version {record.version} was deleted, and another one made with its number"
    return ""


def _named(version: str) -> str:
    return f"version {version}" if version else "none (the SFT model)"
