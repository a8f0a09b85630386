"""Who is champion: claims, races, crashes, rollback; on a real MLflow."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.common.errors import ChampionChangedError, InputError, KubealignError
from components.registry.audit import Audit, next_use, pointer_name
from components.registry.champion import (
    ROLLED_BACK,
    champion_alias,
    champion_version,
    promote,
    reconcile_alias,
    rollback,
)
from components.registry.repair import next_repair
from components.tracking import store
from pipelines.cli import app
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
    with pytest.raises(KubealignError, match="is marked as deleted; `kubealign history --repair`"):
        promote(client, NAME, "2", "gate", "", expected="1")
    assert repaired(client) == [f"the audit run {audit.run_id} was deleted: restore it"]
    assert promote(client, NAME, "2", "gate", "", expected="1").number == 2


def repaired(client: Any) -> list[str]:
    """What was wrong, all of it mended."""
    sentences = []
    while found := next_repair(client, NAME):
        sentences.append(found.sentence)
        found.do()
    return sentences


def made_anew(client: Any, n: int) -> None:
    """The registered model is deleted, and made again by somebody with versions of their own."""
    run_id = client.get_model_version(NAME, "1").run_id
    client.delete_registered_model(NAME)
    client.create_registered_model(NAME)
    for _ in range(n):
        client.create_model_version(NAME, f"runs:/{run_id}/model", run_id=run_id)


def test_a_version_of_the_same_number_is_not_the_champion_of_before(client: Any) -> None:
    promote(client, NAME, "1", "gate", "", expected="")
    promote(client, NAME, "2", "gate", "", expected="1")
    made_anew(client, 3)
    assert champion_version(Audit.find(client, NAME)) == "" == champion_alias(client, NAME)
    with pytest.raises(InputError, match=r"no champion now \(version 2 was deleted, and another one made with its num"):
        rollback(client, NAME, "x", accepted)
    promote(client, NAME, "3", "promote", "", expected="")
    with pytest.raises(InputError, match="version 2, is no longer in the registry"):
        rollback(client, NAME, "x", accepted)
    assert champion_alias(client, NAME) == "3"


def test_a_champion_of_a_history_that_knows_no_times_is_known_by_its_number(client: Any) -> None:
    """As in histories that were written before times were recorded."""
    audit = Audit.open(client, NAME, RULES)
    facts = {"version": "2", "how": "gate", "reason": "", "run": "", "statement": "", "removed": ""}
    assert audit._append(audit.entries(), "champion", facts)
    assert champion_version(audit) == "2" and reconcile_alias(audit) and champion_alias(client, NAME) == "2"


def alias_of_a_deleted_version(client: Any, version: str) -> None:
    """As MLflow before 3.10 leaves it, which keeps the aliases of a version that is deleted."""
    client.delete_model_version(NAME, version)
    with closing(sqlite3.connect(store.home() / "mlflow.db")) as database, database:
        insert = "INSERT INTO registered_model_aliases (name, alias, version) VALUES (?, 'champion', ?)"
        database.execute(insert, (NAME, int(version)))


def test_an_alias_of_a_deleted_version_stops_nothing(client: Any) -> None:
    promote(client, NAME, "2", "gate", "", expected="")
    alias_of_a_deleted_version(client, "2")
    assert champion_alias(client, NAME) == "2" and champion_version(Audit.find(client, NAME)) == ""
    assert repaired(client) == ["version 2 was deleted: record that there is no champion, and remove its alias"]
    assert champion_alias(client, NAME) == "" and repaired(client) == []
    promote(client, NAME, "3", "gate", "", expected="")
    alias_of_a_deleted_version(client, "3")
    assert promote(client, NAME, "4", "gate", "", expected="").number == 5
    assert champion_alias(client, NAME) == "4"


def test_deleted_experiments_are_an_error_that_names_the_repair(client: Any) -> None:
    promote(client, NAME, "1", "gate", "", expected="")
    experiments = {one.name: one.experiment_id for one in client.search_experiments()}
    for name in (store.EXPERIMENT, pointer_name(NAME)):
        client.delete_experiment(experiments[name])
    with pytest.raises(
        InputError, match=f"{store.EXPERIMENT} was deleted .*`kubealign history --repair`.* restore -x "
    ):
        store.experiment_id(client)
    with pytest.raises(KubealignError, match="`kubealign history --repair`"):
        Audit.find(client, NAME) and versions(client)
    assert [sentence.split(" was")[0] for sentence in repaired(client)] == [
        f"the experiment {store.EXPERIMENT}",
        f"the experiment {pointer_name(NAME)}",
    ]
    assert versions(client) == ["1"] and store.experiment_id(client) == experiments[store.EXPERIMENT]


def test_a_history_that_nothing_points_to_is_found_again(client: Any) -> None:
    """The empty experiment that names it was deleted for good, as `mlflow gc` does."""
    promote(client, NAME, "1", "gate", "", expected="")
    promote(client, NAME, "2", "gate", "", expected="1")
    experiment = client.get_experiment_by_name(pointer_name(NAME)).experiment_id
    with closing(sqlite3.connect(store.home() / "mlflow.db")) as database, database:
        for table in ("experiment_tags", "experiments"):
            database.execute(f"DELETE FROM {table} WHERE experiment_id = ?", (int(experiment),))  # noqa: S608 - ours
    with pytest.raises(KubealignError, match="versions but no signed history .*`kubealign history --repair`"):
        versions(client)
    client.set_registered_model_alias(NAME, "champion", "1")
    found, alias = repaired(client)
    assert "with 3 signed entries" in found and alias == (
        "the alias champion points to version 1: set it to version 2, the champion of the history"
    )
    assert versions(client) == ["1", "2"] and champion_alias(client, NAME) == "2"


def test_the_command_shows_each_repair_and_asks(client: Any) -> None:
    promote(client, NAME, "2", "gate", "", expected="")
    client.set_registered_model_alias(NAME, "champion", "1")
    words = ["history", "--name", NAME, "--repair"]
    refused = CliRunner().invoke(app, words, input="n\n")
    assert refused.exit_code == 1 and "set it to version 2" in refused.output and champion_alias(client, NAME) == "1"
    done = CliRunner().invoke(app, [*words, "--yes"])
    assert "1 repaired" in done.output and champion_alias(client, NAME) == "2", done.output
    assert "nothing to repair" in CliRunner().invoke(app, words).output


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
