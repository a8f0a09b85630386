"""What an attacker brings: a data repository with his own configuration, a server that notes what it is sent."""

import atexit
import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from components.sources.data import data_folders
from tests.support.repositories import dvc, git
from tests.support.services import QuietHandler, serving


def config(core: str = "") -> str:
    """The beginning of a .dvc/config, to which the lines of its remote are to be added."""
    return f"[core]\n    remote = store\n{core}['remote \"store\"']\n"


@dataclass
class Recorder:
    """A server that asks everybody to log in, and what it was sent."""

    address: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Authorization header of each request, with what Basic hides in plain text."""

    def secrets(self) -> str:
        return " ".join(secret for _, secret in self.requests)


@contextmanager
def recorder() -> Iterator[Recorder]:
    class Handler(QuietHandler):
        def answer(self) -> None:
            sent = self.headers.get("Authorization", "")
            kind, _, content = sent.partition(" ")
            sent = base64.b64decode(content).decode() if kind == "Basic" else sent
            notes.requests.append((self.path, sent))
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_HEAD = do_PUT = answer

    with serving(Handler) as address:
        notes = Recorder(address)
        yield notes


@cache
def _plain() -> Path:
    """A repository with both data sets, which the others are copies of: `dvc add` takes seconds."""
    scratch = Path(tempfile.mkdtemp(prefix="kubealign-tests-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    root = scratch / "plain-data-repository"
    root.mkdir()
    git(root, "init", "-q")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text(f"{config()}    url = {scratch}/store\n")
    (root / ".dvc" / ".gitignore").write_text("/cache\n/tmp\n")
    for folder in data_folders("data"):
        (root / folder).mkdir(parents=True)
        (root / folder / "train.jsonl").write_text(f"{folder}\n")
    dvc(root, "add", "-q", *data_folders("data"))
    dvc(root, "push", "-q")
    shutil.rmtree(root / ".dvc" / "cache")
    return root


def data_repository(root: Path, remote: str = "", files: dict[str, str] | None = None, core: str = "") -> Path:
    """A git and DVC repository with both data sets in it, whose content is in its remote alone.

    Args:
        root: where to make it.
        remote: lines of its default remote, and whatever else .dvc/config is to have; a folder that has the content
            without.
        files: more files to commit.
        core: more lines of the section `core`.
    """
    shutil.copytree(_plain(), root)
    if remote or core:
        remote = remote or f"    url = {_plain().parent}/store\n"
        (root / ".dvc" / "config").write_text(config(core) + remote)
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "add", "-A", "--force", ".dvc/config", *(files or {}))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "data")
    return root
