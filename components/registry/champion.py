"""Who is champion: the audit run decides, the alias `champion` follows.

A promotion claims the next `champion.<n>`, which only one can get, sets the alias, and looks whether somebody came
after; whoever sets the alias last has so seen the last claim. A crash between claim and alias is completed by the next
that looks.
"""

import time
from typing import Any

from components.common.errors import InputError, KubealignError
from components.registry.audit import CHAMPION, Audit, Reign

ROLLED_BACK = "kubealign.rolled_back"
"""Tag of a version that was taken back, with the reason: only a person makes it champion again."""
SETTLES_AFTER_S = 1.0


class ChampionChanged(KubealignError):
    """The champion is not the one that the model was judged against."""


def promote(
    client: Any, name: str, version: str, how: str, reason: str, expected: str | None = None, run: str = ""
) -> Reign:
    """Make a version the champion.

    Args:
        client: of MLflow.
        name: the registered model.
        version: of it.
        how: as in `Reign`.
        reason: recorded.
        expected: the version that must be champion now, empty for none; None for whichever.
        run: MLflow run that decided it.

    Raises:
        ChampionChanged: another one is champion; nothing was moved.
    """
    audit = Audit.open(client, name)
    while True:
        last = settle(audit)
        present = last.version if last else ""
        if last and present == version:
            return last
        if expected is not None and present != expected:
            raise ChampionChanged(
                f"{name} version {version} was judged against {_named(expected)}, and the champion is {_named(present)}"
            )
        reign = audit.claim_reign((last.number if last else 0) + 1, version, how, reason, run)
        if reign:
            break
    follow(audit)
    return reign


def rollback(client: Any, name: str, reason: str) -> tuple[Reign, str]:
    """Bring the previous champion back; the one that goes gets a tag with the reason.

    Returns:
        the new reign, and the version that went.

    Raises:
        InputError: there was none before, or it is no longer in the registry.
        ChampionChanged: somebody moved the champion at the same moment.
    """
    audit = Audit.find(client, name)
    last = settle(audit) if audit else None
    if not audit or not last:
        raise InputError(f"{name} has had no champion that this project knows of; there is nothing to go back to")
    if not last.version:
        raise InputError(f"{name} has no champion now ({last.reason}); `kubealign promote` makes a version champion")
    line = succession(audit.reigns())
    if len(line) < 2:
        raise InputError(f"{name} version {last.version} is the first champion; there is none to go back to")
    going, coming = line[-1], line[-2]
    if not _exists(client, name, coming):
        raise InputError(
            f"the champion before, {name} version {coming}, is no longer in the registry; promote another version"
        )
    reign = audit.claim_reign(last.number + 1, coming, "rollback", reason)
    if not reign:
        raise ChampionChanged(f"the champion of {name} changed at this moment; look at `kubealign history` again")
    client.set_model_version_tag(name, going, ROLLED_BACK, f"{reign.at} {reason}")
    follow(audit)
    return reign, going


def succession(reigns: list[Reign]) -> list[str]:
    """Champions that a rollback goes back along, the present one last: a rollback takes the last one away."""
    line: list[str] = []
    for reign in reigns:
        if reign.how == "rollback" and len(line) > 1:
            line.pop()
        elif reign.version:
            line.append(reign.version)
    return line


def settle(audit: Audit) -> Reign | None:
    """Make audit run and alias agree, and give the present reign.

    An alias that has not followed its claim is set: its promotion was interrupted. An alias that was moved by other
    means is respected, and entered into the audit run.
    """
    looked = 0
    while True:
        reigns = audit.reigns()
        last = reigns[-1] if reigns else None
        if last and not last.followed:
            return follow(audit)
        alias = champion_alias(audit.client, audit.name)
        if alias == (last.version if last else ""):
            return last
        looked += 1
        # A promotion that is under way corrects the alias in a moment.
        if last and looked < 3:
            time.sleep(SETTLES_AFTER_S)
            continue
        found = audit.claim_reign(len(reigns) + 1, alias, "outside", "the alias was moved by other means")
        if found:
            audit.mark_followed(found.number)


def follow(audit: Audit) -> Reign:
    """Set the alias to the last claim, until no later one is there afterwards."""
    while True:
        last = audit.reigns()[-1]
        if last.version:
            audit.client.set_registered_model_alias(audit.name, CHAMPION, last.version)
        elif champion_alias(audit.client, audit.name):
            audit.client.delete_registered_model_alias(audit.name, CHAMPION)
        if audit.reigns()[-1].number == last.number:
            audit.mark_followed(last.number)
            return last


def champion_alias(client: Any, name: str) -> str:
    """The version that carries the alias, or nothing."""
    # A server with users answers 403 when asked for a model that is not there; a search is let through.
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
