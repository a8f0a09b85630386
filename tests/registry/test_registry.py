"""The registry as a user meets it: register, promote, verify, reproduce; on real MLflow servers, also on bad days."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from components.common.errors import EvidenceError, InputError, KubealignError
from components.common.files import read_json, write_json, write_manifest
from components.evaluate.candidates import download_incumbent
from components.register.stage import run_register
from components.registry.audit import Audit
from components.registry.champion import champion_alias, promote
from components.registry.evidence import fetch_statement
from components.registry.preconditions import LAST_RUN, check_server
from components.tracking import store
from components.tracking.errors import explain_mlflow_error
from components.tracking.run import stage_run
from pipelines.cli import app
from tests.conftest import ROOT
from tests.support.component_kit import Chain, empty_mlflow, own_home
from tests.support.registry import Shop, cli, named, shop
from tests.support.services import ADMIN, faulty_proxy, mlflow_server_with_users
from tests.support.versions import CONFIG, LENIENT, LINEAGE, with_versions

__all__ = ["empty_mlflow", "own_home", "shop"]  # an MLflow with its tables made, which takes two seconds


def test_a_passed_verdict_promotes_and_the_decision_is_counted_and_shown(shop: Shop) -> None:
    client = store.client()
    found = shop.register()
    assert found["decided"]["state"] == "promoted" and found["aliases"] == ["challenger", "champion"]
    assert client.get_registered_model("m").tags["kubealign.test_uses.cc"] == "1"
    again = shop.register()
    assert again["version"] == found["version"] and again["decided"]["state"] == "already_champion"
    second = shop.register(name="two", better=False, decision="ii", decision_index=2, incumbent="models:/m/1")
    assert second["decided"]["state"] == "gate_failed" and second["aliases"] == ["challenger"]
    shown = named("history").output
    assert "test set cc: 2 decisions" in shown and "gate" in shown


def test_a_decision_number_that_another_run_took_is_no_decision(shop: Shop) -> None:
    shop.register(better=False)
    found = shop.register(name="two", decision="ii")
    assert found["decided"]["state"] == "superseded" and "run again" in found["decided"]["sentence"]
    assert champion_alias(store.client(), "m") == ""


def test_a_champion_that_came_meanwhile_supersedes_the_verdict(shop: Shop) -> None:
    shop.register()
    found = shop.register(name="two", decision="ii", decision_index=2)
    assert found["decided"]["state"] == "superseded" and "the champion is version 1" in found["decided"]["sentence"]
    assert champion_alias(store.client(), "m") == "1"


def test_an_edited_verdict_or_evaluation_or_foreign_policy_registers_nothing(shop: Shop) -> None:
    judged = shop.judged("one", False, LINEAGE)
    config = CONFIG.register_.model_copy(update={"name": "m"})
    out = shop.folder / "result.json"
    verdict = read_json(judged.evaluation / "verdict.json")
    write_json(judged.evaluation / "verdict.json", verdict | {"passed": True, "verdict": "better"})
    with pytest.raises(KubealignError, match="passed, verdict do not follow from evaluation.json"):
        run_register(config, LENIENT, LINEAGE, shop.runs, judged, out)
    write_json(judged.evaluation / "verdict.json", verdict)
    with pytest.raises(EvidenceError, match="judged with decision_index 1, expected 2"):
        run_register(config, LENIENT, replace(LINEAGE, decision_index=2), shop.runs, judged, out)
    with pytest.raises(KubealignError, match="do not follow"):
        run_register(config, LENIENT.model_copy(update={"alpha": 0.4}), LINEAGE, shop.runs, judged, out)
    other = shop.judged("two", False, LINEAGE)
    with pytest.raises(KubealignError, match="the verdict is about policy"):
        run_register(config, LENIENT, LINEAGE, shop.runs, replace(judged, policy=other.policy), out)
    assert not store.client().search_registered_models() and not out.exists()


def test_promote_asks_for_evidence_and_force_for_a_reason_that_is_recorded(shop: Shop) -> None:
    client = store.client()
    shop.register(better=False)
    refused = named("promote", "1")
    assert refused.exit_code and "did not pass the gate" in str(refused.exception)
    assert "give the reason with --reason" in str(named("promote", "1", "--force").exception)
    done = named("promote", "1", "--force", "--reason", "the board said so")
    assert done.exit_code == 0 and champion_alias(client, "m") == "1"
    assert "the board said so" in client.get_model_version("m", "1").tags["kubealign.forced"]
    shown = named("history").output
    assert "force" in shown and "the board" in shown
    assert "not in the registry" in str(named("promote", "77").exception)
    assert "expected a number" in str(named("promote", "latest").exception)


def test_what_was_rolled_back_is_not_promoted_again_by_the_same_run(shop: Shop) -> None:
    client = store.client()
    shop.register()
    shop.register(name="two", decision="ii", decision_index=2, incumbent="models:/m/1")
    assert champion_alias(client, "m") == "2"
    done = named("rollback", "--reason", "it is rude")
    assert done.exit_code == 0 and champion_alias(client, "m") == "1"
    again = shop.register(name="two", decision="ii", decision_index=2, incumbent="models:/m/1")
    assert again["decided"]["state"] == "rolled_back" and champion_alias(client, "m") == "1"
    assert "was rolled back" in str(named("promote", "2").exception)


def test_a_champion_is_copied_to_the_next_environment_with_its_tags(shop: Shop) -> None:
    client = store.client()
    shop.register(better=False)
    assert "is not its champion" in str(named("promote", "1", "--to", "prod").exception)
    named("promote", "1", "--force", "--reason", "x")
    done = named("promote", "1", "--to", "prod")
    assert done.exit_code == 0, done.exception
    copied = client.get_model_version_by_alias("prod", "champion")
    assert copied.tags["kubealign.lineage"] == "gg"
    assert copied.tags["kubealign.copied_from"] == "models:/m/1"
    named("promote", "1", "--to", "prod")
    assert len(client.search_model_versions("name = 'prod'")) == 1, "copied once"
    assert cli("verify", "models:/prod@champion").exit_code == 0


def test_the_version_carries_its_lineage_and_a_card_that_hubs_can_read(shop: Shop, tmp_path: Path) -> None:
    import mlflow

    shop.register()
    tags = store.client().get_model_version("m", "1").tags
    for key, value in LINEAGE.tags().items():
        assert tags[f"kubealign.{key}"] == value
    assert tags["kubealign.git_dirty"] == "false" and tags["kubealign.format"] == "merged"
    assert len(tags["kubealign.environment"]) == len(tags["kubealign.verdict_digest"]) == 64
    files = fetch_statement("m", "1", tmp_path).files
    assert {"MLmodel", "chat_model.py", "artifacts/README.md", "artifacts/model/model.safetensors"} <= files.keys()
    text = mlflow.artifacts.load_text("models:/m/1/artifacts/README.md")
    _, head, body = text.split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["language"] == ["en", "zh"] and card["datasets"] == ["made"] and card["base_model"] == "tiny"
    metrics = {metric["type"] for metric in card["model-index"][0]["results"][0]["metrics"]}
    assert "rewards/accuracies" in metrics
    assert "Apache-2.0" in body and "## Limits" in body and "held-out pairs" in body and "/models/" not in body


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_verify_recomputes_hashes_and_logits_and_notices_a_changed_byte(shop: Shop, kind: str) -> None:
    client = store.client()
    shop.register(kind=kind)
    assert download_incumbent("models:/m/1")[0].name == "artifacts"
    done = cli("verify", "models:/m@champion")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.count("pass") == 5
    compiled = (
        next(store.home().glob("mlartifacts/**/artifacts/chat_model.py")).parent / "__pycache__" / "chat_model.pyc"
    )
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_bytes(b"left by whoever loaded the model from this folder, or anything else")
    assert cli("verify", "models:/m@champion").exit_code == 0
    assert not list(download_incumbent("models:/m/1")[0].rglob("__pycache__"))
    version = client.get_model_version("m", "1")
    client.delete_run(version.run_id)
    assert "marked deleted" in " ".join(cli("verify", "models:/m@champion").output.split())
    client.restore_run(version.run_id)
    part = "model/model.safetensors" if kind == "merged" else "adapter/adapter_model.safetensors"
    weights = next(store.home().glob(f"mlartifacts/**/artifacts/{part}"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    broken = cli("verify", "models:/m@champion")
    assert broken.exit_code and f"artifacts/{part} changed" in str(broken.exception)
    with pytest.raises(KubealignError, match=f"m version 1: artifacts/{part} changed"):
        download_incumbent("models:/m/1")


def test_verify_notices_logits_that_are_not_those_of_registration(shop: Shop) -> None:
    judged = shop.judged("one", True, LINEAGE)
    stored = read_json(judged.policy / "fingerprint.json")
    write_json(judged.policy / "fingerprint.json", stored | {"logps": [x + 0.01 for x in stored["logps"]]})
    write_manifest(judged.policy)
    shop.register()
    broken = cli("verify", "models:/m@champion")
    assert broken.exit_code and "differ by 1.0e-02 nats a token" in str(broken.exception)


OUTSIDER = """
import json, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("components", "pipelines"):
            raise ImportError(f"{name} is not for outsiders")

