"""`make setup` and `make audit` on machines that lack something."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


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
    assert f"tools/install_locked.py --torch-index {index} local" in with_index
    assert "--torch-index" not in make(tmp_path, "-n", "setup").stdout


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
    done = make(
        tmp_path,
        *(f"--old-file={tmp_path}/venv/{name}" for name in (".ready", ".ready-dev")),
        "audit",
        f"AUDIT={audit}",
    )
    assert done.returncode == code and script.split("echo ")[1].split(";", maxsplit=1)[0] in done.stdout
    assert ("error:" in done.stderr) == bool(message) and message in done.stderr
