"""The whole DAG under KFP's local runner, as a user starts it: real data, a tiny model, a foreign working directory.

The tests of this file build on one project and run in order; each states what it changed and what had to run again.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.dataset.records import read_lines
from components.prepare.sources import read_sources, unpack
from components.registry.audit import Audit
from components.stages import STAGE_NAMES
from tests.conftest import ROOT
from tests.support.project import ALL, Project, ran, started
from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration


def since(step: str) -> set[str]:
    """The steps that run when this one and all behind it have to: `resolve` always does."""
    return {STAGE_NAMES[0], *STAGE_NAMES[STAGE_NAMES.index(step) :]}


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    yield Project(tmp_path_factory.mktemp("pipeline"), tiny_model)


@pytest.fixture(scope="module")
def first(project: Project) -> dict[str, Any]:
    """The outcome of the first run."""
    assert ran(project.run()) == ALL
    return project.report()


def test_the_first_run_registers_a_challenger_and_reports_real_numbers(first: dict[str, Any]) -> None:
    assert first["model_uri"] == "models:/kubealign/1" and "challenger" in first["aliases"]
    assert ("champion" in first["aliases"]) == first["verdict"]["passed"]
    assert set(first["stages"]) == ALL
    for stage in first["stages"].values():
        assert stage["seconds"] > 0 and stage["peak_memory_mib"] > 50 and stage["cached"] is False
    accuracy = first["metrics"]["policy"]["rewards/accuracies"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"] and accuracy["n"] > 10
    assert first["languages"]["policy"].keys() == {"en", "zh"}
    assert Path(first["report"]).read_text().startswith("<!doctype html>")


def test_nothing_changed_reruns_nothing_but_resolve_and_register(project: Project, first: dict[str, Any]) -> None:
    assert ran(project.run()) == {"resolve", "register"}
    again = project.report()
    assert again["model_uri"] == first["model_uri"] and again["metrics"] == first["metrics"]
    assert again["run_id"] != first["run_id"]
    assert {name for name, stage in again["stages"].items() if stage["cached"]} == ALL - {"resolve", "register"}
    tags = project.client().get_run(again["run_id"]).data.tags
    assert tags["kubealign.cached.dpo"] == first["stages"]["dpo"]["run_id"]


def test_a_parent_run_has_a_child_for_each_stage_with_steps_and_data(project: Project, first: dict[str, Any]) -> None:
    client = project.client()
    experiment = client.get_run(first["run_id"]).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{first['run_id']}'")
    assert {child.info.run_name for child in children} == ALL
    assert {child.info.status for child in children} == {"FINISHED"}
    by_name = {child.info.run_name: child for child in children}
    losses = client.get_metric_history(by_name["dpo"].info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2] and losses[0].value == pytest.approx(0.693147, abs=1e-4)
    digests = {entry.dataset.name: entry.dataset.digest for entry in by_name["fetch"].inputs.dataset_inputs}
    assert digests == {"preferences": first["preferences_digest"], "instructions": first["instructions_digest"]}


def test_a_pair_of_each_language_is_followed_from_the_sources_to_the_tags(
    project: Project, first: dict[str, Any], tmp_path: Path
) -> None:
    sources = read_sources(ROOT / "data" / "sources.lock")
    clean = next(project.root.glob(".kubealign/steps/*/validate/clean/preferences/train.jsonl"))
    for lang in ("en", "zh"):
        row = next(row for row in read_lines(clean) if row["lang"] == lang)
        member = sources.preferences[row["source"]]
        unpack(sources, member, tmp_path, tmp_path / f"{lang}.json")
        texts = [entry["chosen"]["value"] for entry in json.loads((tmp_path / f"{lang}.json").read_text())]
        assert row["chosen"] in texts and row["license"] == member.license
        assert row in read_lines(ROOT / "data" / "preferences" / "train.jsonl")
    lock = (ROOT / "dvc.lock").read_text()
    tags = project.client().get_model_version("kubealign", "1").tags
    assert tags["kubealign.preferences_digest"] in lock and tags["kubealign.instructions_digest"] in lock
    assert tags["kubealign.base_reference"] == str(project.tiny) and len(tags["kubealign.base_digest"]) == 64
    assert tags["kubealign.run"] == first["run_id"] and tags["kubealign.lineage"] == first["lineage"]
    assert tags["kubealign.data_commit"] == "workspace" and tags["kubealign.git_commit"]


OUTSIDER = """
import sys, json

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("components", "pipelines"):
            raise ImportError(f"{name} is not for outsiders")

sys.meta_path.insert(0, Wall())
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/kubealign@challenger")
answer = model.predict({"messages": [{"role": "user", "content": "你好"}]}, params={"max_new_tokens": 5})
inner = model.unwrap_python_model()
with torch.no_grad():
    logits = inner.model(torch.tensor([[5, 6, 7, 8]])).logits[0]
