"""What the registry remembers beside versions and aliases: who was champion when, and every decision on a test set.

MLflow's aliases and tags are blind overwrites: two pipelines that set them at the same moment do not notice each other.
The one compare-and-set that every MLflow server offers is a run's parameter, which can be written once. So every
registered model has one audit run, and its parameters are the truth that aliases and tags follow:

    champion.<n>       the n-th champion, as JSON
    champion.<n>.set   the alias has followed it
    test.<digest>.<k>  the k-th decision on that test set

Which run is the audit run is decided the same way: an experiment's name is unique and its tags come into being with
it, so a tag of the experiment `kubealign-audit/<model>` names the run for everybody.
"""

import getpass
import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from components.common.errors import KubealignError
from components.tracking import run as tracking

CHAMPION = "champion"
CHALLENGER = "challenger"
AUDIT_RUN = "kubealign.audit_run"
MAX_REASON = 1000
"""Characters of a reason; MLflow's parameters hold 6000."""


@dataclass(frozen=True)
class Reign:
    """A champion's time in office, as its parameter tells; `version` is empty when there was none.

    `how` is `gate`, `promote`, `force`, `copy`, `rollback` or `outside` (the alias was moved by other means, and found
    like that later).
    """

    number: int
    version: str
    how: str
    reason: str
    by: str
    at: str
    run: str
    followed: bool = False
    """Whether the alias has followed."""


class Audit:
    """The audit run of a registered model."""

    def __init__(self, client: Any, name: str, run_id: str) -> None:
        self.client, self.name, self.run_id = client, name, run_id

    @classmethod
    def find(cls, client: Any, name: str) -> "Audit | None":
        """The audit run, or None before the first decision about this registered model."""
        experiment = client.get_experiment_by_name(_pointer(name))
        return cls(client, name, experiment.tags[AUDIT_RUN]) if experiment else None

    @classmethod
    def open(cls, client: Any, name: str) -> "Audit":
        """The audit run, made if need be; of two that make it at once, both get the same."""
        from mlflow.exceptions import MlflowException

        found = cls.find(client, name)
        if found:
            return found
        tags = {"kubealign.kind": "audit", "kubealign.registered_model": name}
        run = client.create_run(tracking.experiment_id(client), tags=tags, run_name=f"audit of {name}")
        client.set_terminated(run.info.run_id)
        try:
            client.create_experiment(_pointer(name), tags={AUDIT_RUN: run.info.run_id})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = cls.find(client, name)
        assert found
        if found.run_id != run.info.run_id:
            client.delete_run(run.info.run_id)
        return found

    def claim(self, key: str, value: str) -> bool:
        """Write a parameter, once for all; False when somebody else was first. A value holds something of its own."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_param(self.run_id, key, value)
        except MlflowException:
            written = self._facts().get(key)
            if written is None:
                raise
            return written == value
        return True

    def reigns(self) -> list[Reign]:
        """Every champion so far, in order."""
        facts = self._facts()
        reigns: list[Reign] = []
        while (text := facts.get(f"champion.{len(reigns) + 1}")) is not None:
            found = {key: value for key, value in json.loads(text).items() if key != "claim"}
            number = len(reigns) + 1
            reigns.append(Reign(number=number, followed=f"champion.{number}.set" in facts, **found))
        return reigns

    def claim_reign(self, number: int, version: str, how: str, reason: str, run: str = "") -> Reign | None:
        """Make `version` the `number`-th champion; None when another one has become that meanwhile."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        reign = Reign(number, version, how, reason[:MAX_REASON], _user(), at, run)
        facts = {key: value for key, value in asdict(reign).items() if key not in ("number", "followed")}
        value = json.dumps(facts | {"claim": uuid.uuid4().hex}, ensure_ascii=False)
        return reign if self.claim(f"champion.{number}", value) else None

    def mark_followed(self, number: int) -> None:
        """Note that the alias has followed the `number`-th champion."""
        self.claim(f"champion.{number}.set", "yes")

    def decisions(self, test_set: str) -> list[str]:
        """The decisions on a test set, in order: the first has number 1."""
        facts = self._facts()
        found: list[str] = []
        while (decision := facts.get(f"test.{test_set}.{len(found) + 1}")) is not None:
            found.append(decision)
        return found

    def test_sets(self) -> dict[str, int]:
        """How many decisions every test set has seen."""
        names = {match[1] for key in self._facts() if (match := re.fullmatch(r"test\.(.+)\.\d+", key))}
        return {name: len(self.decisions(name)) for name in sorted(names)}

    def claim_decision(self, test_set: str, number: int, decision: str) -> bool:
        """Make `decision` the `number`-th on a test set; False when another one is that. Twice the same is once."""
        return self.claim(f"test.{test_set}.{number}", decision)

    def _facts(self) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise KubealignError(
                f"the audit run {self.run_id} of {self.name} is gone, and with it who was champion and how often each"
                " test set was used (was it deleted, and `mlflow gc` run?); restore it from a backup of MLflow"
            ) from error
        if run.info.lifecycle_stage != "active":
            raise KubealignError(
                f"the audit run {self.run_id} of {self.name} is marked deleted; `mlflow runs restore --run-id"
                f" {self.run_id}` brings it back"
            )
        params: dict[str, str] = run.data.params
        return params


def next_use(decisions: list[str], decision: str) -> int:
    """Number of a decision on its test set: the one that it got before, else the next."""
    return decisions.index(decision) + 1 if decision in decisions else len(decisions) + 1


def _pointer(name: str) -> str:
    return f"{tracking.EXPERIMENT}-audit/{name}"


def _user() -> str:
    named = os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return named or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
