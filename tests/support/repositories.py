"""git and DVC commands on a folder, as a user runs them."""

import subprocess
import sys
from pathlib import Path

from tests.support import programs


def git(folder: Path, *args: str) -> str:
    """The output of a git command."""
    programs.check("git")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    process = subprocess.run(["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True)
    return process.stdout.strip()


def dvc(folder: Path, *args: str) -> None:
    """Run a DVC command."""
    programs.check("dvc")
    subprocess.run([sys.executable, "-P", "-m", "dvc", *args], cwd=folder, check=True, capture_output=True)
