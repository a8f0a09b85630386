"""What `--runner docker` does around KFP's DockerRunner, as far as no engine is needed."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker
import pytest
from kfp.local import docker_task_handler

from components.common.errors import InputError
from pipelines.local import containers
from tests.conftest import ROOT

NO_ENGINE = "unix:///nowhere/docker.sock"


class Gone:
    """A container that the engine has removed before anybody asked how it ended."""

    def __getattr__(self, name: str) -> Any:
        def gone(*args: Any, **kwargs: Any) -> Any:
            raise docker.errors.NotFound("no such container")

        return gone if name in ("attach", "logs", "wait") else lambda *args, **kwargs: None


class Engine:
    """A client whose containers are all gone."""

    class containers:  # noqa: N801 - the name of the client's attribute
        """Creates them."""

        run = create = staticmethod(lambda **kwargs: Gone())

    class images:  # noqa: N801
        """Knows one image."""

        list = staticmethod(lambda: [type("Image", (), {"tags": ["x:1"], "attrs": {"RepoDigests": []}})])


def test_a_container_that_is_gone_is_a_success_to_kfps_own_function_and_an_error_to_ours() -> None:
    original = importlib.reload(docker_task_handler).run_docker_container
    assert original(Engine(), "x:1", ["true"], {}) == 0  # should KFP have mended this, ours can go
    with pytest.raises(docker.errors.NotFound):
        containers.run_container(Engine(), "x:1", ["true"], {})


def test_the_recorded_exit_code_counts_and_the_container_is_removed() -> None:
    removed = []

    class Ended:
        start = staticmethod(lambda: None)
        attach = staticmethod(lambda stream: iter([b"last words\n"]))
        wait = staticmethod(lambda: {"StatusCode": 137})

        @staticmethod
        def remove(force: bool) -> None:
            removed.append(force)

    class Client:
        class containers:  # noqa: N801
            create = staticmethod(lambda **kwargs: Ended())

    assert containers.run_container(Client(), "x:1", ["true"], {}) == 137
    assert removed == [True]


def test_without_an_engine_the_run_ends_with_a_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", NO_ENGINE)
    words = [sys.executable, "-P", "-m", "pipelines.cli", "run", "--runner", "docker", "--project", str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: no container engine answers; start Docker")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(InputError, match="DOCKER_HOST"):
        containers.engine()


def test_steps_read_the_repository_the_content_of_its_local_stores_and_the_base_model(tmp_path: Path) -> None:
    repo, store, base = tmp_path / "repo", tmp_path / "store" / "files" / "md5", tmp_path / "base"
    for folder in (repo / ".dvc", store, base, tmp_path / "project"):
        folder.mkdir(parents=True)
    (repo / ".dvc" / "config").write_text(
        "[core]\n    remote = here\n['remote \"here\"']\n    url = ../../store\n['remote \"s3\"']\n    url = s3://b\n"
    )
    arguments = {"data_section": f'{{"repo": "{repo}"}}', "base_model": str(base)}
    assert containers._read_only(tmp_path / "project", arguments) == [base, repo, store]


def test_the_codes_digest_follows_the_code_and_not_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "components" / "x" / "tests").mkdir(parents=True)
    code = tmp_path / "components" / "x" / "stage.py"
    code.write_text("one")
    monkeypatch.setattr(containers, "PACKAGES", tmp_path)
    before = containers.code_in_images()
    (tmp_path / "components" / "x" / "tests" / "test_x.py").write_text("test")
    assert containers.code_in_images() == before
    (tmp_path / "components" / "README.md").write_text("text")
    assert containers.code_in_images() == before
    code.write_text("two")
    assert containers.code_in_images() != before
    code.write_text("one")
    (tmp_path / "components" / "Containerfile").write_text("FROM other")
    assert containers.code_in_images() != before
