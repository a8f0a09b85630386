"""What MLflow lost around a model's history, and how it is put right: `kubealign history --repair`.

Nothing is made up: the entries of a history are signed, and one that does not verify is an error here as anywhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from components.registry.audit import AUDIT_RUN, Audit, pointer_name
from components.registry.champion import champion_alias, current_champion, gone, reconcile_alias
from components.registry.evidence import check_history
from components.tracking import store


@dataclass(frozen=True)
class Repair:
    """Something that has to be put right."""

    sentence: str
    """What is wrong and what will be done."""
    do: Callable[[], object]


def next_repair(client: Any, name: str) -> Repair | None:
    """What has to be put right first; None if all is well, or no history is left.

    Raises:
        EvidenceError: the history is damaged, which only a backup mends.
    """
    of_runs, pointer = (client.get_experiment_by_name(title) for title in (store.experiment_name(), pointer_name(name)))
    for experiment in (of_runs, pointer):
        if experiment and experiment.lifecycle_stage != "active":
            sentence = f"the experiment {experiment.name} was deleted, and its runs with it: restore them"
            return Repair(sentence, partial(client.restore_experiment, experiment.experiment_id))
    run_id = pointer.tags.get(AUDIT_RUN) if pointer else None
    if not run_id:
        return _lost_audit(client, name, pointer)
    audit = Audit(client, name, run_id)
    if audit.run().info.lifecycle_stage != "active":
        return Repair(f"the audit run {run_id} was deleted: restore it", partial(client.restore_run, run_id))
    check_history(client, audit)
    last, alias = current_champion(audit), champion_alias(client, name)
    why = gone(audit, last) if last else ""
    if why:
        return Repair(f"{why}: record that there is no champion, and remove its alias", partial(reconcile_alias, audit))
    wanted = last.version if last else ""
    if alias != wanted:
        instead = f"set it to version {wanted}, the champion of the history" if wanted else "remove it: there is none"
        sentence = f"the alias champion points to {f'version {alias}' if alias else 'no version'}: {instead}"
        return Repair(sentence, partial(reconcile_alias, audit))
    return None


def _lost_audit(client: Any, name: str, pointer: Any) -> Repair | None:
    """The newest audit run of this model with a signed history, which nothing points to any more."""
    query = f"tags.`kubealign.kind` = 'audit' and tags.`kubealign.registered_model` = '{name}'"
    order = ["attributes.start_time DESC"]
    for run in client.search_runs([store.experiment_id(client)], query, order_by=order):
        if "entry.1" in run.data.params:
            run_id = run.info.run_id
            entries = Audit(client, name, run_id).entries()
            return Repair(
                f"no experiment {pointer_name(name)} names the history: point to the audit run {run_id}, begun"
                f" {entries[0].at}, with {len(entries)} signed entries",
                partial(_point, client, name, pointer, run_id),
            )
    return None


def _point(client: Any, name: str, pointer: Any, run_id: str) -> None:
    if pointer:
        client.set_experiment_tag(pointer.experiment_id, AUDIT_RUN, run_id)
    else:
        client.create_experiment(pointer_name(name), tags={AUDIT_RUN: run_id})
