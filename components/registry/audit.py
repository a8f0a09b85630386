"""The signed history of a registered model: champions, decisions on each test set, and the rules that hold.

MLflow's aliases and tags are blind overwrites, and whoever may edit a model may set them: they are for people and prove
nothing. The one compare-and-set that every MLflow server offers is a run's parameter, which can be written only once.
So each registered model has one audit run with one chain of entries, `entry.<n>`; every entry is signed, names its
model, its run and its number, and holds the sha256 of the entry before it. An edited, copied, shortened or forked chain
is therefore refused, and none can be begun for a model that has versions, unless a person with the key says so.

    start     the rules of the gate; the first entry
    rules     other rules, by a person with the key
    decision  the k-th decision on a test set, and the statement that it rests on
    champion  a champion, how it became one, and the statement that it was accepted with

A tag of the experiment `kubealign-audit/<model>` names the run: an experiment's name is unique and its tags are created
with it, so of two who begin at once both get the same run. That tag can be moved, but no chain without our signature
counts, and an empty one does not for a model that has versions.
"""

import base64
import binascii
import getpass
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from typing_extensions import TypedDict

from components.common.errors import EvidenceError
from components.registry.signing import canonical, check_signature, sign
from components.tracking import store
from components.tracking.keys import key_id, signing_key

CHAMPION = "champion"
CHALLENGER = "challenger"
AUDIT_RUN = "kubealign.audit_run"
MAX_REASON = 2000
"""Bytes of a reason, in UTF-8; MLflow's parameters hold 6000 characters."""
ENTRY_TYPE = "application/vnd.kubealign.history+json"

Kind = Literal["start", "rules", "decision", "champion"]


@dataclass(frozen=True)
class ChampionRecord:
    """One entry of the champion history; `version` is empty for "no champion".

    `how` is `gate`, `promote`, `force`, `copy`, `rollback` or `outside` (the champion's version was deleted).
    """

    number: int
    version: str
    how: str
    reason: str
    by: str
    at: str
    run: str
    statement: str
    """sha256 of the statement.json that the version was accepted with; empty for no champion."""
    removed: str = ""
    """After a rollback, the statement of the version that it removed."""
    created: int = 0
    """When the version was made, in milliseconds since 1970: a registered model that is deleted and made anew counts
    from 1 again. 0 in histories that were written before this was recorded, and for no champion.
    """


@dataclass(frozen=True)
class DecisionRecord:
    """One decision on a test set, numbered from 1, and the sha256 of the statement that it rests on."""

    test_set: str
    index: int
    decision: str
    version: str
    statement: str


class Rules(TypedDict):
    """The gate's rules of a registered model: a run may have stricter ones, never looser ones."""

    gate: dict[str, Any]
    """The section `gate` of params.yaml."""
    answers: bool
    """Whether answers must be generated, without which the rules on them do not apply."""


@dataclass(frozen=True)
class Entry:
    """An entry of the chain, its signature and its place verified."""

    number: int
    kind: Kind
    at: str
    by: str
    facts: dict[str, Any]
    digest: str
    """sha256 of its text; the next entry holds it."""


