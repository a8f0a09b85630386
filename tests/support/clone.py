"""A project in git and DVC, and edits that become commits on it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from components.common.provenance import write_code_of_data
from pipelines.ci.plan import Plan, make_plan
from tests.conftest import ROOT
from tests.support.repositories import dvc, git

DVC_YAML = {
    "stages": {
        "code": {"cmd": "prepare --code", "always_changed": True, "outs": [{"data/prepare.code": {"cache": False}}]},
        "prepare": {
            "cmd": "prepare",
            "deps": ["data/prepare.code", "data/sources.lock"],
            "params": ["prepare"],
            "outs": ["data/preferences", "data/instructions"],
        },
        "base_model": {"cmd": "prepare --base-model", "deps": ["data/sources.lock"], "outs": ["data/base_model"]},
    }
}


class Clone:
    """A project in git and DVC; every change is a commit on top of the same base."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("components", "pipelines"):
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for name in ("params.yaml", "requirements.lock", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, root)
        (root / "tests").mkdir()
        (root / "tests" / "test_x.py").write_text("")
        for name in ("preferences", "instructions", "base_model"):
            (root / "data" / name).mkdir(parents=True)
            (root / "data" / name / "train.jsonl").write_text('{"lang": "en"}\n{"lang": "zh"}\n')
        (root / "data" / "sources.lock").write_text("model: {}\n")
        write_code_of_data(root / "data")
        (root / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
        git(root, "init", "-q", "-b", "main")
        dvc(root, "init", "-q")
        dvc(root, "commit", "-q", "-f")
        git(root, "add", "-A")
        git(root, "commit", "-qm", "base")
        self.base = git(root, "rev-parse", "HEAD")

    def commit(self, *edits: "Edit") -> str:
        git(self.root, "checkout", "-q", self.base)
        for edit in edits:
            edit(self.root)
        git(self.root, "add", "-A")
        git(self.root, "commit", "-q", "--allow-empty", "-m", "change")
        return git(self.root, "rev-parse", "HEAD")

    def plan(self, *edits: "Edit", runner: str = "kubeflow") -> Plan:
        return make_plan(self.root, self.base, self.commit(*edits), runner)


Edit = Callable[[Path], object]


def setting(key: str, value: object) -> Edit:
    def edit(root: Path) -> None:
        params = yaml.safe_load((root / "params.yaml").read_text())
        section, name = key.split(".")
        params[section][name] = value
        (root / "params.yaml").write_text(yaml.safe_dump(params))

    return edit


def appended(path: str, text: str) -> Edit:
    def edit(root: Path) -> None:
        with (root / path).open("a") as file:
            file.write(text)

    return edit


def replaced(path: str, pattern: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        text, count = re.subn(pattern, new, (root / path).read_text(), count=1)
        assert count == 1, f"{pattern} is not in {path}"
        (root / path).write_text(text)

    return edit


def output(name: str) -> Edit:
    """A new digest of an output in dvc.lock, as after `dvc repro`."""
    return replaced("dvc.lock", rf"(path: {name}\n\s+hash: md5\n\s+md5: )\w{{32}}", rf"\g<1>{'5' * 32}")
