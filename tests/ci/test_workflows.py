"""The workflows: valid by GitHub's schema, without the weaknesses that zizmor knows, and calling what there is."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import app
from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROGRAMS = Path(sys.executable).parent


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def zizmor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / "zizmor"), "--offline", "--no-config", "--no-progress", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def schema(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / "check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def unread(workflows: str) -> list[str]:
    """Variables of ours that workflows set and no code reads."""
    names = set(re.findall(r"^ +(KUBEALIGN_[A-Z_]+): ", workflows, re.MULTILINE))
    files = [path for folder in ("pipelines", "components") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    return sorted(name for name in names if f'"{name}"' not in code)


def test_what_a_workflow_sets_is_read() -> None:
    texts = "".join(path.read_text() for path in WORKFLOWS)
    assert unread(texts) == []
    assert unread(texts.replace("KUBEALIGN_RERUN:", "KUBEALIGN_ANEW:")) == ["KUBEALIGN_ANEW"]


def test_the_schema_and_zizmor_accept_the_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["check", "data", "promote", "retrain"]
    for done in (schema(*WORKFLOWS), zizmor("--persona", "pedantic", *map(str, WORKFLOWS))):
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_and_zizmor_have_teeth(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "data.yml").read_text()
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    broken = folder / "broken.yml"
    broken.write_text(text.replace("timeout-minutes: 60", "timeout: 60"))
    assert schema(broken).returncode
    for found, put in (
        ('"$PULL_REQUEST"', "${{ github.event.pull_request.title }}"),
        ("@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2", "@v6"),
        ("  pull_request:\n", "  pull_request_target:\n"),
        ("permissions: {}", "permissions: write-all"),
    ):
        assert found in text
        broken.write_text(text.replace(found, put))
        assert zizmor("--persona", "pedantic", str(broken)).returncode, put


def test_every_action_is_pinned_by_commit_with_its_version_beside_it() -> None:
    for path in WORKFLOWS:
        lines = [line for line in path.read_text().splitlines() if "- uses:" in line]
        assert lines and all(re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in lines)
    versions = {
        line.split("uses: ")[1] for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line
    }
    assert len({line.split("@")[0] for line in versions}) == len(versions), "one action, one version"


def test_rights_are_none_but_those_that_a_job_names() -> None:
    written = {}
    for path in WORKFLOWS:
        found = load(path)
        assert found["permissions"] == {} and "group" in found["concurrency"]
        for job in found["jobs"].values():
            assert "timeout-minutes" in job
            written[path.stem] = {right for right, kind in job["permissions"].items() if kind != "read"}
    assert written == {
        "check": set(),
        "data": {"pull-requests"},
        "promote": set(),
        "retrain": {"statuses", "pull-requests"},
    }
    assert load(ROOT / ".github" / "workflows" / "retrain.yml")["concurrency"]["cancel-in-progress"] is False


def test_no_expression_stands_in_a_script_and_no_secret_outside_the_steps_that_need_it() -> None:
    for path in WORKFLOWS:
        for step in steps(path):
            assert "${{" not in step.get("run", ""), step
        for job in load(path)["jobs"].values():
            assert "secrets." not in str(job.get("env", {})), path


def test_what_the_workflows_call_exists_with_these_options() -> None:
    called = [words for path in WORKFLOWS for step in steps(path) for words in kubealign(step.get("run", ""))]
    assert {" ".join(words[:2]) for words in called if words[0] == "ci"} == {
        "ci plan",
        "ci data-report",
        "ci comment",
        "ci retrain",
        "ci cancel",
        "ci summary",
        "ci status",
    }
    top: Any = typer.main.get_command(app)
    for words in called:
        command = top
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, (command.name, words)


def kubealign(script: str) -> list[list[str]]:
    """The words of every call of our command line in a script."""
    text = re.sub(r'\$\(([^)]*)\)"?', r"; \1 ;", script.replace("\\\n", " ").replace('"; ', "; "))
    lines = [part.strip() for line in text.splitlines() for part in re.split(r"[;|]|>>", line.split(" # ")[0])]
    found = []
    for line in lines:
        words = shlex.split(line.replace('"$(', "")) if line.count('"') % 2 == 0 else line.split()
        if words[:1] == ["exec"]:
            words = words[1:]
        if words and words[0].removeprefix(".venv/bin/") == "kubealign":
            found.append(words[1:])
    return found


@pytest.mark.parametrize(
    "word", ["kubealign images data", "exec kubealign ci plan --json", ".venv/bin/kubealign ci plan"]
)
def test_a_call_is_found_in_a_script(word: str) -> None:
    assert kubealign(f'echo x\ndocker push "$({word})"')[0][-1] in ("data", "--json", "plan")


@pytest.mark.parametrize(
    ("labels", "rebuild", "built"),
    [
        ({"data": "this", "train": "this"}, "false", False),
        ({"data": "this", "train": "this"}, "true", True),
        ({"data": "this", "train": "other"}, "false", True),
        ({"data": "this"}, "false", True),
    ],
)
def test_images_are_built_if_the_registry_lacks_those_of_this_code(
    tmp_path: Path, labels: dict[str, str], rebuild: str, built: bool
) -> None:
    """Whatever was pushed by earlier jobs, or not; the programs are stand-ins that answer as the real ones."""
    (step,) = (step for step in steps(ROOT / ".github" / "workflows" / "retrain.yml") if step.get("name") == "Images")
    programs = {
        "kubealign": 'case "$*" in "images --code") echo this ;; *) echo "r.example.com/$2" ;; esac',
        "make": f'echo "make $1" >> {tmp_path}/log',
        "docker": f"""case "$1" in
            login) cat > /dev/null ;;
            push) echo "push $2" >> {tmp_path}/log ;;
            *) for image in "$@"; do :; done; cat {tmp_path}/label-${{image##*/}} ;;
        esac""",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for kind, code in labels.items():
        image = {"config": {"Labels": {"kubealign.code": code}}}
        (tmp_path / f"label-{kind}").write_text(json.dumps(image))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REBUILD": rebuild, "KUBEALIGN_REGISTRY": "r.example.com/team"}
    environment |= {"REGISTRY_USER": "me", "REGISTRY_PASSWORD": "secret"}
    command = ["bash", "-e", "-c", step["run"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = tmp_path / "log"
    expected = ["make images", "push r.example.com/data", "push r.example.com/train"] if built else []
    assert (log.read_text().splitlines() if log.exists() else []) == expected
