"""Who is champion: claims, races, crashes, rollback; on a real MLflow."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import ChampionChangedError, InputError, KubealignError
from components.registry.audit import Audit, next_use
from components.registry.champion import (
    ROLLED_BACK,
    champion_alias,
    champion_version,
    promote,
    reconcile_alias,
    rollback,
)
from components.tracking import store
from tests.conftest import ROOT
from tests.support.component_kit import empty_mlflow, own_home
from tests.support.services import mlflow_server
from tests.support.versions import NAME, RULES, with_versions

__all__ = ["empty_mlflow", "own_home"]  # an MLflow with its tables made, which takes two seconds


@pytest.fixture
def client(own_home: Path) -> Any:
    return with_versions(store.client(), 4)


def versions(client: Any) -> list[str]:
    audit = Audit.find(client, NAME)
    assert audit
    return [record.version for record in audit.champions()]


def test_a_promotion_is_claimed_and_the_alias_follows(client: Any) -> None:
    first = promote(client, NAME, "2", "gate", "better", expected="")
    assert champion_alias(client, NAME) == "2" and first.number == 1 and first.how == "gate"
    promote(client, NAME, "3", "promote", "because", expected="2")
    assert versions(client) == ["2", "3"] and champion_alias(client, NAME) == "3"
    assert promote(client, NAME, "3", "promote", "again").number == 2, "it is champion already"
    assert versions(client) == ["2", "3"]


def test_a_model_that_was_judged_against_another_champion_is_not_promoted(client: Any) -> None:
    promote(client, NAME, "2", "gate", "", expected="")
    with pytest.raises(ChampionChangedError, match=r"against none \(the SFT model\), .*champion is version 2"):
        promote(client, NAME, "3", "gate", "", expected="")
    assert champion_alias(client, NAME) == "2" and versions(client) == ["2"]


def test_a_claim_is_written_once_whoever_comes_second(client: Any) -> None:
    one, two = Audit.open(client, NAME, RULES), Audit.open(client, NAME, RULES)
    assert one.run_id == two.run_id
    assert one.claim_champion(1, "1", "gate", "") and two.claim_champion(1, "1", "gate", "") is None
    assert one.claim_decision("t", 1, "a") and one.claim_decision("t", 1, "a"), "the same decision is one"
    assert not two.claim_decision("t", 1, "b") and two.decisions("t") == ["a"] and one.test_sets() == {"t": 1}


def test_of_two_who_make_the_audit_run_at_once_both_get_the_same(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looks before the first has made it, and makes one too."""
    first = Audit.open(client, "new", RULES)
    find, looked = Audit.find, []

    def blind_once(client: Any, name: str) -> Audit | None:
        looked.append(name)
        return None if len(looked) == 1 else find(client, name)

    monkeypatch.setattr(Audit, "find", blind_once)
    assert Audit.open(client, "new", RULES).run_id == first.run_id
    query = "tags.`kubealign.kind` = 'audit' AND tags.`kubealign.registered_model` = 'new'"
    audits = client.search_runs([store.experiment_id(client)], query)
    assert [run.info.run_id for run in audits] == [first.run_id], "the other one is deleted again"
    assert [entry.kind for entry in first.entries()] == ["start"]


def test_the_same_decision_keeps_its_number_and_another_gets_the_next() -> None:
    assert [next_use(["a", "b"], decision) for decision in ("a", "b", "c")] == [1, 2, 3]


def accepted(version: str) -> str:
    """Dummy versions have no evidence."""
    return ""


def test_rollback_goes_back_one_champion_at_a_time_and_says_why(client: Any) -> None:
    for version in ("1", "2", "3"):
        promote(client, NAME, version, "promote", "")
    record, gone = rollback(client, NAME, "it insults people", accepted)
    assert (record.version, gone, champion_alias(client, NAME)) == ("2", "3", "2")
    assert "it insults people" in client.get_model_version(NAME, "3").tags[ROLLED_BACK]
    assert rollback(client, NAME, "and this one too", accepted)[0].version == "1"
    with pytest.raises(InputError, match="version 1 is the first champion"):
        rollback(client, NAME, "more", accepted)
    audit = Audit.find(client, NAME)
    assert audit and [(record.version, record.how) for record in audit.champions()][-2:] == [
        ("2", "rollback"),
        ("1", "rollback"),
    ]
    assert audit.champions()[-2].reason == "it insults people"


def test_rollback_after_rollback_and_promotion_skips_what_was_taken_back(client: Any) -> None:
    for version in ("1", "2"):
        promote(client, NAME, version, "promote", "")
    rollback(client, NAME, "2 is bad", accepted)
    promote(client, NAME, "3", "promote", "")
    assert rollback(client, NAME, "3 is bad", accepted)[0].version == "1"


def test_rollback_to_a_version_that_is_gone_or_without_history_is_refused(client: Any) -> None:
    with pytest.raises(InputError, match="nothing to roll back to"):
        rollback(client, NAME, "x", accepted)
    promote(client, NAME, "1", "promote", "")
    promote(client, NAME, "2", "promote", "")
    client.delete_model_version(NAME, "1")
    with pytest.raises(InputError, match="version 1, is no longer in the registry"):
        rollback(client, NAME, "x", accepted)
    assert champion_alias(client, NAME) == "2"


