"""Nobody's word without proof: whoever may edit a registered model, the experiment or a cache makes no champion, no
verdict and no history. Each attack is one that worked on kubealign 0.1, or a variant of it; on a real MLflow.
"""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.common.errors import EvidenceError, InputError, KubealignError
from components.common.files import read_json, sha256_file, write_json
from components.evaluate.candidates import download_incumbent
from components.gate.rejudge import judge_again
from components.gate.results import SEAL
from components.gate.rules import GateContext, apply_gate
from components.gate.rules_of_model import STRICTER, check_rules, rules_of
from components.register.package import content_digest, write_statement
from components.register.stage import run_register
from components.registry.audit import AUDIT_RUN, Audit
from components.registry.champion import champion_alias
from components.registry.evidence import (
    RESULT_SIGNATURE,
    STATEMENT,
    check_history,
    check_version,
    read_statement,
    result_statement,
)
from components.registry.signing import canonical, opened, signed, statement
from components.resolve.stage import _history
from components.tracking import keys, store
from components.tracking.keys import CACHE_KEY_VARIABLE, PUBLIC_KEYS_VARIABLE, SIGNING_KEY_VARIABLE
from components.tracking.run import stage_run
from components.tracking.store import KFP_RUN_VARIABLE
from components.training.scoring import TokenLogps, _load, _write
from pipelines.local.results import load_result
from pipelines.verification import accept
from tests.conftest import ROOT
from tests.support.component_kit import empty_mlflow, own_home
from tests.support.registry import Shop, cli, named, shop, write_sealed
from tests.support.versions import CONFIG, LENIENT, LINEAGE, with_outcome

__all__ = ["empty_mlflow", "own_home", "shop"]  # an MLflow with its tables made, which takes two seconds

TOOL = ROOT / "tools" / "verify_champion.py"


def pem(key: Any) -> str:
    text: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return text.decode()


@pytest.fixture
def foreign_key() -> Any:
    """A key that nobody trusts."""
    return ec.generate_private_key(ec.SECP256R1())


def artifacts_of(version: str) -> Path:
    """The folder in which the store keeps a version's files: an EDIT user may write to it."""
    client = store.client()
    source = client.get_model_version("m", version).source
    logged = client.get_logged_model(source.removeprefix("models:/"))
    return Path(urlparse(logged.artifact_location).path)


def planted(folder: Path, tags: dict[str, str] | None = None, name: str = "m") -> str:
    """A version that an EDIT user makes of a folder of his."""
    client = store.client()
    run = client.create_run(store.experiment_id(client)).info.run_id
    client.log_artifacts(run, str(folder), "model")
    return str(client.create_model_version(name, f"runs:/{run}/model", run_id=run, tags=tags or {}).version)


def exported(folder: Path, version: str = "1") -> Path:
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/m/{version}", dst_path=str(folder)))


def refused(*words: str) -> str:
    """The message with which a command refuses."""
    done = named(*words)
    assert done.exit_code and isinstance(done.exception, KubealignError), (done.output, done.exception)
    return str(done.exception)


PASSED = {"kubealign.passed": "true", "kubealign.verdict": "better", "kubealign.incumbent": ""}


# Promotion of what nothing proves (S4)


def test_a_text_file_with_the_tags_of_a_passed_model_is_not_promoted_not_even_by_force(
    shop: Shop, tmp_path: Path
) -> None:
    shop.register(better=False)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.txt").write_text("a model, they say")
    version = planted(tmp_path / "x", PASSED)
    assert f"m version {version}: no {STATEMENT}, so nothing proves what it is" in refused("promote", version)
    assert "nothing proves" in refused("promote", version, "--force", "--reason", "trust me")
    assert "nothing proves" in refused("promote", version, "--to", "prod", "--force", "--reason", "trust me")
    assert champion_alias(store.client(), "m") == ""


def test_tags_make_no_model_pass(shop: Shop) -> None:
    shop.register(better=False)
    for key, value in PASSED.items():
        store.client().set_model_version_tag("m", "1", key, value)
    assert "did not pass the gate: no evidence" in refused("promote", "1")


def test_a_statement_beside_other_files_or_in_another_model_proves_nothing(shop: Shop, tmp_path: Path) -> None:
    shop.register()
    good = exported(tmp_path / "good")
    (good / "registered_model_meta").unlink()
    changes = {
        "artifacts/model/model.safetensors changed": lambda f: (
            f / "artifacts" / "model" / "model.safetensors"
        ).write_bytes(b"backdoored weights"),
        "artifacts/run_me.py is not in the manifest": lambda f: (f / "artifacts" / "run_me.py").write_text("boom"),
        "artifacts/verdict.json is missing": lambda f: (f / "artifacts" / "verdict.json").unlink(),
    }
    for number, (why, change) in enumerate(changes.items()):
        folder = shutil.copytree(good, tmp_path / f"bad{number}")
        change(folder)
        assert why in refused("promote", planted(folder, PASSED))
    store.client().create_registered_model("n")
    shop.register(name="two", model="other", decision="ii")
    assert "about the registered model m, not this one" in str(
        cli("promote", planted(good, PASSED, "other"), "--name", "other").exception
    )