sys.meta_path.insert(0, Wall())
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/m/1")
answer = model.predict({"messages": [{"role": "user", "content": "你好"}]}, params={"max_new_tokens": 4})
with torch.no_grad():
    logits = model.unwrap_python_model().model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
print(json.dumps({"answer": answer, "logits": logits[:, :50].tolist()}))
"""


def test_an_adapter_loads_without_the_project_and_gives_the_trained_logits(shop: Shop, tmp_path: Path) -> None:
    """Merged weights: tests/pipeline, after a whole run."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shop.register(kind="adapter")
    command = [sys.executable, "-P", "-c", OUTSIDER, store.tracking_uri()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    base = AutoModelForCausalLM.from_pretrained(shop.chain.base, dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, shop.chain.policy / "adapter")
    with torch.no_grad():
        logits = trained(torch.tensor([[5, 6, 7, 8]])).logits[0, :, :50]
    assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-5)
    assert len(found["answer"]) == 1


def test_the_adapter_format_stores_the_base_once_and_refuses_another_one(shop: Shop, tmp_path: Path) -> None:
    import mlflow

    shop.register(kind="adapter")
    shop.register(kind="adapter", name="two", better=False, decision="ii", decision_index=2, incumbent="models:/m/1")
    client = store.client()
    assert len(client.search_model_versions("name = 'm-base'")) == 1
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/m/1"))
    assert not list(folder.glob("artifacts/model")) and (folder / "artifacts" / "tokenizer").is_dir()
    shutil.copytree(shop.chain.base, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEALIGN_BASE", str(tmp_path / "other"))
        with pytest.raises(ValueError, match="not the file of the base model"):
            mlflow.pyfunc.load_model(str(folder))


CRASH = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from components.register import stage
from tests.support.versions import CONFIG, LENIENT, LINEAGE

stage._decide = lambda *words: os.kill(os.getpid(), 9)
order = json.loads(sys.argv[1])
config = CONFIG.register_.model_copy(update={"name": "m"})
judged = stage.RegisterInputs(*map(Path, order["judged"]))
stage.run_register(config, LENIENT, LINEAGE, order["runs"], judged, Path(order["out"]))
"""


def test_a_crash_after_the_version_was_made_is_completed_by_the_next_run(shop: Shop, tmp_path: Path) -> None:
    judged = shop.judged("one", True, LINEAGE)
    paths = [str(path) for path in (judged.policy, judged.base, judged.evaluation, judged.dataset, judged.report)]
    order = json.dumps({"judged": paths, "runs": shop.runs, "out": str(tmp_path / "result.json")})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CRASH, order], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    client = store.client()
    audit = Audit.find(client, "m")
    assert client.get_model_version("m", "1").aliases == [] and audit and not audit.decided()
    found = shop.register()
    assert found["version"] == "1" and found["decided"]["state"] == "promoted"
    assert len(client.search_model_versions("name = 'm'")) == 1


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With SQLite and users (basic-auth)."""
    with mlflow_server_with_users(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.mark.integration
def test_mlflow_on_a_bad_day_is_asked_again_and_then_the_model_is_kept_and_the_next_run_finishes(
    chain: Chain, tmp_path: Path, server: str, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *ADMIN)
    with faulty_proxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        shop = Shop(chain, tmp_path)
        claims = "/api/2.0/mlflow/runs/log-parameter"

        def broken(method: str, path: str) -> str:
            return "500" if path == claims else ""

        proxy.fails = broken
        with pytest.raises(KubealignError, match="Nothing is lost: the model is kept in") as stop:
            shop.register()
        assert "the same `kubealign run`" in str(stop.value) and proxy.address in str(stop.value)
        assert (tmp_path / "one" / "policy" / "model" / "model.safetensors").is_file()
        assert proxy.seen.count(("POST", claims)) == 3, "asked again twice"
        proxy.fails = lambda method, path: "close"
        with pytest.raises(KubealignError, match="Nothing is lost"):
            shop.register()
        # One failure in between is not noticed at all.
        failed: list[str] = []

        def once(method: str, path: str) -> str:
            if path in failed or "mlflow-artifacts" in path:
                return ""
            failed.append(path)
            return "500" if len(failed) % 2 else "close"

        proxy.fails = once
        found = shop.register()
        assert found["decided"]["state"] == "promoted" and found["version"] == "1" and len(failed) > 10


@pytest.mark.integration
def test_what_register_needs_of_mlflow_is_asked_before_anything_is_trained(
    server: str, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *ADMIN)
    with faulty_proxy(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        client = store.client()
        run_id = client.create_run(store.experiment_id(client)).info.run_id
        client.log_dict(run_id, {}, "orders.json")
        check_server(client, run_id, "orders.json", "unheard-of")
        client.create_registered_model("asked")
        check_server(client, run_id, "orders.json", "asked")
        assert client.get_registered_model("asked").tags == {LAST_RUN: run_id}

        def old(method: str, path: str) -> str:
            return "404" if "logged-models" in path else ""

        proxy.fails = old
        with pytest.raises(InputError, match=rf"is version {mlflow.__version__}, which cannot log models; .*3\.0"):
            check_server(client, run_id, "orders.json", "asked")

        def forgetful(method: str, path: str) -> str:
            return "404" if method == "GET" and "mlflow-artifacts" in path else ""

        proxy.fails = forgetful
        with pytest.raises(InputError, match=r"took the artifact orders\.json of run .* and does not give it back"):
            check_server(client, run_id, "orders.json", "asked")


def post(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}", json.dumps(body).encode())  # noqa: S310
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", "Basic " + b64encode(":".join(ADMIN).encode()).decode())
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - our own server
        return json.load(response)


@pytest.mark.integration
def test_a_user_without_the_right_is_told_what_it_takes(
    server: str, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    log_in(monkeypatch, *ADMIN)
    client = with_versions(store.client(), 2, "theirs")
    promote(client, "theirs", "1", "gate", "", expected="")
    run_id = client.create_run(store.experiment_id(client)).info.run_id
    client.log_dict(run_id, {}, "orders.json")
    post(server, "users/create", username="reader", password="reads-only-things")  # noqa: S106
    log_in(monkeypatch, "reader", "reads-only-things")
    assert "gate" in cli("history", "--name", "theirs").output, "reading is allowed"
    refused = cli("rules", "--reason", "x", "--name", "theirs")
    said = explain_mlflow_error(refused.exception)  # as `main` says it
    assert refused.exit_code and "does not let reader do this" in said and "EDIT on the experiment" in said
    with pytest.raises(MlflowException) as stop, stage_run("register", {}):
        pass
    assert "does not let reader" in explain_mlflow_error(stop.value)
    with pytest.raises(MlflowException) as stop:
        check_server(client, run_id, "orders.json", "theirs")
    assert "EDIT on the registered model" in explain_mlflow_error(stop.value)
    assert champion_alias(client, "theirs") == "1"
    log_in(monkeypatch, "reader", "wrong")
    assert "does not accept reader" in explain_mlflow_error(cli("history", "--name", "theirs").exception)


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


UPLOAD = """
import sys
from components.tracking import store
from components.tracking.errors import explain_mlflow_error
from components.tracking.run import SETTINGS, stage_run
from components.common.memory import peak_memory_mib
from components.register.package import log_version
with stage_run("register", {}) as run:
    log_version(run, "big", {"model": sys.argv[1]}, ["mlflow"], {}, {})
print(round(peak_memory_mib()))
"""


@pytest.mark.integration
@pytest.mark.long
def test_weights_over_100_mb_are_not_held_in_memory_on_their_way_to_a_server(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, *ADMIN)
    peaks = []
    for size_mb in (1, 400):
        model = tmp_path / f"{size_mb}" / "model"
        model.mkdir(parents=True)
        with (model / "model.safetensors").open("wb") as file:
            for _ in range(size_mb):
                file.write(os.urandom(1 << 20))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server}
        command = [sys.executable, "-c", UPLOAD, str(model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 60, f"MiB at peak for 1 and 400 MB: {peaks}"


def test_reproduce_says_what_it_takes_and_checks_it_out(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dulwich import porcelain

    monkeypatch.setattr("components.engine.hardware.native_precision", lambda: "fp32")
    project = tmp_path / "project"
    project.mkdir()
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    porcelain.init(str(project)).close()
    porcelain.add(str(project), [str(project / "params.yaml")])
    commit = porcelain.commit(str(project), message=b"one", author=b"a <a@b>", committer=b"a <a@b>").decode()
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("name: kubealign", "name: m"))
    shop.register(git_commit=commit, data_clean=False)
    words = ("reproduce", "1", "--name", "m", "--project", str(project))
    said = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "again")])
    assert said.exit_code == 0, said.exception
    assert f"commit {commit}" in said.output and "lineage gg" in said.output
    assert "warning the data " in said.output and "as here" in said.output
    settings = yaml.safe_load((tmp_path / "again" / "params.yaml").read_text())
    assert settings["dpo"] == CONFIG.sections()["dpo"] and "prepare" in settings
    assert "torch==" in (tmp_path / "again" / "environment.txt").read_text()
    assert "hardware cpu, in fp32" in said.output and "this machine is" not in said.output
    shop.made_for("gpu")
    shop.register(name="two", git_commit=commit, data_clean=False, decision_index=2, decision="two")
    elsewhere = CliRunner().invoke(app, ["reproduce", "2", *words[2:]])
    assert "hardware gpu, in fp32" in elsewhere.output and "this machine is cpu" in elsewhere.output
    assert "--set model.hardware=cpu" in elsewhere.output
    full = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "again")])
    assert full.exit_code and "not empty" in str(full.exception)
