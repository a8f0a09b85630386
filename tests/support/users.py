"""Programs run as a user who is only a number, as in a container."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

NUMBERS = {"of the image": (10001, 0), "without a group": (10001, 10001), "drawn by OpenShift": (1000660000, 0)}
"""User and group ids without a line in /etc/passwd."""


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that everyone may enter; into pytest's own only its owner may."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        yield folder


def run_as(
    user: tuple[int, int], code: list[str], folder: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python as a number, with nothing but these variables, and the umask of a careful cluster."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    words = ["setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups", sys.executable, "-P", *code]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"} | environment
    return subprocess.run(
        words, env=environment, cwd=folder, umask=0o077, capture_output=True, text=True, check=False, timeout=120
    )