def test_a_signature_of_a_key_that_is_not_trusted_is_none(shop: Shop, tmp_path: Path, foreign_key: Any) -> None:
    shop.register(better=False)
    folder = exported(tmp_path / "v")
    (folder / "registered_model_meta").unlink()
    evidence = read_statement(folder, "m version 1")
    judgement = {**evidence.judgement, "passed": True, "verdict": "better"}
    (folder / STATEMENT).write_bytes(
        signed(statement(evidence.files, "urn:kubealign:judgement:1", judgement), foreign_key)
    )
    assert "which is not trusted here" in refused("promote", planted(folder, PASSED))
    envelope = json.loads((folder / STATEMENT).read_bytes())
    envelope["signatures"][0]["keyid"] = keys.key_id(keys.signing_key().public_key())
    (folder / STATEMENT).write_bytes(canonical(envelope))
    assert "the signature is not that of key" in refused("promote", planted(folder, PASSED))
    (folder / STATEMENT).write_bytes(b"{}")
    assert "not a signed statement" in refused("promote", planted(folder, PASSED))


def test_a_rolled_back_model_does_not_come_back_as_a_new_version_or_without_its_tag(shop: Shop, tmp_path: Path) -> None:
    shop.register()
    shop.register(name="two", decision="ii", decision_index=2, incumbent="models:/m/1")
    assert named("rollback", "--reason", "it is rude").exit_code == 0
    client = store.client()
    client.delete_model_version_tag("m", "2", "kubealign.rolled_back")
    assert "it is rude" in refused("promote", "2")
    folder = exported(tmp_path / "v", "2")
    (folder / "registered_model_meta").unlink()
    assert "it is rude" in refused("promote", planted(folder))
    assert champion_alias(client, "m") == "1"


def test_numbers_that_do_not_follow_from_the_scores_are_refused_even_when_signed(shop: Shop, tmp_path: Path) -> None:
    """As if register itself had been fooled once."""
    shop.register(better=False)
    folder = exported(tmp_path / "v")
    path = folder / "artifacts" / "evaluation.json"
    evaluation = read_json(path)
    evaluation["comparisons"]["sft"] |= {"p_value": 0.001}
    write_json(path, evaluation)
    evidence = read_statement(folder, "m version 1")
    (folder / STATEMENT).unlink()
    (folder / "model.sig").unlink()
    files = {name: value for name, value in evidence.files.items() if name != "model.sig"}
    files |= {"artifacts/evaluation.json": sha256_file(path)}
    write_statement(folder, "m", files, {**evidence.judgement, "passed": True, "verdict": "better"})  # type: ignore[typeddict-item]
    (folder / "registered_model_meta").unlink()
    version = planted(folder)
    audit = Audit.find(store.client(), "m")
    assert audit and audit.claim_decision("cc", 1, "hh", version, sha256_file(folder / STATEMENT))
    assert "p_value is 0.001, but the scores of the pairs give 1" in refused("promote", version)


# Code that comes with a model (S5)

PWNED = """
import pathlib, mlflow
pathlib.Path({marker!r}).write_text("pwned")
class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return []
mlflow.models.set_model(Model())
"""


def test_verify_and_evaluate_run_no_code_of_a_model_that_is_not_ours(shop: Shop, tmp_path: Path) -> None:
    import mlflow

    shop.register()
    client, marker = store.client(), tmp_path / "pwned"
    code = tmp_path / "evil.py"
    code.write_text(PWNED.format(marker=str(marker)))
    with mlflow.start_run(experiment_id=store.experiment_id(client)):
        logged = mlflow.pyfunc.log_model(name="model", python_model=str(code), pip_requirements=["mlflow"])
    assert marker.exists(), "logging runs it, on the attacker's machine"
    marker.unlink()
    made = client.create_model_version("m", logged.model_uri, tags=PASSED, model_id=logged.model_id)
    version = str(made.version)
    client.set_registered_model_alias("m", "challenger", version)
    assert "nothing proves what it is" in str(cli("verify", "models:/m@challenger").exception)
    with pytest.raises(EvidenceError, match="nothing proves what it is"):
        download_incumbent(f"models:/m/{version}")
    assert "nothing proves" in refused("promote", version)
    ours = artifacts_of("1") / "chat_model.py"
    ours.write_text(code.read_text())
    assert "chat_model.py changed" in str(cli("verify", "models:/m/1").exception)
    with pytest.raises(EvidenceError, match=r"chat_model.py changed"):
        download_incumbent("models:/m/1")
    assert not marker.exists()


@pytest.mark.parametrize("how", ["MLmodel", "python_model.pkl", "sitecustomize.py", "link"])
def test_verify_stops_before_anything_else_that_would_run(shop: Shop, tmp_path: Path, how: str) -> None:
    shop.register()
    folder = artifacts_of("1")
    if how == "MLmodel":
        text = (folder / how).read_text()
        (folder / how).write_text(text.replace("mlflow.pyfunc.loaders.code_model", "os"))
    elif how == "link":
        (tmp_path / "c.py").write_bytes((folder / "chat_model.py").read_bytes())
        (folder / "chat_model.py").unlink()
        (folder / "chat_model.py").symlink_to(tmp_path / "c.py")
    else:
        (folder / how).write_text("boom")
    if how == "link":  # a download follows it; a folder on disk is refused
        with pytest.raises(EvidenceError, match=r"chat_model.py is a link"):
            check_version(store.client(), "m", "1", folder)
        return
    assert how in str(cli("verify", "models:/m/1").exception)


