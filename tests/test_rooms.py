"""The contracts in pyproject.toml about which room imports which: the tree keeps them, and a breach is seen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of both packages and of the contracts."""
    for package in ("components", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache", "--no-logo"], cwd=tree, capture_output=True, text=True, check=False)


def test_the_rooms_keep_their_contracts(tree: Path) -> None:
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 6 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("components.dpo.stage", "components.validate.stage"),
        ("components.tracking.run", "components.registry.audit"),
        ("components.engine.loop", "components.tracking.run"),
        ("components.sft.stage", "pipelines.project"),
        ("components.dpo.config", "components.tracking.run"),
        ("pipelines.project", "pipelines.cli"),
    ],
)
def test_an_import_against_the_contracts_is_noticed(tree: Path, module: str, imported: str) -> None:
    with (tree / module.replace(".", "/")).with_suffix(".py").open("a", encoding="utf-8") as file:
        file.write(f"import {imported}\n")
    done = lint_imports(tree)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{module} -> {imported}" in done.stdout