print(json.dumps({"answer": answer, "logits": logits[:, :50].tolist()}))
"""


def test_the_registered_model_answers_without_the_project_and_has_the_trained_logits(
    project: Project, first: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    uri = f"sqlite:///{project.root}/.kubealign/mlflow.db"
    command = [sys.executable, "-P", "-c", OUTSIDER, uri]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["answer"]) == 1 and isinstance(found["answer"][0], str)
    base = AutoModelForCausalLM.from_pretrained(project.tiny, dtype=torch.float32)
    adapter = next(project.root.glob(".kubealign/steps/*/dpo/policy/adapter"))
    trained = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        logits = trained(torch.tensor([[5, 6, 7, 8]])).logits[0, :, :50]
    assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-5)


def test_the_model_version_holds_plain_files(project: Project, first: dict[str, Any]) -> None:
    import mlflow

    client = project.client()
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=client.get_model_version("kubealign", "1").source))
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes and not suffixes & {".bin", ".pkl", ".pt", ".pth"}
    assert (folder / "artifacts" / "model" / "chat_template.jinja").is_file()


def test_a_changed_dpo_setting_leaves_sft_cached_and_without_an_update_gives_no_evidence(
    project: Project, first: dict[str, Any]
) -> None:
    done = project.run("dpo.learning_rate=1e-30", "gate.max_kl=49")
    assert ran(done) == since("dpo")
    found = project.report()
    assert abs(found["comparisons"]["sft"]["improvement"]["value"]) < 1e-4
    assert found["verdict"]["passed"] is False and found["verdict"]["verdict"] == "no evidence"
    assert "There is no evidence" in done.stdout and "champion" not in found["aliases"]


def test_a_new_champion_reruns_only_the_evaluation(project: Project, first: dict[str, Any]) -> None:
    """Another version with another lineage becomes the champion by force; its alias alone would not make it one."""
    other = project.report()
    assert other["lineage"] != first["lineage"]
    client = project.client()
    client.set_registered_model_alias("kubealign", "champion", other["version"])
    assert ran(project.run()) == {"resolve", "register"}
    assert project.report()["incumbent"] == ""
    words = ["promote", other["version"], "--force", "--reason", "to see what happens"]
    assert project.cli(*words).returncode == 0
    assert ran(project.run()) == since("evaluate")
    found = project.report()
    assert found["incumbent"] == other["model_uri"] and "incumbent" in found["metrics"]
    assert found["verdict"]["verdict"] == "no evidence" and "champion" not in found["aliases"]
    assert project.cli("verify", found["model_uri"]).returncode == 0


def test_another_base_model_reruns_everything_and_a_stopped_run_goes_on_and_leaves_no_child(
    project: Project, first: dict[str, Any]
) -> None:
    config = project.tiny / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"temperature": 0.9,', 1))
    process = subprocess.Popen(
        project.command(),
        cwd=project.elsewhere,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = project.root / ".kubealign" / "checkpoints"
    before = set(checkpoints.glob("sft-*/step-*"))
    wait_until(lambda: set(checkpoints.glob("sft-*/step-*")) - before, "a checkpoint of sft", within_s=600)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "the run has not started its steps"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted; run the same command to resume" in error
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    client = project.client()
    parents = "tags.`kubealign.kind` = 'pipeline'"
    (newest,) = client.search_runs(["1"], parents, order_by=["attributes.start_time DESC"], max_results=1)
    assert newest.info.status == "KILLED"
    assert not client.search_runs(["1"], "attributes.status = 'RUNNING'")
    assert started(out.splitlines()) == ALL - since("sft") | {"resolve", "sft"}


def test_a_resumed_run_judges_again_when_another_run_overtakes(project: Project, first: dict[str, Any]) -> None:
    process = subprocess.Popen(
        project.command(),
        cwd=project.elsewhere,
        env=project.environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    lines: list[str] = []
    number = 0
    for line in process.stdout:
        lines.append(line.rstrip())
        if lines[-1] == "evaluate: started" and not number:
            audit = Audit.find(project.client(), "kubealign")
            assert audit
            (test_set,) = audit.test_sets()
            number = len(audit.decisions(test_set)) + 1
            assert audit.claim_decision(test_set, number, "another run's")
    assert process.wait() == 0, "\n".join(lines)
    assert any("resuming after step" in line for line in lines)
    again = next(index for index, line in enumerate(lines) if line.endswith("evaluating again"))
    assert started(lines[:again]) == since("sft")
    assert [line for line in lines[again:] if line.endswith(": started")] == [
        f"{step}: started" for step in STAGE_NAMES if step in since("evaluate")
    ]
    found = project.report()
    assert found["verdict"]["decision_index"] == number + 1 and found["decided"]["state"] == "gate_failed"


def test_a_changed_row_is_validated_and_trained_again(project: Project, first: dict[str, Any]) -> None:
    """The run is stopped as soon as it trains."""
    path = project.root / "data" / "preferences" / "train.jsonl"
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[1:]))
    try:
        with subprocess.Popen(
            project.command(), cwd=project.elsewhere, env=project.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            seen = [line.rstrip() for line in takewhile(lambda line: line != "sft: started\n", process.stdout)]
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
    finally:
        path.write_text(text)
    assert started(seen) == ALL - since("sft") | {STAGE_NAMES[0]}


def test_a_malformed_line_stops_with_file_line_and_exit_code_2(project: Project, first: dict[str, Any]) -> None:
    path = project.root / "data" / "preferences" / "test.jsonl"
    text = path.read_text()
    try:
        path.write_text(text + '{"prompt": [\n')
        done = project.run()
        assert done.returncode == 2
        message = done.stderr.strip().splitlines()
        assert (
            message[0].startswith("error: validate: ")
            and f"test.jsonl:{len(text.splitlines()) + 1}: not valid JSON" in message[0]
        )
        assert "Traceback" not in done.stderr
    finally:
        path.write_text(text)


@pytest.mark.long
def test_an_edited_stage_reruns_itself_and_what_follows(project: Project, first: dict[str, Any]) -> None:
    path = project.code / "components" / "dpo" / "stage.py"
    path.write_text(path.read_text() + "EDITED = True\n")
    assert ran(project.run()) == since("dpo")