def test_loading_for_the_logits_uses_transformers_and_not_the_models_code(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.register()

    def never(*words: Any, **more: Any) -> None:
        raise AssertionError("pyfunc runs the code of the model")

    monkeypatch.setattr("mlflow.pyfunc.load_model", never)
    assert cli("verify", "models:/m/1").exit_code == 0


# Versions planted before the pipeline registers (S6)


def test_a_planted_version_is_passed_over_and_ours_is_registered_and_promoted(shop: Shop, tmp_path: Path) -> None:
    judged = shop.judged("one", True, LINEAGE)
    shop.register(better=False, name="zero", decision="zz", test_set="other")
    tag = {"kubealign.model": content_digest(judged.policy, "merged"), **PASSED}
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "model.safetensors").write_text("backdoored weights")
    planted(tmp_path / "p", tag)
    genuine = exported(tmp_path / "g", "1")
    (genuine / "registered_model_meta").unlink()
    planted(genuine, tag)  # a genuine one, but of other weights and another decision
    (genuine / "artifacts" / "model" / "model.safetensors").write_bytes(b"backdoored weights")
    planted(genuine, tag)
    found = shop.register()
    assert found["version"] == "5" and found["decided"]["state"] == "promoted"
    assert cli("verify", "models:/m@champion").exit_code == 0


def test_a_planted_base_model_is_passed_over(shop: Shop, tmp_path: Path) -> None:
    from components.training.documents import read_dpo_training

    judged = shop.judged("one", True, LINEAGE)
    client = store.client()
    client.create_registered_model("m-base")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_text("backdoored weights")
    content = read_dpo_training(judged.policy)["base_digest"]
    planted(tmp_path / "b", {"kubealign.base_content": content}, "m-base")
    shop.register(kind="adapter")
    base = read_json(artifacts_of("1") / "artifacts" / "base.json")
    assert base["reference"] == "models:/m-base/2"
    assert cli("verify", "models:/m/1").exit_code == 0