class Audit:
    """The audit run of a registered model."""

    def __init__(self, client: Any, name: str, run_id: str) -> None:
        self.client, self.name, self.run_id = client, name, run_id

    @classmethod
    def find(cls, client: Any, name: str) -> "Audit | None":
        """The audit run, or None for a registered model without versions.

        Raises:
            EvidenceError: there are versions but no history of them.
        """
        audit = cls._named(client, name)
        if not audit and has_versions(client, name):
            raise EvidenceError(_no_history(name, f"there is no experiment {pointer_name(name)}"))
        return audit

    @classmethod
    def open(cls, client: Any, name: str, rules: Rules) -> "Audit":
        """The audit run, begun with these rules if the registered model has no versions yet.

        Raises:
            EvidenceError: the history is damaged, or there are versions but no history of them.
        """
        audit = cls.find(client, name) or cls._create(client, name)
        if not audit.entries():
            audit._append([], "start", {**rules, "reason": "first run", "after": 0})
            audit.entries()
        return audit

    @classmethod
    def begin(cls, client: Any, name: str, rules: Rules, reason: str) -> "Audit":
        """Begin the history of a model that has versions: one of kubealign 0.1, or one whose history is lost.

        Raises:
            EvidenceError: it has a history.
        """
        known = client.get_experiment_by_name(pointer_name(name)) is not None
        try:
            named = cls._named(client, name)
            entries = named.entries() if named else []
        except EvidenceError:
            entries = []
        if entries:
            raise EvidenceError(f"{name} has a history already; see `kubealign history`")
        audit = cls._create(client, name, again=known)
        audit._append([], "start", {**rules, "reason": shortened(reason), "after": newest_version(client, name)})
        return audit

    def entries(self) -> list[Entry]:
        """The whole chain, verified.

        Raises:
            EvidenceError: an entry is missing, changed, from elsewhere, or signed by a key that is not trusted.
        """
        params = self._params()
        chain: list[Entry] = []
        while (text := params.pop(f"entry.{len(chain) + 1}", None)) is not None:
            chain.append(self._verified(text, chain))
        left = sorted(key for key in params if key.startswith("entry."))
        if left:
            raise EvidenceError(f"{self._where(len(chain) + 1)}: missing, but {left[0]} is there; {RESTORE}")
        if not chain and has_versions(self.client, self.name):
            raise EvidenceError(_no_history(self.name, f"the audit run {self.run_id} has no signed entry"))
        return chain

    def rules(self) -> Rules | None:
        """The rules that hold now; None before the first entry."""
        for entry in reversed(self.entries()):
            if entry.kind in ("start", "rules"):
                return {"gate": entry.facts["gate"], "answers": entry.facts["answers"]}
        return None

    def set_rules(self, rules: Rules, reason: str) -> None:
        """Let other rules hold from now on."""
        while not self._append(self.entries(), "rules", {**rules, "reason": shortened(reason)}):
            pass

    def champions(self) -> list[ChampionRecord]:
        """All champions so far, in order."""
        return _champions(self.entries())

    def claim_champion(
        self, number: int, version: str, how: str, reason: str, run: str = "", statement: str = "", removed: str = ""
    ) -> ChampionRecord | None:
        """Record `version` as the `number`-th champion; return None if another version already is."""
        created = int(self.client.get_model_version(self.name, version).creation_timestamp) if version else 0
        facts: dict[str, Any] = {"version": version, "how": how, "reason": shortened(reason), "run": run}
        facts |= {"statement": statement, "removed": removed, "created": created}
        while True:
            chain = self.entries()
            if len(_champions(chain)) + 1 != number:
                return None
            entry = self._append(chain, "champion", facts)
            if entry:
                return _champions([*chain, entry])[number - 1]

    def decided(self) -> list[DecisionRecord]:
        """All decisions in order; one whose version was registered again has one record for each statement."""
        return [DecisionRecord(**entry.facts) for entry in self.entries() if entry.kind == "decision"]

    def decisions(self, test_set: str) -> list[str]:
        """Decisions on a test set in order, numbered from 1."""
        return _decisions(self.decided(), test_set)

    def test_sets(self) -> dict[str, int]:
        """Number of decisions made on each test set."""
        made = self.decided()
        return {name: len(_decisions(made, name)) for name in sorted({record.test_set for record in made})}

    def claim_decision(self, test_set: str, number: int, decision: str, version: str = "", statement: str = "") -> bool:
        """Record the `number`-th decision on a test set; return False if another one has that number. Idempotent."""
        record = DecisionRecord(test_set, number, decision, version, statement)
        while True:
            chain = self.entries()
            known = [DecisionRecord(**entry.facts) for entry in chain if entry.kind == "decision"]
            made = _decisions(known, test_set)
            if number <= len(made) and made[number - 1] != decision:
                return False
            if number > len(made) + 1:
                raise EvidenceError(
                    f"{self.name}: decision {number} on test set {test_set} comes after {len(made)}: {RESTORE}"
                )
            if any((each.decision, each.statement) == (decision, statement) for each in known):
                return True
            if self._append(chain, "decision", vars(record)):
                return True

    def _append(self, chain: list[Entry], kind: Kind, facts: dict[str, Any]) -> Entry | None:
        """Sign and write the next entry; return None if another was written in the meantime."""
        from mlflow.exceptions import MlflowException

        key = signing_key()
        body = {
            "number": len(chain) + 1,
            "previous": chain[-1].digest if chain else "",
            "model": self.name,
            "audit_run": self.run_id,
            "kind": kind,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": _user(),
            "key": key_id(key.public_key()),
            "facts": facts,
        }
        proof = base64.b64encode(sign(canonical(body), ENTRY_TYPE, key)).decode()
        name, text = f"entry.{len(chain) + 1}", _entry_text(body, proof)
        entry = self._verified(text, chain)  # whoever signs with a key that is not trusted would block the history
        try:
            self.client.log_param(self.run_id, name, text)
        except MlflowException:
            written = self._params().get(name)
            if written is None:
                raise
            return entry if written == text else None
        return entry

    def _verified(self, text: str, chain: list[Entry]) -> Entry:
        where = self._where(len(chain) + 1)
        try:
            body = json.loads(text)
            proof = body.pop("signature")
            signature = base64.b64decode(proof, validate=True)
            intact = _entry_text(body, base64.b64encode(signature).decode()) == text
            signer, place = str(body["key"]), (body["number"], body["previous"], body["model"], body["audit_run"])
            entry = Entry(body["number"], body["kind"], body["at"], body["by"], body["facts"], _sha256(text))
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise EvidenceError(f"{where}: not a signed entry; {RESTORE}") from error
        if not intact:
            raise EvidenceError(f"{where}: changed since it was signed; {RESTORE}")
        check_signature(canonical(body), ENTRY_TYPE, signature, signer, where)
        expected = (len(chain) + 1, chain[-1].digest if chain else "", self.name, self.run_id)
        for what, found, wanted in zip(
            ("number", "previous entry", "model", "audit run"), place, expected, strict=True
        ):
            if found != wanted:
                raise EvidenceError(
                    f"{where}: from another place in another history ({what} {str(found)[:40]!r}, expected"
                    f" {str(wanted)[:40]!r}); {RESTORE}"
                )
        return entry

    def _where(self, number: int) -> str:
        return f"history of {self.name}, audit run {self.run_id}, entry.{number}"

    @classmethod
    def _named(cls, client: Any, name: str) -> "Audit | None":
        experiment = client.get_experiment_by_name(pointer_name(name))
        if not experiment:
            return None
        if AUDIT_RUN not in experiment.tags:
            raise EvidenceError(_no_history(name, f"the experiment {pointer_name(name)} names no audit run"))
        return cls(client, name, experiment.tags[AUDIT_RUN])

    @classmethod
    def _create(cls, client: Any, name: str, again: bool = False) -> "Audit":
        """Make an audit run and its pointer; of two who do so at once, both get the same run."""
        from mlflow.exceptions import MlflowException

        tags = {"kubealign.kind": "audit", "kubealign.registered_model": name}
        run = client.create_run(store.experiment_id(client), tags=tags, run_name=f"audit of {name}")
        client.set_terminated(run.info.run_id)
        if again:
            known = client.get_experiment_by_name(pointer_name(name))
            client.set_experiment_tag(known.experiment_id, AUDIT_RUN, run.info.run_id)
            return cls(client, name, run.info.run_id)
        try:
            client.create_experiment(pointer_name(name), tags={AUDIT_RUN: run.info.run_id})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        audit = cls._named(client, name)
        assert audit
        if audit.run_id != run.info.run_id:
            client.delete_run(run.info.run_id)
        return audit

    def run(self) -> Any:
        """The audit run, also one that is marked as deleted.

        Raises:
            EvidenceError: it no longer exists.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise EvidenceError(
                f"the audit run {self.run_id} of {self.name} no longer exists, and with it the history of"
                " champions and test-set uses (was it deleted and `mlflow gc` run?); restore it from a backup of MLflow"
            ) from error

    def _params(self) -> dict[str, str]:
        run = self.run()
        if run.info.lifecycle_stage != "active":
            raise EvidenceError(
                f"the audit run {self.run_id} of {self.name} is marked as deleted; `kubealign history --repair`"
                " restores it"
            )
        params: dict[str, str] = run.data.params
        return dict(params)


RESTORE = (
    "`kubealign history --repair` looks for what is left of it; else restore MLflow from a backup, or begin a new"
    " history with `kubealign history --begin --reason …`"
)


def has_versions(client: Any, name: str) -> bool:
    """Whether a registered model has versions."""
    # With authentication on, MLflow answers 403 for a model that does not exist; a search is allowed.
    return bool(client.search_model_versions(f"name = '{name}'", max_results=1))


def newest_version(client: Any, name: str) -> int:
    """The highest number of a registered model's versions; 0 without one."""
    return max((int(version.version) for version in client.search_model_versions(f"name = '{name}'")), default=0)


