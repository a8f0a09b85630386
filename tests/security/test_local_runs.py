"""A run on this machine gives its steps what the project configured, and nobody takes it away while it lives."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.common.errors import InputError
from components.sources import remotes
from components.tracking import store
from components.tracking.keys import SIGNING_KEY_VARIABLE
from pipelines.local import containers
from pipelines.project import MARK, home_in_use
from tests.conftest import ROOT

pytestmark = pytest.mark.integration


# ---- containers


@pytest.mark.parametrize("url", ["/", "../..", "~", "/etc", ".."])
def test_a_data_repository_mounts_nothing_but_dvcs_own_content(tmp_path: Path, url: str) -> None:
    """A colleague's branch names a folder of this machine as its remote."""
    repo = tmp_path / "a" / "repo"
    (repo / ".dvc").mkdir(parents=True)
    (repo / ".dvc" / "config").write_text(f"['remote \"here\"']\n    url = {url}\n[cache]\n    dir = {url}\n")
    arguments = {"data_section": json.dumps({"repo": str(repo)}), "base_model": "embedded"}
    mounted = containers._read_only(tmp_path / "project", arguments)
    assert [path for path in mounted if path != repo and path.parts[-2:] != ("files", "md5")] == []


def test_the_project_is_not_mounted_beside_its_data(tmp_path: Path) -> None:
    project, repo = tmp_path / "project", tmp_path / "repo"
    for folder in (project / ".git", repo):
        folder.mkdir(parents=True)
    (project / ".env").write_text("KEY=s3cr3t")
    arguments = {"data_section": json.dumps({"repo": str(repo)}), "base_model": "embedded"}
    assert containers._read_only(project, arguments) == [repo]


SECRETS = (
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "GIT_ASKPASS",
    "GIT_SSH_COMMAND",
    "GITHUB_TOKEN",
    "KUBEALIGN_WEBHOOK_SECRET",
    "KUBEALIGN_REGISTRY_KEY",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "HF_TOKEN",
)


def test_a_container_gets_a_listed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SECRETS, *containers.INHERITED):
        monkeypatch.setenv(name, "x")
    found = containers._environment()
    assert not set(SECRETS) & set(found)
    assert set(found) == {*containers.INHERITED, "MLFLOW_TRACKING_URI", "KUBEALIGN_HOME", SIGNING_KEY_VARIABLE}


def test_a_container_signs_with_the_key_that_is_given_as_text_or_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the step would sign with a key of its own, which the one who started it does not trust."""
    pem = os.environ[SIGNING_KEY_VARIABLE]
    (tmp_path / "key.pem").write_text(pem)
    for given in (pem, str(tmp_path / "key.pem")):
        monkeypatch.setenv(SIGNING_KEY_VARIABLE, given)
        assert containers._environment()[SIGNING_KEY_VARIABLE] == pem
    monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    assert SIGNING_KEY_VARIABLE not in containers._environment()


# ---- ssh


def test_ssh_goes_through_openssh_which_knows_its_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DVC's own ssh accepts the key of every host; with OpenSSH named in the environment it does not come into play."""
    from scmrepo.git.backend.dulwich import _get_ssh_vendor

    monkeypatch.setenv("GIT_SSH_COMMAND", "")
    monkeypatch.delenv("GIT_SSH", raising=False)
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit 255\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "AsyncSSH" in type(_get_ssh_vendor()).__name__
    from components.sources.data import data_folders, resolve_data

    with pytest.raises(InputError):
        resolve_data("ssh://git@git.example.com/team/data", "main", data_folders("data"))
    assert "AsyncSSH" not in type(_get_ssh_vendor()).__name__
    asked = (tmp_path / "asked").read_text()
    assert "StrictHostKeyChecking=yes" in asked and "git@git.example.com" in asked


def test_ssh_without_openssh_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_SSH_COMMAND", "")
    monkeypatch.delenv("GIT_SSH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="ssh"):
        remotes.require_host_keys()


@pytest.mark.parametrize("repo", ["ssh://-oProxyCommand=id@git.example.com/x", "ssh://git@-oProxyCommand=id/x"])
def test_an_address_is_no_option_of_ssh(repo: str) -> None:
    from components.sources.data import check_address

    with pytest.raises(InputError):
        check_address(repo)


# ---- clean


HOLD = """
import sys
from pipelines.project import home_in_use
with home_in_use():
    print("held", flush=True)
    sys.stdin.read()
"""


def clean(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pipelines.cli", "clean", "all", "--yes", "--project", str(ROOT)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KUBEALIGN_HOME": str(home)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_clean_takes_nothing_from_a_live_run(own_home: Path) -> None:
    (own_home / "checkpoints" / "sft").mkdir(parents=True)
    (own_home / "mlflow.db").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KUBEALIGN_HOME": str(own_home)}
    run = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout and run.stdin and run.stdout.readline() == "held\n"
    done = clean(own_home)
    assert done.returncode == 2 and "a run is using it" in done.stderr and str(own_home) in done.stderr
    assert (own_home / "checkpoints" / "sft").is_dir()
    with home_in_use():  # runs do not shut one another out
        run.kill()  # and one that is killed holds nothing
        run.wait()
    assert clean(own_home).returncode == 0 and not (own_home / "checkpoints").exists()


@pytest.mark.parametrize("value", ["", " ", "theirs"])
def test_clean_never_touches_what_is_not_ours(tmp_path: Path, value: str) -> None:
    """An empty variable names no folder, and a folder with other files is no home, whatever their names are."""
    theirs = tmp_path / "theirs"
    for name in ("cache/my-embeddings.npy", "runs/notes.md", "workspace/draft.txt"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("mine")
    shutil.copy(ROOT / "params.yaml", theirs)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KUBEALIGN_HOME": str(theirs) if value == "theirs" else value}
    command = [sys.executable, "-P", "-m", "pipelines.cli", "clean", "all", "--yes"]
    done = subprocess.run(command, cwd=theirs, env=environment, capture_output=True, text=True, check=False)
    assert (theirs / "cache" / "my-embeddings.npy").exists() and (theirs / "runs" / "notes.md").exists()
    assert (done.returncode, "such as cache" in done.stderr) == ((2, True) if value == "theirs" else (0, False))


@pytest.mark.parametrize("folder", ["/", "~"])
def test_the_root_folder_and_a_persons_own_are_no_home(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_HOME", os.path.expanduser(folder))  # noqa: PTH111
    with pytest.raises(InputError, match="expected a folder of its own"):
        store.home()


def test_a_home_is_marked_once_and_known_by_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_HOME", str(tmp_path / "new"))
    with home_in_use():
        mark = (tmp_path / "new" / MARK).read_text()
    (tmp_path / "new" / "notes.txt").write_text("put there later")
    with home_in_use(alone=True):
        assert (tmp_path / "new" / MARK).read_text() == mark


def test_a_run_holds_its_home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.config.params import load_config
    from pipelines.local import runner

    held = []

    def pipeline(*arguments: object) -> str:
        with pytest.raises(InputError), home_in_use(alone=True):
            raise AssertionError("nobody else held it")
        held.append(time.monotonic())
        return "run"

    monkeypatch.setattr(runner, "_run_pipeline", pipeline)
    assert runner.run_pipeline(load_config(ROOT / "params.yaml"), ROOT, None, "subprocess") == "run" and held  # type: ignore[arg-type]
    with home_in_use(alone=True):
        shutil.rmtree(own_home)