def test_a_base_model_of_ours_that_was_changed_in_the_registry_is_not_fetched(
    shop: Shop, tmp_path: Path, foreign_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.config.data import DataConfig
    from components.fetch import stage

    shop.register()
    fetch = partial(stage._fetch_base, DataConfig(), expected="")
    fetch(reference="models:/m/1", out=tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    good = exported(tmp_path / "good")
    weights = artifacts_of("1") / "artifacts" / "model" / "model.safetensors"
    kept = weights.read_bytes()
    for change, why in (
        (lambda: weights.write_bytes(b"backdoored"), r"model\.safetensors changed: not what was registered"),
        (lambda: weights.with_name("model-00001-of-00001.safetensors").write_bytes(b"x"), "is not in the manifest"),
    ):
        change()
        with pytest.raises(EvidenceError, match=why):
            fetch(reference="models:/m/1", out=tmp_path / "never")
        weights.write_bytes(kept)
        if planted_file := next(weights.parent.glob("model-0*"), None):
            planted_file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "check_files", lambda *_: None)
        weights.write_bytes(b"backdoored")
        fetch(reference="models:/m/1", out=tmp_path / "unguarded")
        weights.write_bytes(kept)
    monkeypatch.setenv(PUBLIC_KEYS_VARIABLE, keys.public_line(foreign_key.public_key()))
    with pytest.raises(EvidenceError, match="which is not trusted here"):
        fetch(reference="models:/m/1", out=tmp_path / "never")
    plain = planted(good / "artifacts" / "model", name="m")  # a model of somebody else, without a statement
    fetch(reference=f"models:/m/{plain}", out=tmp_path / "plain")
    assert not (tmp_path / "never").exists()


def test_a_version_that_changed_between_two_attempts_of_a_run_is_not_taken_up(shop: Shop) -> None:
    first = shop.register(better=False)
    (artifacts_of("1") / "artifacts" / "README.md").write_text("another card")
    second = shop.register(better=False)
    assert (first["version"], second["version"]) == ("1", "2")


# The history (S8)


def history(client: Any, name: str = "m") -> Audit:
    audit = Audit.find(client, name)
    assert audit
    return audit


def moved(client: Any, params: dict[str, str], name: str = "m") -> str:
    """The pointer moved to a fresh run with these parameters, as an EDIT user of the audit experiment can."""
    run = client.create_run(store.experiment_id(client)).info.run_id
    for key, value in params.items():
        client.log_param(run, key, value)
    experiment = client.get_experiment_by_name(f"kubealign-audit/{name}")
    client.set_experiment_tag(experiment.experiment_id, AUDIT_RUN, run)
    return run


def params_of(client: Any, run_id: str) -> dict[str, str]:
    params: dict[str, str] = client.get_run(run_id).data.params
    return {key: params[key] for key in sorted(params, key=lambda key: int(key.partition(".")[2]))}


@pytest.fixture
def two(shop: Shop) -> Shop:
    """A champion, and a second decision on the same test set."""
    shop.register()
    shop.register(better=False, name="two", decision="ii", decision_index=2, incumbent="models:/m/1")
    return shop


def assert_nothing_goes_on(two: Shop, why: str) -> None:
    """The whole pipeline refuses: before the training, at the registration, and every command."""
    client = store.client()
    with stage_run("resolve", {}) as run, pytest.raises(EvidenceError, match=why):
        config = CONFIG.model_copy(update={"register_": CONFIG.register_.model_copy(update={"name": "m"})})
        _history(run, config)
    with pytest.raises(EvidenceError, match=why):
        two.register(name="three", decision="kk", decision_index=1, test_set="dd")
    for words in (("history",), ("promote", "1"), ("promote", "2", "--force", "--reason", "x")):
        found = named(*words)
        assert found.exit_code and isinstance(found.exception, EvidenceError), (words, found.exception)
    assert len(client.search_model_versions("name = 'm'")) == 2


def test_a_pointer_to_a_fresh_run_does_not_begin_the_history_anew(two: Shop) -> None:
    moved(store.client(), {})
    assert_nothing_goes_on(two, "m has versions but no signed history")


def test_a_renamed_experiment_does_not_begin_the_history_anew(two: Shop) -> None:
    client = store.client()
    client.rename_experiment(client.get_experiment_by_name("kubealign-audit/m").experiment_id, "gone")
    assert_nothing_goes_on(two, "m has versions but no signed history")


def test_a_copied_or_shortened_chain_in_another_run_is_refused(two: Shop) -> None:
    client = store.client()
    chain = params_of(client, history(client).run_id)
    moved(client, dict(list(chain.items())[:2]))
    assert_nothing_goes_on(two, "from another place in another history \\(audit run")


def test_the_chain_of_another_model_is_refused(two: Shop) -> None:
    client = store.client()
    two.register(name="four", model="n")
    other = history(client, "n").run_id
    experiment = client.get_experiment_by_name("kubealign-audit/m")
    client.set_experiment_tag(experiment.experiment_id, AUDIT_RUN, other)
    with pytest.raises(EvidenceError, match="from another place in another history \\(model 'n'"):
        history(client).entries()


def in_the_database(home: Path, statement: str, *values: str) -> None:
    """What only an administrator of MLflow's database can do."""
    with sqlite3.connect(home / "mlflow.db") as database:
        assert database.execute(statement, values).rowcount > 0


def test_a_chain_cut_in_the_database_or_by_an_old_backup_is_refused(two: Shop, own_home: Path) -> None:
    client = store.client()
    last = list(params_of(client, history(client).run_id))[-1]
    in_the_database(own_home, "DELETE FROM params WHERE key = ?", last)
    names = [f"entry.{number}" for number in (3, 2)]
    history(client).entries()
    for name in names:
        in_the_database(own_home, "DELETE FROM params WHERE key = ?", name)
    with pytest.raises(EvidenceError, match="is shorter than m version 2 knows"):
        check_history(client, history(client))
    assert "is shorter than" in str(named("history").exception)


def test_an_entry_that_is_edited_missing_or_added_is_refused(two: Shop, own_home: Path) -> None:
    client = store.client()
    audit = history(client)
    before = params_of(client, audit.run_id)
    third = before["entry.3"]

    def changed(text: str) -> None:
        in_the_database(own_home, "UPDATE params SET value = ? WHERE key = 'entry.3'", text)

    assert json.loads(third)["kind"] == "champion"
    for text, why in (
        (third.replace('"how":"gate"', '"how":"promote"'), "the signature is not that of key"),
        (f" {third}", "changed since it was signed"),
        (before["entry.2"], r"another place in another history \(number 2, expected '3'|another history \(number"),
        ("nonsense", "not a signed entry"),
    ):
        changed(text)
        with pytest.raises(EvidenceError, match=why):
            audit.entries()
    changed(third)
    client.log_param(audit.run_id, "entry.9", "junk")
    with pytest.raises(EvidenceError, match=r"entry.5: missing, but entry.9 is there"):
        audit.entries()


def test_an_entry_of_a_foreign_key_is_neither_read_nor_written(
    two: Shop, foreign_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = store.client()
    own = keys.public_line(keys.signing_key().public_key())
    monkeypatch.setenv(PUBLIC_KEYS_VARIABLE, own)
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, pem(foreign_key))
    before = history(client).entries()
    assert "which is not trusted here" in refused("promote", "2", "--force", "--reason", "mine now")
    assert "which is not trusted here" in refused("rules", "--reason", "mine now")
    with pytest.raises(InputError, match="is not among register.public_keys"):
        two.register(name="three", decision="kk", decision_index=3, incumbent="models:/m/1")
    assert history(client).entries() == before
    monkeypatch.setenv(PUBLIC_KEYS_VARIABLE, keys.public_line(foreign_key.public_key()))
    assert "which is not trusted here" in str(named("history").exception)
    monkeypatch.setenv(PUBLIC_KEYS_VARIABLE, f"{own}, {keys.public_line(foreign_key.public_key())}")
    assert named("promote", "2", "--force", "--reason", "two keys").exit_code == 0, "a person's key beside register's"
    assert named("history").exit_code == 0


def test_a_history_begins_again_only_by_a_person_who_says_why_and_forgets_what_was_before(
    two: Shop, tmp_path: Path
) -> None:
    client = store.client()
    assert "has a history already" in refused("history", "--begin", "--reason", "why not")
    old = history(client).run_id
    moved(client, {})
    assert "say why with --reason" in refused("history", "--begin")
    done = named("history", "--begin", "--reason", "the old one is lost")
    assert done.exit_code == 0, done.exception
    assert history(client).entries()[0].facts["reason"] == "the old one is lost"
    assert "which the history of m" in refused("promote", "1"), "judged in another history"
    history(client).set_rules(rules_of(LENIENT, answers=False), "the shop's")
    assert two.register(name="five", decision="kk")["decided"]["state"] == "promoted"
    experiment = client.get_experiment_by_name("kubealign-audit/m")
    client.set_experiment_tag(experiment.experiment_id, AUDIT_RUN, old)
    assert "is shorter than m version 3 knows" in str(named("history").exception), "the old one does not come back"


# Results that CI reads (S9)


def finished(shop: Shop) -> tuple[Any, dict[str, Any]]:
    """The run that register made is its own parent here."""
    found = shop.register(better=False)
    client = store.client()
    for name, value in (("kubealign.kind", "pipeline"), ("kubealign.version", found["model_uri"])):
        client.set_tag(found["run_id"], name, value)
    return client, found


def forged(client: Any, texts: dict[str, str]) -> str:
    run_id: str = client.create_run(store.experiment_id(client), tags={"kubealign.kind": "pipeline"}).info.run_id
    for name, text in texts.items():
        client.log_text(run_id, text, name)
    return run_id


def test_a_result_is_believed_if_register_signed_it_for_this_run(shop: Shop, foreign_key: Any) -> None:
    import mlflow

    client, found = finished(shop)
    assert load_result(found["run_id"])["verdict"]["verdict"] == "no evidence"
    names = ("result.json", "report.html", RESULT_SIGNATURE)
    texts = {name: mlflow.artifacts.load_text(f"runs:/{found['run_id']}/{name}") for name in names}
    better = texts["result.json"].replace("no evidence", "better").replace('"passed": false', '"passed": true')
    unsigned = {name: texts[name] for name in names[:2]}
    with pytest.raises(EvidenceError, match="so nothing proves how it ended"):
        load_result(forged(client, unsigned | {"result.json": better}))
    with pytest.raises(EvidenceError, match="about another run, or its result or report was changed"):
        load_result(forged(client, texts))  # a genuine one, of another run
    script = texts | {"report.html": "<script>alert(1)</script>"}
    for name in names[:2]:
        client.log_text(found["run_id"], (script | {"result.json": better})[name], name)
        with pytest.raises(EvidenceError, match="its result or report was changed"):
            load_result(found["run_id"])
        client.log_text(found["run_id"], texts[name], name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SIGNING_KEY_VARIABLE, pem(foreign_key))
        files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in unsigned.items()}
        mine = result_statement(found["run_id"], files).decode()
    client.log_text(found["run_id"], mine, RESULT_SIGNATURE)
    with pytest.raises(EvidenceError, match="which is not trusted here"):
        load_result(found["run_id"])