def next_use(decisions: list[str], decision: str) -> int:
    """Number of a decision on its test set: the recorded one if it was made before, else the next."""
    return decisions.index(decision) + 1 if decision in decisions else len(decisions) + 1


def shortened(reason: str) -> str:
    """A reason, at most MAX_REASON bytes of it."""
    return reason.encode()[:MAX_REASON].decode(errors="ignore")


def _champions(chain: list[Entry]) -> list[ChampionRecord]:
    made = [entry for entry in chain if entry.kind == "champion"]
    return [ChampionRecord(number, by=e.by, at=e.at, **e.facts) for number, e in enumerate(made, start=1)]


def _decisions(made: list[DecisionRecord], test_set: str) -> list[str]:
    by_index = {record.index: record.decision for record in made if record.test_set == test_set}
    return [by_index[index] for index in sorted(by_index)]


def _entry_text(body: dict[str, Any], proof: str) -> str:
    """An entry as it stands in MLflow, readable by people."""
    return json.dumps({**body, "signature": proof}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _no_history(name: str, why: str) -> str:
    return (
        f"{name} has versions but no signed history ({why}), so neither its champion nor the uses of its test sets are"
        f" known; {RESTORE}, which a model of kubealign 0.1 also needs"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pointer_name(name: str) -> str:
    """Name of the experiment whose tag names the audit run of a registered model."""
    return f"{store.EXPERIMENT}-audit/{name}"


def _user() -> str:
    return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
