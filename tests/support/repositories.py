"""git and DVC on a folder, as a person uses them."""

import subprocess
import sys
from pathlib import Path

from tests.support import programs


def git(folder: Path, *words: str) -> str:
    """What a git command prints."""
    programs.check("git")
    identity_words = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity_words, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def dvc(folder: Path, *words: str) -> None:
    """Run a DVC command."""
    programs.check("dvc")
    subprocess.run([sys.executable, "-P", "-m", "dvc", *words], cwd=folder, check=True, capture_output=True)