# Evaluations of something else (S10)


def registered(shop: Shop, judged: Any, **lineage: Any) -> dict[str, Any]:
    config = CONFIG.register_.model_copy(update={"name": "m"})
    made = LINEAGE.__class__(**vars(LINEAGE) | lineage)
    return dict(run_register(config, LENIENT, made, shop.runs, judged, shop.folder / "result.json"))


@pytest.mark.parametrize(
    ("lineage", "why"),
    [
        ({"test_set": "another"}, "judged with test_set 'cc', expected 'another'"),
        ({"incumbent": "models:/m/7"}, "judged with incumbent '', expected 'models:/m/7'"),
        ({"decision_index": 2}, "judged with decision_index 1, expected 2"),
        ({"data_clean": False}, "judged with data_clean True, expected False"),
    ],
)
def test_an_evaluation_counts_for_its_own_question_alone(shop: Shop, lineage: dict[str, Any], why: str) -> None:
    with pytest.raises(EvidenceError, match=why):
        registered(shop, shop.judged("one", True, LINEAGE), **lineage)
    assert not store.client().search_registered_models()


def test_an_evaluation_on_other_pairs_or_of_another_base_is_refused(shop: Shop, tmp_path: Path) -> None:
    from dataclasses import replace

    from components.common.files import write_manifest

    judged = shop.judged("one", True, LINEAGE)
    for split in ("test", "validation"):
        dataset = shutil.copytree(judged.dataset, tmp_path / split)
        with (dataset / "preferences" / f"{split}.jsonl").open("a") as file:
            file.write("\n")
        with pytest.raises(EvidenceError, match=f"judged with {split}_sha256"):
            registered(shop, replace(judged, dataset=dataset))
    base = shutil.copytree(judged.base, tmp_path / "base")
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    write_manifest(base)
    with pytest.raises(EvidenceError, match="judged with base"):
        registered(shop, replace(judged, base=base))


def test_an_evaluation_that_no_step_of_ours_sealed_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = shop.judged("one", True, LINEAGE)
    path = judged.evaluation / "evaluation.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(EvidenceError, match="no step of this pipeline sealed it"):
        registered(shop, judged)
    path.write_text(text)
    (judged.evaluation / SEAL).unlink()
    with pytest.raises(EvidenceError, match="no step of this pipeline sealed it"):
        registered(shop, judged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_KEY_VARIABLE, "of whoever else writes to the volume")
        write_sealed(judged.evaluation, read_json(path))
    with pytest.raises(EvidenceError, match="no step of this pipeline sealed it"):
        registered(shop, judged)


@pytest.mark.parametrize("change", ["improvement", "p_value", "regression_p", "margins", "no pairs"])
def test_invented_numbers_with_a_fitting_verdict_are_refused_even_when_sealed(shop: Shop, change: str) -> None:
    judged = shop.judged("one", False, LINEAGE)
    found = read_json(judged.evaluation / "evaluation.json")
    comparison = found["comparisons"]["sft"]
    if change == "improvement":
        comparison["improvement"] |= {"value": 99.0, "low": 98.0, "high": 100.0}
    elif change == "p_value":
        comparison["p_value"] = 1e-4
    elif change == "regression_p":
        comparison["regression_p"] = {"en": 0.9, "zh": 0.8}
    elif change == "margins":
        found["held_out"][0]["margins"]["policy"] += 50.0
    else:
        found["held_out"] = []
    write_sealed(judged.evaluation, found)
    write_json(judged.evaluation / "verdict.json", apply_gate(found, GateContext("", 1, True), LENIENT))
    with pytest.raises(EvidenceError, match=r"comparisons\.sft\.|is not compared with"):
        registered(shop, judged)


