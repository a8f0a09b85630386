"""A setting names no file of the machine that a step runs on: a file's text travels as a value that the CLI read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.common.errors import InputError
from components.config.params import config_from_arguments, load_config, pipeline_arguments
from components.dataset import chat
from components.dataset.chat import MAX_TEMPLATE_BYTES, choose_template, read_template, template_digest
from components.sources.base_model import resolve_base
from tests.conftest import ROOT

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a template of its own, beside a file that is none of its."""
    (tmp_path / "secret").write_text("{{ s3cr3t }}")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (folder / "mine.jinja").write_text(TEMPLATE)
    (folder / "link.jinja").symlink_to(tmp_path / "secret")
    (folder / "plain.txt").write_text("password: s3cr3t")
    (folder / "long.jinja").write_text(TEMPLATE + "x" * MAX_TEMPLATE_BYTES)
    return folder


FOREIGN = ["/proc/self/environ", "/etc/passwd", "../secret", "link.jinja", "plain.txt", "long.jinja", ".", "/dev/zero"]


@pytest.mark.parametrize("name", FOREIGN)
def test_the_cli_reads_a_template_of_the_project_alone(project: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"model\.chat_template") as error:
        load_config(project / "params.yaml", [f"model.chat_template={name}"])
    assert "s3cr3t" not in str(error.value)


def test_the_text_of_a_file_travels_to_the_step(project: Path) -> None:
    config = load_config(project / "params.yaml", ["model.chat_template=mine.jinja"])
    (project / "mine.jinja").unlink()
    arguments = pipeline_arguments(config)
    there = config_from_arguments(arguments).model.chat_template
    assert choose_template(there, None) == TEMPLATE
    assert template_digest(there) == template_digest(f"{TEMPLATE}\n") != template_digest("model") == "model"


@pytest.mark.parametrize("name", [*FOREIGN, "mine.jinja"])
def test_a_step_reads_no_file_by_name_whatever_the_run_form_says(
    project: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    arguments = pipeline_arguments(load_config(project / "params.yaml"))
    model = json.loads(arguments["model_section"]) | {"chat_template": name}
    config = config_from_arguments(arguments | {"model_section": json.dumps(model)})
    with pytest.raises(InputError, match="a step reads no file by name"):
        choose_template(config.model.chat_template, TEMPLATE)


def test_without_the_list_of_names_the_file_would_be_the_template(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "shipped_templates", lambda: {"/proc/self/environ": Path("/proc/self/environ")})
    assert "PATH=" in choose_template("/proc/self/environ", None)


def test_fetch_by_its_own_command_gives_away_nothing(project: Path) -> None:
    (project / "params_env.yaml").write_text("model: {chat_template: /proc/self/environ}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": "aws-s3cr3t"}
    command = [sys.executable, "-P", "-m", "components", "fetch", "--params", "params_env.yaml", "--out", "out"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "model.chat_template" in done.stderr and "aws-s3cr3t" not in done.stderr
    assert not (project / "out").exists()


@pytest.mark.parametrize("base", ["/var/run/secrets", ".", "/tmp", "~"])  # noqa: S108
def test_a_pod_takes_no_folder_for_a_base_model(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "a-run")
    config = load_config(ROOT / "params.yaml", [f"model.base={base}"])
    with pytest.raises(InputError, match="a pod sees no folder"):
        resolve_base(config.model, config.data)


def test_a_list_for_decontamination_is_a_plain_name(project: Path) -> None:
    for name in ("/etc/passwd", "../secret", "a/b.jsonl", "..\\x.jsonl"):
        with pytest.raises(InputError, match=r"validate\.decontamination_file"):
            load_config(project / "params.yaml", [f"validate.decontamination_file={name}"])


def test_read_template_leaves_names_alone(project: Path) -> None:
    for name in ("model", "chatml", "llama2", TEMPLATE):
        assert read_template(name, project) == name
