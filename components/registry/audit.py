"""Append-only history of champions and of decisions on each test set.

MLflow's aliases and tags are blind overwrites: two pipelines that set them at the same moment do not notice each other.
The one compare-and-set that every MLflow server offers is a run's parameter, which can be written only once. So each
registered model has one audit run, whose parameters are the source of truth for aliases and tags:

    champion.<n>       the n-th champion, as JSON
    champion.<n>.set   the alias was set to it
    test.<digest>.<k>  the k-th decision on that test set

The audit run itself is chosen the same way: an experiment's name is unique and its tags are created with it, so a tag
of the experiment `kubealign-audit/<model>` names the run for everybody.
"""

import getpass
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from typing_extensions import TypedDict

from components.common.documents import parse_document
from components.common.errors import KubealignError
from components.tracking import store

CHAMPION = "champion"
CHALLENGER = "challenger"
AUDIT_RUN = "kubealign.audit_run"
MAX_REASON = 1000
"""Characters of a reason; MLflow's parameters hold 6000."""


@dataclass(frozen=True)
class ChampionRecord:
    """One entry of the champion history; `version` is empty for "no champion".

    `how` is `gate`, `promote`, `force`, `copy`, `rollback` or `outside` (the alias was moved by other means, which was
    detected later).
    """

    number: int
    version: str
    how: str
    reason: str
    by: str
    at: str
    run: str
    alias_set: bool = False
    """Whether the alias was set to this version."""


class Claim(TypedDict):
    """The parameter `champion.<n>`: a champion, and a random id that makes every claim unique."""

    version: str
    how: str
    reason: str
    by: str
    at: str
    run: str
    claim: str


class Audit:
    """The audit run of a registered model."""

    def __init__(self, client: Any, name: str, run_id: str) -> None:
        self.client, self.name, self.run_id = client, name, run_id

    @classmethod
    def find(cls, client: Any, name: str) -> "Audit | None":
        """Return the audit run, or None before the first decision on this registered model."""
        experiment = client.get_experiment_by_name(_pointer(name))
        return cls(client, name, experiment.tags[AUDIT_RUN]) if experiment else None

    @classmethod
    def open(cls, client: Any, name: str) -> "Audit":
        """Return the audit run, creating it if needed; concurrent callers get the same one."""
        from mlflow.exceptions import MlflowException

        audit = cls.find(client, name)
        if audit:
            return audit
        tags = {"kubealign.kind": "audit", "kubealign.registered_model": name}
        run = client.create_run(store.experiment_id(client), tags=tags, run_name=f"audit of {name}")
        client.set_terminated(run.info.run_id)
        try:
            client.create_experiment(_pointer(name), tags={AUDIT_RUN: run.info.run_id})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        audit = cls.find(client, name)
        assert audit
        if audit.run_id != run.info.run_id:
            client.delete_run(run.info.run_id)
        return audit

    def claim(self, key: str, value: str) -> bool:
        """Write a parameter once; return False if another value was written first. Values must be unique per caller."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_param(self.run_id, key, value)
        except MlflowException:
            written = self._facts().get(key)
            if written is None:
                raise
            return written == value
        return True

    def champions(self) -> list[ChampionRecord]:
        """All champions so far, in order."""
        facts = self._facts()
        records: list[ChampionRecord] = []
        while (text := facts.get(f"champion.{len(records) + 1}")) is not None:
            number = len(records) + 1
            claim = parse_document(text, Claim, f"audit run {self.run_id}: champion.{number}")
            records.append(
                ChampionRecord(
                    number=number,
                    version=claim["version"],
                    how=claim["how"],
                    reason=claim["reason"],
                    by=claim["by"],
                    at=claim["at"],
                    run=claim["run"],
                    alias_set=f"champion.{number}.set" in facts,
                )
            )
        return records

    def claim_champion(self, number: int, version: str, how: str, reason: str, run: str = "") -> ChampionRecord | None:
        """Record `version` as the `number`-th champion; return None if another version already is."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        record = ChampionRecord(number, version, how, reason[:MAX_REASON], _user(), at, run)
        facts = {key: value for key, value in asdict(record).items() if key not in ("number", "alias_set")}
        value = json.dumps(facts | {"claim": uuid.uuid4().hex}, ensure_ascii=False)
        return record if self.claim(f"champion.{number}", value) else None

    def mark_alias_set(self, number: int) -> None:
        """Record that the alias was set to the `number`-th champion."""
        self.claim(f"champion.{number}.set", "yes")

    def decisions(self, test_set: str) -> list[str]:
        """Decisions on a test set in order, numbered from 1."""
        facts = self._facts()
        decisions: list[str] = []
        while (decision := facts.get(f"test.{test_set}.{len(decisions) + 1}")) is not None:
            decisions.append(decision)
        return decisions

    def test_sets(self) -> dict[str, int]:
        """Number of decisions made on each test set."""
        names = {match[1] for key in self._facts() if (match := re.fullmatch(r"test\.(.+)\.\d+", key))}
        return {name: len(self.decisions(name)) for name in sorted(names)}

    def claim_decision(self, test_set: str, number: int, decision: str) -> bool:
        """Record the `number`-th decision on a test set; return False if another one has that number. Idempotent."""
        return self.claim(f"test.{test_set}.{number}", decision)

    def _facts(self) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise KubealignError(
                f"the audit run {self.run_id} of {self.name} no longer exists, and with it the history of"
                " champions and test-set uses (was it deleted and `mlflow gc` run?); restore it from a backup of MLflow"
            ) from error
        if run.info.lifecycle_stage != "active":
            raise KubealignError(
                f"the audit run {self.run_id} of {self.name} is marked as deleted; restore it with `mlflow runs restore"
                f" --run-id {self.run_id}`"
            )
        params: dict[str, str] = run.data.params
        return params


def next_use(decisions: list[str], decision: str) -> int:
    """Number of a decision on its test set: the recorded one if it was made before, else the next."""
    return decisions.index(decision) + 1 if decision in decisions else len(decisions) + 1


def _pointer(name: str) -> str:
    return f"{store.EXPERIMENT}-audit/{name}"


def _user() -> str:
    named = os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return named or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