def test_an_incumbent_that_was_never_champion_is_no_incumbent(shop: Shop) -> None:
    shop.register(better=False)
    with pytest.raises(EvidenceError, match="which was never champion"):
        shop.register(name="two", decision="ii", decision_index=2, incumbent="models:/m/1")


def test_what_evaluate_writes_is_derived_again_from_its_scores(shop: Shop) -> None:
    """Of the real stage, without a change."""
    from tests.support.component_kit import load_config
    from tests.support.stages import SETTINGS

    gate = load_config(ROOT / "params.yaml", SETTINGS).gate
    evaluation = read_json(shop.chain.evaluation / "evaluation.json")
    assert judge_again(evaluation, GateContext("", 1, True), gate, "x") == read_json(
        shop.chain.evaluation / "verdict.json"
    )


# The gate's rules


LOOSER = {
    "alpha": 0.495,
    "min_pairs": 0,
    "max_policy_loss": 9.1,
    "max_kl": 2e9,
    "min_length_ratio": -0.1,
    "max_length_ratio": 2e9,
    "max_repetition_increase": 1.1,
    "max_language_regression": 9.1,
    "language_alpha": 0.04,
    "require_committed_data": False,
}


def test_a_run_may_have_stricter_rules_than_the_registered_model_and_no_looser_one() -> None:
    rules = rules_of(LENIENT, answers=True)
    assert LOOSER.keys() == STRICTER.keys() == type(LENIENT).model_fields.keys() - {"test", "margin"}
    for key, value in LOOSER.items():
        with pytest.raises(InputError, match=f"gate.{key}={value} is looser than the rule of the registered model m"):
            check_rules(rules, LENIENT.model_copy(update={key: value}), True, "m")
        stricter = getattr(LENIENT, key) + (getattr(LENIENT, key) - value) / 2
        check_rules(rules, LENIENT.model_copy(update={key: stricter}), True, "m")
    with pytest.raises(InputError, match="non-inferiority with margin 100 is looser"):
        check_rules(rules, LENIENT.model_copy(update={"test": "non-inferiority", "margin": 100.0}), True, "m")
    check_rules(rules, LENIENT.model_copy(update={"margin": 0.1}), True, "m")
    with pytest.raises(InputError, match="evaluate.generations_per_language=0 is looser"):
        check_rules(rules, LENIENT, False, "m")


def test_looser_rules_are_refused_before_the_training_and_at_the_registration(shop: Shop) -> None:
    shop.register(better=False)
    loose = LENIENT.model_copy(update={"min_pairs": 1, "alpha": 0.495})
    judged = shop.judged("two", True, LINEAGE)
    found = read_json(judged.evaluation / "evaluation.json")
    write_json(judged.evaluation / "verdict.json", apply_gate(found, GateContext("", 1, True), loose))
    config = CONFIG.register_.model_copy(update={"name": "m"})
    with pytest.raises(InputError, match=r"gate.alpha=0.495 is looser"):
        run_register(config, loose, LINEAGE, shop.runs, judged, shop.folder / "result.json")
    whole = CONFIG.model_copy(update={"gate": loose, "register_": config})
    with stage_run("resolve", {}) as run, pytest.raises(InputError, match=r"gate.alpha=0.495 is looser"):
        _history(run, whole)


def test_the_rules_change_by_a_signed_entry_and_hold_for_what_was_judged_before(shop: Shop) -> None:
    shop.register()
    shown = named("rules")
    assert "alpha: 0.49" in shown.output
    changed = named("rules", "--reason", "as strict as the shipped ones")
    assert changed.exit_code == 0 and "alpha: 0.05" in changed.output and "min_pairs: 50" in changed.output
    assert history(store.client()).entries()[-1].facts["reason"] == "as strict as the shipped ones"
    assert "is looser than the rule" in refused("promote", "1")


# By force


def test_force_is_signed_with_its_reason_and_shown_as_such_everywhere(shop: Shop) -> None:
    client = store.client()
    shop.register(better=False)
    done = named("promote", "1", "--force", "--reason", "the board said so")
    assert done.exit_code == 0 and "by force: the board said so" in done.output
    entry = history(client).entries()[-1]
    assert entry.facts["how"] == "force" and entry.facts["reason"] == "the board said so"
    client.delete_model_version_tag("m", "1", "kubealign.forced")
    assert "force" in named("history").output
    shown = " ".join(cli("verify", "models:/m@champion").output.split())
    assert "warn" in shown and "promoted by force" in shown and "the board said so" in shown
    assert named("promote", "1", "--to", "prod").exit_code == 0
    there = " ".join(cli("verify", "models:/prod@champion").output.split())
    assert "promoted by force" in there and "the board said so" in there


# Caches (point 4)


