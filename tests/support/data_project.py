"""A project with git, DVC and no data of anybody else's, rows to add to it, and `kubealign data` on it."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml
from typer.testing import CliRunner

from components.common.errors import KubealignError
from pipelines.cli import app
from tests.conftest import ROOT
from tests.support.repositories import git


def question(number: int) -> str:
    return (
        f"第{number}个问题：{number * 7919}年发生了什么？"
        if number % 2
        else f"What happened in {number * 7919}, no. {number}?"
    )


def rows(*numbers: int, **changes: str) -> list[dict[str, str]]:
    return [{"prompt": question(i), "chosen": f"good {i}", "rejected": f"bad {i}"} | changes for i in numbers]


def write(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


def make_project(root: Path) -> Path:
    root.mkdir()
    for name in (".dvc", "data", "components"):
        (root / name).mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"]["preferences"] = []
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for name in (
        "dvc.yaml",
        ".dvc/config",
        "data/sources.lock",
        ".gitignore",
        "data/.gitignore",
        "data/decontaminate.jsonl",
    ):
        shutil.copy(ROOT / name, root / name)
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    for dep in stages["prepare"]["deps"]:
        if dep.startswith("components/"):
            copy = shutil.copytree if (ROOT / dep).is_dir() else shutil.copy
            (root / dep).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / dep, root / dep)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "project")
    return root


def kubealign(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves the seconds of its imports, and as `main` ends it."""
    done = CliRunner().invoke(app, ["data", *words, "--project", str(root)], env={"COLUMNS": "160"})
    error = done.exception
    if isinstance(error, KubealignError):
        return subprocess.CompletedProcess(words, error.exit_code, done.stdout, str(error))
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)
