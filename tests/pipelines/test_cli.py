"""The command line without running a pipeline."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.stages import STAGE_NAMES
from tests.conftest import ROOT

PARAMS = ROOT / "params.yaml"


def kubealign(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "pipelines.cli", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_a_wrong_setting_starts_nothing_and_exits_with_2(own_home: Path) -> None:
    done = kubealign("run", "--set", "dpo.bta=1")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("dpo.bta: no such key; did you mean dpo.beta?")
    assert not own_home.exists()


def test_data_settings_cannot_be_changed_for_one_run() -> None:
    done = kubealign("run", "--set", "prepare.near_duplicate=0.5")
    assert done.returncode == 2 and "change params.yaml and run `make data`" in done.stderr


def test_an_unreachable_mlflow_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = kubealign("report")
    assert done.returncode == 1 and done.stderr.startswith("error: MLflow at http://***@127.0.0.1:9: ")
    assert "secret" not in done.stderr and "Traceback" not in done.stderr


def test_outside_a_project_the_command_says_where_to_go(tmp_path: Path) -> None:
    done = kubealign("run", cwd=tmp_path)
    assert done.returncode == 2 and "no params.yaml here or above" in done.stderr


def test_a_report_needs_a_finished_run(own_home: Path) -> None:
    done = kubealign("report", "--json")
    assert done.returncode == 2 and "no run yet; start one with `kubealign run`" in done.stderr
    assert done.stdout == ""


def test_config_shows_what_would_be_used_and_explains_it() -> None:
    assert yaml.safe_load(kubealign("config", "--set", "dpo.beta=0.25").stdout)["dpo"]["beta"] == 0.25
    assert "KL penalty coefficient" in kubealign("config", "--explain").stdout


def test_clean_shows_before_it_removes(own_home: Path) -> None:
    (own_home / "checkpoints").mkdir(parents=True)
    (own_home / "checkpoints" / "x").write_bytes(b"0" * 3_000_000)
    (own_home / "mlflow.db").write_text("kept")
    shown = kubealign("clean").stdout
    assert "3" in shown and (own_home / "checkpoints").exists()
    assert kubealign("clean", "nothing").returncode == 2
    kubealign("clean", "all", "--yes")
    assert not (own_home / "checkpoints").exists() and (own_home / "mlflow.db").exists()


def test_the_compiled_pipeline_has_typed_described_fields_with_the_defaults_of_params(tmp_path: Path) -> None:
    done = kubealign("compile", "--target", "local", "--out", str(tmp_path / "p.yaml"), "--set", "dpo.beta=0.33")
    assert done.returncode == 0, done.stderr
    spec = yaml.safe_load((tmp_path / "p.yaml").read_text())
    fields = spec["root"]["inputDefinitions"]["parameters"]
    assert fields["dpo_beta"]["defaultValue"] == 0.33 and fields["dpo_beta"]["parameterType"] == "NUMBER_DOUBLE"
    assert all(field.get("description") and "defaultValue" in field for field in fields.values())
    tasks = spec["root"]["dag"]["tasks"]
    assert list(tasks) == sorted(STAGE_NAMES)
    uncached = [name for name, task in tasks.items() if not task["cachingOptions"].get("enableCache")]
    assert sorted(uncached) == ["register", "resolve"]


def test_compiling_is_for_kubeflow_which_cannot_reach_the_data_on_this_machine(tmp_path: Path) -> None:
    done = kubealign("compile", "--out", str(tmp_path / "p.yaml"))
    assert done.returncode == 2 and not list(tmp_path.glob("p.yaml*"))
    assert "a pod sees no folder of this machine; set data.repo to the URL" in done.stderr