def test_log_probs_that_another_user_of_the_volume_left_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "key.safetensors"
    logps = TokenLogps(np.array([-1.0, -2.0], dtype=np.float32), np.array([[1, 1]]))
    _write(path, logps)
    found = _load(path, logps.lengths_EC)
    assert found is not None and found.values_N.tolist() == [-1.0, -2.0]
    shutil.copy(path, tmp_path / "other.safetensors")
    assert _load(tmp_path / "other.safetensors", logps.lengths_EC) is None, "of another model or other pairs"
    values = load_file(path)["logps"] + 1
    save_file({"logps": values}, path, metadata={"sha256": hashlib.sha256(values.tobytes()).hexdigest()})
    assert _load(path, logps.lengths_EC) is None, "as 0.1 would have believed it"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_KEY_VARIABLE, "of whoever else writes to the volume")
        _write(path, TokenLogps(values, logps.lengths_EC))
    assert _load(path, logps.lengths_EC) is None


def test_cached_answers_are_sealed_too(tmp_path: Path) -> None:
    from components.evaluate import answers

    made = answers.Answers([answers.Answer([1], "yes", True)], [answers.Answer([2], "no", True)])
    path = tmp_path / "key.json"

    def write(name: str, **changes: Any) -> Path:
        from dataclasses import asdict

        file = tmp_path / name
        write_json(file, {"seal": keys.seal("key.json", answers._bytes(made)), "answers": asdict(made) | changes})
        return file

    assert answers._load(write("key.json"), 1) == made
    assert answers._load(write("other.json"), 1) is None
    forged_answer = [{"tokens": [9], "text": "nice", "finished": True}]
    assert answers._load(write("key.json", sampled=forged_answer), 1) is None
    path.write_text(path.read_text().replace('"seal"', '"sha256"'))
    assert answers._load(path, 1) is None


# Keys


def test_a_laptops_key_is_made_at_first_use_for_its_owner_alone_and_kept(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    own = keys.key_id(keys.signing_key().public_key())
    path = own_home / keys.KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [*keys.trusted_keys()] == [own]
    assert keys.key_id(keys.signing_key().public_key()) == own
    assert not list(own_home.glob(f".{keys.KEY_FILE}.*"))
    assert own in cli("keys").output
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(path))
    assert keys.key_id(keys.signing_key().public_key()) == own
    assert cli("clean", "all", "--yes").exit_code == 0 and path.exists(), "the registry stays, so its key does"


def test_a_step_in_a_cluster_makes_no_key_and_says_which_secret_it_lacks(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, foreign_key: Any
) -> None:
    monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    monkeypatch.setenv(KFP_RUN_VARIABLE, "run")
    for call, why in (
        (keys.signing_key, "set cluster.signing_secret"),
        (keys.trusted_keys, f"{PUBLIC_KEYS_VARIABLE} is not set"),
        (lambda: keys.seal("x", b""), f"{CACHE_KEY_VARIABLE} is not set"),
    ):
        with pytest.raises(InputError, match=why):
            call()
    assert not (own_home / keys.KEY_FILE).exists()
    monkeypatch.setenv(CACHE_KEY_VARIABLE, "short")
    with pytest.raises(InputError, match="at least 32 random characters"):
        keys.seal("x", b"")
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, "-----BEGIN PRIVATE KEY-----\nnonsense")
    with pytest.raises(InputError, match="no readable private key"):
        keys.signing_key()
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, pem(ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(InputError, match="expected an ECDSA key on P-256"):
        keys.signing_key()
    monkeypatch.setenv(PUBLIC_KEYS_VARIABLE, "bm90IGEga2V5")
    with pytest.raises(InputError, match="`kubealign keys` prints one"):
        keys.trusted_keys()


def test_the_printed_secret_holds_a_key_that_fits_its_public_line() -> None:
    import yaml
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    made = yaml.safe_load(cli("keys", "--secret").output)["stringData"]
    private = load_pem_private_key(made["signing_key"].encode(), None)
    assert keys.public_line(private.public_key()) == made["public_keys"]
    assert len(made["cache_key"]) >= keys.MIN_CACHE_KEY
    keys.read_public_key(made["public_keys"])


def test_a_seal_is_for_one_purpose() -> None:
    assert keys.is_sealed("a", b"data", keys.seal("a", b"data"))
    for other in (("b", b"data"), ("a", b"datum"), ("ad", b"ata")):
        assert not keys.is_sealed(*other, keys.seal("a", b"data"))


def test_a_statement_has_one_form_and_every_other_is_refused() -> None:
    text = signed(statement({"a": "00"}, "urn:x", {"b": 1}), keys.signing_key())
    assert opened(text, "x")["predicate"] == {"b": 1}
    envelope = json.loads(text)
    (signature,) = envelope["signatures"]
    for other in (
        text + b"\n",
        json.dumps(envelope).encode(),
        canonical({**envelope, "more": 1}),
        canonical({**envelope, "signatures": envelope["signatures"] * 2}),
        canonical({**envelope, "payloadType": "text/plain"}),
        canonical({**envelope, "signatures": [signature | {"sig": signature["sig"] + "="}]}),
    ):
        with pytest.raises(EvidenceError):
            opened(other, "x")


# Readers other than ours


def test_the_peers_read_our_signatures(shop: Shop, tmp_path: Path) -> None:
    """OpenSSF model signing and securesystemslib's DSSE."""
    import model_signing
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    shop.register()
    folder, public = exported(tmp_path / "v"), keys.signing_key().public_key()
    key_file = tmp_path / "key.pem"
    key_file.write_bytes(keys.public_pem(public))
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key_file)
    verifier.verify(folder, folder / "model.sig")
    envelope = Envelope.from_dict(json.loads((folder / STATEMENT).read_bytes()))
    key = SSlibKey.from_crypto(public, keyid=keys.key_id(public))
    assert envelope.verify([key], 1) == {key.keyid: key}
    (folder / "artifacts" / "README.md").write_text("another card")
    with pytest.raises(ValueError, match="Signature mismatch"):
        verifier.verify(folder, folder / "model.sig")


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Any]:
    """A Python that can import the standard library and cryptography, and nothing else."""
    import cffi
    import cryptography

    packages = tmp_path / "packages"
    packages.mkdir()
    site = Path(cryptography.__file__).parent.parent
    for found in (Path(cryptography.__file__).parent, Path(cffi.__file__).parent, *site.glob("_cffi_backend*")):
        (packages / found.name).symlink_to(found)
    shutil.copy(TOOL, tmp_path / "verify_champion.py")
    code = f"import runpy, sys; sys.path.append({str(packages)!r}); sys.argv = sys.argv[1:]; " + (
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def run(folder: Path, key: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path / "verify_champion.py"), str(folder)]
        return subprocess.run([*command, "--public-key", key], cwd="/", capture_output=True, text=True, check=False)

    return run


