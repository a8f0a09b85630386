"""Git commands, run without hooks, prompts or translated messages; and queries of commits, files and tags."""

import os
import re
import subprocess
from pathlib import Path

from components.common.errors import InputError
from components.sources.data import SHALLOW

OPTIONS = (
    "--no-pager",
    "--no-optional-locks",
    "--no-replace-objects",
    "--literal-pathspecs",
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "core.fsmonitor=false"),
    *("-c", "advice.detachedHead=false"),
)
ENVIRONMENT = {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
OF_ANOTHER_REPOSITORY = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
)
"""Variables that git sets for its hooks; inherited, they would point to the hook's repository."""
NONE = 1
"""Exit code of a git query that finds nothing."""


def run(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """Standard output of a git command run in a folder; pass untrusted arguments after `--end-of-options` or `--`.

    Raises:
        InputError: git is not installed, or fails; with git's own message, which names the remedy for a folder with
            another owner.
    """
    process = _run(folder, arguments, stdin)
    if process.returncode:
        raise _error(folder, process)
    return process.stdout


def query(folder: Path, *arguments: str) -> str:
    """Like `run`, but as text without the trailing line break; empty if git finds nothing (exit code 1).

    Raises:
        InputError: git is not installed, or fails.
    """
    process = _run(folder, arguments)
    if process.returncode not in (0, NONE):
        raise _error(folder, process)
    return "" if process.returncode else os.fsdecode(process.stdout).rstrip("\n")


def top_folder(folder: Path) -> Path:
    """The top of the work tree that a folder is in.

    Raises:
        InputError: the folder is in no git repository.
    """
    return Path(query(folder, "rev-parse", "--show-toplevel"))


def find_commit(repo: Path, name: str) -> str:
    """The commit that a name refers to: a local or `origin` branch, a tag, a full or short hash, also with ^ or ~2.

    Raises:
        InputError: no such commit in this clone.
    """
    for candidate in (name, f"origin/{name}"):
        commit = query(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{candidate}^{{commit}}")
        if commit:
            return commit
    raise InputError(f"{name}: no such commit in this clone{shallow_hint(repo)}")


def shallow_hint(repo: Path) -> str:
    """A hint to append to an error about a missing commit; empty unless the clone is shallow."""
    if query(repo, "rev-parse", "--is-shallow-repository") != "true":
        return ""
    return f"; this is {SHALLOW}"


def changed_files(repo: Path) -> list[str]:
    """Tracked files that differ from the checked-out commit."""
    names = query(repo, "diff", "--name-only", "--no-ext-diff", "-z", "HEAD", "--")
    return [name for name in names.split("\0") if name]


def tags(repo: Path) -> dict[str, list[str]]:
    """The tags of every commit that has any."""
    commit_tags: dict[str, list[str]] = {}
    for line in query(
        repo, "for-each-ref", "--format=%(objectname) %(*objectname) %(refname:strip=2)", "refs/tags"
    ).splitlines():
        tagged, peeled, name = line.split(" ", 2)
        commit_tags.setdefault(peeled or tagged, []).append(name)
    return commit_tags


def content(repo: Path, commit: str, path: str) -> bytes:
    """A file's content in a commit, by its path relative to the top folder; empty if there is no such file."""
    blob = query(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}:{path}")
    return run(repo, "cat-file", "blob", blob) if blob else b""


def _run(folder: Path, arguments: tuple[str, ...], stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    inherited = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_REPOSITORY}
    command = ["git", *OPTIONS, "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, input=stdin, env=inherited | ENVIRONMENT, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise InputError("git: no such program on the PATH; install git") from error


def _error(folder: Path, process: "subprocess.CompletedProcess[bytes]") -> InputError:
    message = " ".join(os.fsdecode(process.stderr).split())
    if "not a git repository" in message:
        return InputError(f"{folder}: not in a git repository; expected a clone of the project")
    return InputError(f"{folder}: git: {re.sub(r'^fatal: ', '', message) or f'exited with code {process.returncode}'}")
