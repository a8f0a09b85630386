"""Configuration, identities, errors and the command line, without running a pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from components.common.errors import InputError, KubealignError
from components.common.files import replacing, replacing_folder, verify_manifest, write_json, write_manifest
from components.config.model import ModelConfig
from components.config.params import FORM_FIELDS, Config, config_from_arguments, load_config, pipeline_arguments
from components.sources.base_model import resolve_base
from components.sources.data import data_folders, resolve_data
from components.stages import STAGE_NAMES
from components.tracking import store
from components.tracking.errors import report_errors
from tests.conftest import ROOT
from tests.support.repositories import dvc, git

PARAMS = ROOT / "params.yaml"
DATA = data_folders("data")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.betta=1", "dpo.betta: no such key; did you mean dpo.beta?"),
        ("dop.beta=1", "dop: no such key; did you mean dpo?"),
        ("dpo.beta=-1", r"dpo.beta: input should be greater than 0, found -1 \(strength of the pull"),
        ("dpo.loss=ppo", "dpo.loss: input should be 'sigmoid', 'robust', .* or 'orpo', found 'ppo'"),
        ("model.precision=fp16", "model.precision: fp16 overflows"),
        ("prepare.split.train=0.9", "prepare.split: the shares add up to 1.45; expected 1"),
        ("data.repo=https://me:secret@example.org/x.git", "data.repo: a user or token in a URL"),
        ("beta=1", "--set beta=1: expected section.key=value, such as dpo.beta=0.2"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(PARAMS, [override])
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_smoothing_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="label_smoothing means nothing to the loss ipo"):
        load_config(PARAMS, ["dpo.loss=ipo", "dpo.label_smoothing=0.1"])


def test_a_key_that_the_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("dpo: {lr: 1.0e-5}\n")
    assert load_config(tmp_path / "params.yaml") == load_config(PARAMS, ["dpo.lr=1e-5"])
    read = load_config(tmp_path / "params.yaml", ["data.revision=1.2", "sft.lr=5e-7", "cluster.train.gpus=2"])
    assert (read.data.revision, read.sft.lr, read.cluster.train.gpus) == ("1.2", 5e-7, 2)


def test_the_shipped_file_shows_every_key_with_its_default() -> None:
    assert yaml.safe_load(PARAMS.read_text()) == Config().sections()


def test_a_value_is_read_as_the_kind_that_it_replaces() -> None:
    assert load_config(PARAMS, ["dpo.lr=5e-7"]).dpo.lr == 5e-7
    for text in ("1.2", "12e4567", "2026"):
        assert load_config(PARAMS, [f"data.revision={text}"]).data.revision == text


def test_credentials_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.without_credentials("postgresql://u:pw@host/db") == "postgresql://***@host/db"
    assert store.without_credentials("sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    assert store.tracking_uri() == f"sqlite:///{Path.cwd() / 'x.db'}"


def test_every_field_says_what_it_means() -> None:
    def fields(kind: type[BaseModel]) -> list[str]:
        missing = []
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                missing += fields(field.annotation)
            elif not field.description:
                missing.append(f"{kind.__name__}.{name}")
        return missing

    assert fields(Config) == []


def test_form_fields_are_taken_out_of_the_json_and_may_not_be_given_twice() -> None:
    arguments = pipeline_arguments(load_config(PARAMS))
    text = arguments["dpo_section"]
    assert set(FORM_FIELDS) <= set(arguments) and "beta" not in json.loads(text)
    assert config_from_arguments(arguments) == load_config(PARAMS)
    assert config_from_arguments(arguments | {"dpo_beta": 0.3}).dpo.beta == 0.3
    twice = arguments | {"dpo_section": json.dumps(json.loads(text) | {"beta": 0.1})}
    with pytest.raises(InputError, match="dpo.beta is the form field dpo_beta; take it out of dpo_section"):
        config_from_arguments(twice)


def test_a_rule_of_a_whole_section_names_the_section_and_shows_none_of_it() -> None:
    arguments = pipeline_arguments(load_config(PARAMS)) | {"dpo_loss": "ipo"}
    smoothed = json.dumps(json.loads(arguments["dpo_section"]) | {"label_smoothing": 0.1})
    with pytest.raises(InputError) as error:
        config_from_arguments(arguments | {"dpo_section": smoothed})
    assert re.match(r"the run: dpo: label_smoothing means nothing to the loss ipo", str(error.value))
    assert "batch_size" not in str(error.value)


# ---- base models


def base(name: str, **changes: object) -> ModelConfig:
    config = load_config(PARAMS)
    return ModelConfig(**config.model.model_dump() | {"base": name} | changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (base("no/such/folder"), "no such folder; expected `embedded`, a folder, s3://"),
        (base("org/name"), "as a hub id it needs the network; set model.allow_network"),
        (base("org/name", allow_network=True), "a hub id needs model.revision, a commit of 40 hexadecimal digits"),
        (base("models:/nothing/1"), "model.base=models:/nothing/1: .*not found"),
        (base("models:/x"), "expected models:/name/version or models:/name@alias"),
        (base(str(ROOT / "tests")), "the folder has no config.json"),
    ],
)
def test_a_base_model_that_cannot_be_used_is_refused_before_anything_runs(model: ModelConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_base(model, load_config(PARAMS).data)


def test_a_hub_id_with_network_and_revision_is_pinned() -> None:
    found = resolve_base(base("org/name", allow_network=True, revision="a" * 40), load_config(PARAMS).data)
    assert found.reference == f"hub:org/name@{'a' * 40}"


# ---- data versions


@pytest.fixture
def data_repo(tmp_path: Path) -> Path:
    """A git and DVC repository with two versions of the data, and a commit that leaves the data alone."""
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    dvc(repo, "init", "-q")
    (repo / "source").mkdir()
    stage = "mkdir -p data && cp -r source data/preferences && cp -r source data/instructions"
    (repo / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "prepare": {"cmd": stage, "deps": ["source"], "outs": ["data/preferences", "data/instructions"]}
                }
            }
        )
    )
    for number in (1, 2):
        (repo / "source" / "rows.jsonl").write_text(f'{{"version": {number}}}\n')
        dvc(repo, "repro", "-q")
        git(repo, "add", "-A")
        git(repo, "commit", "-qm", f"data {number}")
        git(repo, "tag", f"v{number}")
    (repo / "README").write_text("words\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "words")
    return repo


@pytest.mark.integration
def test_a_revision_is_the_commit_that_gave_the_data_its_content(data_repo: Path) -> None:
    second, head = git(data_repo, "rev-parse", "v2"), git(data_repo, "rev-parse", "HEAD")
    assert second != head
    now, then = resolve_data(str(data_repo), "HEAD", DATA), resolve_data(str(data_repo), "v1", DATA)
    assert now.commit == second and then.commit == git(data_repo, "rev-parse", "v1")
    assert now.digests != then.digests
    for same in ("v2", second, head[:10]):
        assert resolve_data(str(data_repo), same, DATA) == now, "so the cache serves a run on any of these names"


@pytest.mark.integration
def test_the_workspace_has_dvcs_own_digest_and_follows_every_change(data_repo: Path) -> None:
    committed, workspace = resolve_data(str(data_repo), "HEAD", DATA), resolve_data(str(data_repo), "workspace", DATA)
    assert workspace.digests == committed.digests and workspace.commit == "workspace"
    (data_repo / "data" / "preferences" / "rows.jsonl").write_text("changed\n")
    changed = resolve_data(str(data_repo), "workspace", DATA).digests
    assert changed["data/preferences"] != committed.digests["data/preferences"]
    assert changed["data/instructions"] == committed.digests["data/instructions"]


@pytest.mark.integration
def test_data_that_is_not_there_is_a_clear_error(data_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.revision=nowhere.*expected a git repository with DVC data"):
        resolve_data(str(data_repo), "nowhere", DATA)
    with pytest.raises(InputError, match=r"data.revision=workspace needs a local repository"):
        resolve_data("https://example.org/repo.git", "workspace", DATA)
    shutil.rmtree(data_repo / "data" / "preferences")
    with pytest.raises(InputError, match=r"data/preferences: not found or empty; `make data`"):
        resolve_data(str(data_repo), "workspace", DATA)


# ---- files


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(RuntimeError), replacing(tmp_path / "x.json") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))


def test_a_manifest_notices_every_change(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert write_manifest(tmp_path) == verify_manifest(tmp_path)
    for change, message in (
        (lambda: (tmp_path / "a").write_text("x"), "a changed since it was written"),
        (lambda: (tmp_path / "c").write_text("c"), "c is not in the manifest"),
        ((tmp_path / "b").unlink, "b is missing"),
    ):
        change()
        with pytest.raises(KubealignError, match=message):
            verify_manifest(tmp_path)
        (tmp_path / "c").unlink(missing_ok=True)
        (tmp_path / "a").write_text("a")


def test_a_full_disk_and_a_locked_folder_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    for number, words in ((errno.ENOSPC, "no space left; free some"), (errno.EACCES, "cannot be written or read")):
        with pytest.raises(SystemExit), report_errors("sft"):
            raise OSError(number, os.strerror(number), "/from/here", None, "/some/file")
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("[error:1] sft /some/file: ") and words in last


# ---- command line


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
    assert "strength of the pull" in kubealign("config", "--explain").stdout


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


# ---- set-up


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", f"VENV={folder}/venv", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (
            '[ "$1" = --version ] && exec echo Python 3.9.2; exit 1',
            [],
            "error: Python 3.11 is needed, found Python 3.9.2; install python3.11",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', [], "error: this Python has no venv module; on Debian"),
        ("exit 0", ["MIN_DISK_MB=999999999"], "MB free here, 999999999 MB needed"),
    ],
)
def test_a_machine_that_cannot_do_it_gets_one_line_before_anything_is_installed(
    tmp_path: Path, script: str, words: list[str], message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = make(tmp_path, "setup", f"PYTHON={python}", *words)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_torch_can_come_from_another_index(tmp_path: Path) -> None:
    index = "https://example.org/whl/cpu"
    with_index = make(tmp_path, "-n", "setup", f"TORCH_INDEX={index}").stdout
    assert f"--no-deps --index-url {index} $(grep '^torch==' requirements.lock)" in with_index
    assert "--index-url" not in make(tmp_path, "-n", "setup").stdout


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("echo No known vulnerabilities found", 0, ""),
        ("echo torch 2.13.0 PYSEC-1; exit 1", 2, ""),
        ("echo ERROR: torch: Dependency not found on PyPI and could not be audited; exit 1", 2, "cannot be reached"),
        ("echo requests.exceptions.ConnectionError: Max retries exceeded; exit 1", 2, "cannot be reached"),
    ],
)
def test_an_audit_that_could_not_ask_says_so(tmp_path: Path, script: str, code: int, message: str) -> None:
    audit = tmp_path / "audit"
    audit.write_text(f"#!/bin/sh\n{script}\n")
    audit.chmod(0o755)
    done = make(tmp_path, f"--old-file={tmp_path}/venv/.ready", "audit", f"AUDIT={audit}")
    assert done.returncode == code and script.split("echo ")[1].split(";", maxsplit=1)[0] in done.stdout
    assert ("error:" in done.stderr) == bool(message) and message in done.stderr