def test_an_alias_moved_by_other_means_makes_no_champion_and_is_put_right(client: Any) -> None:
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(ChampionChangedError, match="the champion is none"):
        promote(client, NAME, "2", "gate", "", expected="1")
    assert champion_alias(client, NAME) == ""
    promote(client, NAME, "2", "gate", "", expected="")
    client.set_registered_model_alias(NAME, "champion", "4")
    with pytest.raises(ChampionChangedError, match="the champion is version 2"):
        promote(client, NAME, "3", "gate", "", expected="4")
    assert versions(client) == ["2"] and champion_alias(client, NAME) == "2"
    client.delete_registered_model_alias(NAME, "champion")
    assert promote(client, NAME, "2", "gate", "", expected="2").number == 1 and champion_alias(client, NAME) == "2"


def test_a_champion_that_was_deleted_leaves_none_and_is_recorded(client: Any) -> None:
    promote(client, NAME, "2", "gate", "", expected="")
    client.delete_model_version(NAME, "2")
    assert champion_version(Audit.find(client, NAME)) == ""
    promote(client, NAME, "3", "gate", "", expected="")
    audit = Audit.find(client, NAME)
    assert audit and [(r.version, r.how) for r in audit.champions()] == [("2", "gate"), ("", "outside"), ("3", "gate")]


CRASH = """
import os, sys
from mlflow import MlflowClient
from components.tracking import store
from components.registry.champion import promote
MlflowClient.set_registered_model_alias = lambda *words: os.kill(os.getpid(), 9)
promote(store.client(), "m", sys.argv[1], "gate", "", expected=sys.argv[2])
"""


def run_code(code: str, *words: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_crash_between_claim_and_alias_is_completed_by_the_next_that_looks(client: Any) -> None:
    promote(client, NAME, "1", "gate", "", expected="")
    process = run_code(CRASH, "2", "1")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert champion_alias(client, NAME) == "1" and versions(client) == ["1", "2"]
    audit = Audit.find(client, NAME)
    assert audit
    last = reconcile_alias(audit)
    assert last and last.version == "2" and champion_alias(client, NAME) == "2"


def test_a_late_alias_of_an_overtaken_promotion_is_put_right_by_itself(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a claim and its alias another promotion comes and goes; afterwards the later one is champion."""
    set_alias = type(client).set_registered_model_alias
    overtaken = []

    def slowly(self: Any, name: str, alias: str, version: str) -> None:
        if version == "2" and not overtaken:
            overtaken.append(version)
            promote(client, NAME, "3", "force", "overtakes")
        set_alias(self, name, alias, version)

    monkeypatch.setattr(type(client), "set_registered_model_alias", slowly)
    promote(client, NAME, "2", "force", "slow")
    assert overtaken and champion_alias(client, NAME) == "3" == versions(client)[-1]


def test_a_deleted_audit_run_is_an_error_that_says_how_to_get_it_back(client: Any) -> None:
    promote(client, NAME, "1", "gate", "", expected="")
    audit = Audit.find(client, NAME)
    assert audit
    client.delete_run(audit.run_id)
    with pytest.raises(KubealignError, match="is marked as deleted; .*`mlflow runs restore"):
        promote(client, NAME, "2", "gate", "", expected="1")
    client.restore_run(audit.run_id)
    assert promote(client, NAME, "2", "gate", "", expected="1").number == 2


RACER = """
import sys
from components.tracking import store
from components.registry.audit import Audit
from components.registry.champion import promote, reconcile_alias
from components.common.errors import ChampionChangedError
client, lost = store.client(), 0
print("ready", flush=True)
sys.stdin.readline()
for version in sys.argv[1].split(","):
    while True:
        last = reconcile_alias(Audit.find(client, "m"))  # judged against the champion of this moment ...
        try:
            promote(client, "m", version, "gate", "", expected=last.version if last else "")
            break
        except ChampionChangedError:  # ... and again against the one that came meanwhile
            lost += 1
print(lost)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with mlflow_server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address


@pytest.mark.integration
@pytest.mark.parametrize("each", [5, pytest.param(20, marks=pytest.mark.long)])
def test_two_pipelines_that_promote_at_the_same_moment_end_in_one_champion(server: str, each: int) -> None:
    client = with_versions(store.client(), 2 * each)
    mine = [[str(number) for number in range(1 + side, 2 * each + 1, 2)] for side in (0, 1)]
    racers = [run_code(RACER, ",".join(numbers)) for numbers in mine]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    audit = Audit.find(client, NAME)
    assert audit
    records = audit.champions()
    assert sorted(int(record.version) for record in records) == list(range(1, 2 * each + 1)), "each was champion once"
    assert all(record.how == "gate" for record in records)
    assert champion_alias(client, NAME) == records[-1].version
    for numbers in mine:
        order = [record.version for record in records if record.version in numbers]
        assert order == numbers
