"""The git program: runs without hooks, prompts or translated messages, and finds the commits that names mean."""

import os
import re
import subprocess
from pathlib import Path

from components.common.errors import InputError

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
"""Variables that git sets for its hooks; they would name the hook's repository in place of the folder."""
NONE = 1
"""Exit code of a query of git that has no answer."""


def run(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """What a git command prints, run in a folder; what comes from outside stands behind `--end-of-options` or `--`.

    Raises:
        InputError: git is not installed, or fails; with its own words, which name the remedy for a foreign folder.
    """
    done = _run(folder, arguments, stdin)
    if done.returncode:
        raise _error(folder, done)
    return done.stdout


def query(folder: Path, *arguments: str) -> str:
    """As `run`, as text without the last line break; empty when git finds nothing, which it says by exit code 1.

    Raises:
        InputError: git is not installed, or fails.
    """
    done = _run(folder, arguments)
    if done.returncode not in (0, NONE):
        raise _error(folder, done)
    return "" if done.returncode else os.fsdecode(done.stdout).rstrip("\n")


def top_folder(folder: Path) -> Path:
    """The top of the work tree that a folder is in.

    Raises:
        InputError: it is in none.
    """
    return Path(query(folder, "rev-parse", "--show-toplevel"))


def find_commit(repo: Path, name: str) -> str:
    """The commit that a name means: a branch here or of `origin`, a tag, a hash or its beginning, also with ^ or ~2.

    Raises:
        InputError: no such commit in this clone.
    """
    for candidate in (name, f"origin/{name}"):
        found = query(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{candidate}^{{commit}}")
        if found:
            return found
    raise InputError(f"{name}: no such commit in this clone{shallow_hint(repo)}")


def shallow_hint(repo: Path) -> str:
    """What to add to an error about a commit that is not there: nothing, unless the clone is a shallow one."""
    if query(repo, "rev-parse", "--is-shallow-repository") != "true":
        return ""
    return "; it is a shallow clone: `git fetch --unshallow` brings the rest (in GitHub Actions: fetch-depth: 0)"


def changed_files(repo: Path) -> list[str]:
    """Tracked files that differ from the commit that is checked out."""
    found = query(repo, "diff", "--name-only", "--no-ext-diff", "-z", "HEAD", "--")
    return [name for name in found.split("\0") if name]


def tags(repo: Path) -> dict[str, list[str]]:
    """The tags of each commit that has any."""
    found: dict[str, list[str]] = {}
    for line in query(
        repo, "for-each-ref", "--format=%(objectname) %(*objectname) %(refname:strip=2)", "refs/tags"
    ).splitlines():
        tagged, peeled, name = line.split(" ", 2)
        found.setdefault(peeled or tagged, []).append(name)
    return found


def content(repo: Path, commit: str, path: str) -> bytes:
    """A file's content in a commit, by its path from the top of the work tree; empty when there is no such file."""
    blob = query(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}:{path}")
    return run(repo, "cat-file", "blob", blob) if blob else b""


def _run(folder: Path, arguments: tuple[str, ...], stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    inherited = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_REPOSITORY}
    command = ["git", *OPTIONS, "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, input=stdin, env=inherited | ENVIRONMENT, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise InputError("git: no such program on the PATH; install git") from error


def _error(folder: Path, done: "subprocess.CompletedProcess[bytes]") -> InputError:
    said = " ".join(os.fsdecode(done.stderr).split())
    if "not a git repository" in said:
        return InputError(f"{folder}: not in a git repository; expected a clone of the project")
    return InputError(f"{folder}: git: {re.sub(r'^fatal: ', '', said) or f'ended with code {done.returncode}'}")