def test_a_stranger_is_convinced_by_the_tool_alone(shop: Shop, bare: Any, tmp_path: Path, foreign_key: Any) -> None:
    assert len(TOOL.read_text().splitlines()) <= 200
    shop.register()
    shop.register(better=False, name="two", decision="ii", decision_index=2, incumbent="models:/m/1")
    champion, other = exported(tmp_path / "v"), exported(tmp_path / "w", "2")
    public = keys.signing_key().public_key()
    done = bare(champion, keys.public_line(public))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "better than sft" in done.stdout and "every rule holds" in done.stdout
    key_file = tmp_path / "key.pem"
    key_file.write_bytes(keys.public_pem(public))
    equal = bare(other, str(key_file))
    assert equal.returncode == 3 and "rules that fail: superiority" in equal.stdout, equal.stdout + equal.stderr
    assert "+0.0000 nats better than incumbent" in equal.stdout
    stranger = bare(champion, keys.public_line(foreign_key.public_key()))
    assert stranger.returncode == 1 and "signed with another key" in stranger.stderr
    (champion / "artifacts" / "extra").write_text("")
    assert "extra is not a file of the statement" in bare(champion, keys.public_line(public)).stderr


def tool() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("verify_champion", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_derives_the_verdict_and_refuses_signed_numbers_that_the_scores_do_not_give(
    shop: Shop, tmp_path: Path
) -> None:
    module = tool()
    from components.engine.objectives import LOSSES

    assert {name for name, loss in LOSSES.items() if loss.per_token} == module.PER_TOKEN
    shop.register()
    evaluation = read_json(exported(tmp_path / "v") / "artifacts" / "evaluation.json")
    gate = LENIENT.model_dump(mode="json")
    random.seed(1)
    for index in range(3):
        noisy = with_outcome(evaluation, "sft", True, LENIENT)
        for kind in ("held_out", "calibration"):
            for pair in noisy[kind]:
                pair["margins"]["policy"] = pair["margins"]["sft"] + random.gauss(0.1 * index, 1.0)
        from components.gate.rejudge import numbers

        ours = numbers(noisy, "sft", LENIENT)
        mean, p_value, regression = module.derive(noisy, "sft", gate)
        assert mean == pytest.approx(ours["improvement.value"], abs=1e-6)
        module.differ("p_value", ours["p_value"], p_value, noisy["bootstrap_resamples"])
        for lang, value in regression.items():
            module.differ(lang, ours[f"regression_p.{lang}"], value, noisy["bootstrap_resamples"])
        with pytest.raises(ValueError, match="the scores give"):
            module.differ("p_value", abs(ours["p_value"] - 0.3), p_value, noisy["bootstrap_resamples"])


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_every_single_byte_of_an_exported_champion_that_is_changed_is_noticed(
    shop: Shop, tmp_path: Path, count: int
) -> None:
    module = tool()
    shop.register()
    folder, key = exported(tmp_path / "v"), keys.signing_key().public_key()
    signed_files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "registered_model_meta")
    assert len(signed_files) > 15
    client, choose = store.client(), random.Random(7)
    check_version(client, "m", "1", folder)
    # A third each: any file, the statement, and by size (which is the weights).
    for number in range(count):
        path = (folder / STATEMENT) if number % 3 == 0 else choose.choice(signed_files)
        content = path.read_bytes()
        if not content:
            continue
        at = choose.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ choose.randrange(1, 256)]) + content[at + 1 :])
        name = f"{path.relative_to(folder)}, byte {at}"
        with pytest.raises(EvidenceError):
            check_version(client, "m", "1", folder)
            pytest.fail(name)
        with pytest.raises(Exception):  # noqa: B017 - the tool's main refuses whatever is raised
            module.check_files(folder, module.read_statement(folder / STATEMENT, key)[1])
            pytest.fail(name)
        path.write_bytes(content)
    accept(client, "m", "1", tmp_path / "again")


def test_public_keys_of_the_project_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign_key: Any
) -> None:
    from pipelines.project import project_folder

    monkeypatch.delenv(PUBLIC_KEYS_VARIABLE, raising=False)
    line = keys.public_line(foreign_key.public_key())
    (tmp_path / "params.yaml").write_text(f"register:\n  public_keys: [{line}]\n")
    project_folder(tmp_path)
    assert os.environ.pop(PUBLIC_KEYS_VARIABLE) == line
