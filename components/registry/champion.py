"""Promotion and rollback: the audit run decides who is champion, the alias `champion` follows.

A promotion claims the next `champion.<n>`, which only one caller can get, sets the alias, and checks for later claims,
so the last alias write always reflects the latest claim. If a process dies between claim and alias, the next caller
finishes the job.
"""

import time
from typing import Any

from components.common.errors import ChampionChangedError, InputError
from components.registry.audit import CHAMPION, Audit, ChampionRecord

ROLLED_BACK = "kubealign.rolled_back"
"""Tag of a version that was rolled back, with the reason: only a person can make it champion again."""
RECONCILE_AFTER_S = 1.0


def promote(
    client: Any, name: str, version: str, how: str, reason: str, expected: str | None = None, run: str = ""
) -> ChampionRecord:
    """Make a version the champion.

    Args:
        client: MLflow client.
        name: registered model.
        version: its version.
        how: see `ChampionRecord`.
        reason: recorded with the promotion.
        expected: version that must be champion now, empty for no champion; None accepts any.
        run: MLflow run that made the decision.

    Raises:
        ChampionChangedError: another version is champion; nothing was changed.
    """
    audit = Audit.open(client, name)
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
        record = audit.claim_champion((last.number if last else 0) + 1, version, how, reason, run)
        if record:
            break
    follow(audit)
    return record


def rollback(client: Any, name: str, reason: str) -> tuple[ChampionRecord, str]:
    """Restore the previous champion and tag the removed one with the reason.

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
    current, previous = path[-1], path[-2]
    if not _exists(client, name, previous):
        raise InputError(
            f"the previous champion, {name} version {previous}, is no longer in the registry; promote another version"
        )
    record = audit.claim_champion(last.number + 1, previous, "rollback", reason)
    if not record:
        raise ChampionChangedError(f"the champion of {name} changed in the meantime; check `kubealign history`")
    client.set_model_version_tag(name, current, ROLLED_BACK, f"{record.at} {reason}")
    follow(audit)
    return record, current


def rollback_path(records: list[ChampionRecord]) -> list[str]:
    """Versions a rollback walks back along, the current champion last; each rollback drops the last one."""
    path: list[str] = []
    for record in records:
        if record.how == "rollback" and len(path) > 1:
            path.pop()
        elif record.version:
            path.append(record.version)
    return path


def reconcile_alias(audit: Audit) -> ChampionRecord | None:
    """Make audit run and alias agree; return the current record.

    An alias that lags behind its claim is set: the promotion was interrupted. An alias that was moved by other means is
    respected and recorded in the audit run.
    """
    checks = 0
    while True:
        records = audit.champions()
        last = records[-1] if records else None
        if last and not last.alias_set:
            return follow(audit)
        alias = champion_alias(audit.client, audit.name)
        if alias == (last.version if last else ""):
            return last
        checks += 1
        # A promotion in progress sets the alias in a moment.
        if last and checks < 3:
            time.sleep(RECONCILE_AFTER_S)
            continue
        record = audit.claim_champion(len(records) + 1, alias, "outside", "the alias was moved by other means")
        if record:
            audit.mark_alias_set(record.number)


def follow(audit: Audit) -> ChampionRecord:
    """Set the alias to the latest claim; repeat while later claims appear."""
    while True:
        last = audit.champions()[-1]
        if last.version:
            audit.client.set_registered_model_alias(audit.name, CHAMPION, last.version)
        elif champion_alias(audit.client, audit.name):
            audit.client.delete_registered_model_alias(audit.name, CHAMPION)
        if audit.champions()[-1].number == last.number:
            audit.mark_alias_set(last.number)
            return last


def champion_alias(client: Any, name: str) -> str:
    """The version that the alias points to, or an empty string."""
    # With authentication on, MLflow answers 403 for a model that does not exist; a search is allowed.
    if not client.search_registered_models(f"name = '{name}'"):
        return ""
    return str(client.get_registered_model(name).aliases.get(CHAMPION, ""))


def _exists(client: Any, name: str, version: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _named(version: str) -> str:
    return f"version {version}" if version else "none (the SFT model)"
