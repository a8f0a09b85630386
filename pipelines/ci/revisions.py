"""A commit of the project, read from git without checking it out: its files, and its state of DVC."""

import io
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import InputError, single_line
from components.config.params import PARAMS
from components.sources.data import LOCK, commit_of, is_url
from pipelines import git

MAIN = ("origin/main", "main")
CODE_FILE = "data/prepare.code"
"""What DVC's stage `code` writes and `prepare` depends on: the digest of the code that makes the data."""


class Revision:
    """A commit of a repository, as the project's files in it.

    Args:
        repo: the top of the repository's work tree.
        folder: the project's folder in it, as a path from its top.
        sha: the commit.
    """

    def __init__(self, repo: Path, folder: str, sha: str) -> None:
        self.repo, self.folder, self.sha = repo, folder, sha
        prefix = f"{folder}/" if folder else ""
        entries = git.query(repo, "ls-tree", "-r", "-z", "--end-of-options", sha).split("\0")
        named = (entry.split("\t", 1) for entry in entries if entry)
        self.files = {path.removeprefix(prefix): facts.split()[2] for facts, path in named if path.startswith(prefix)}
        """The git hash of every file, by its path in the project."""

    def content(self, path: str) -> bytes:
        """A file's content; empty when there is no such file."""
        blob = self.files.get(path)
        return git.run(self.repo, "cat-file", "blob", blob) if blob else b""

    def text(self, path: str) -> str:
        """A file's content as text; empty when there is no such file."""
        return self.content(path).decode("utf-8", errors="replace")

    def yaml(self, path: str) -> dict[str, Any]:
        """A YAML file's content; empty when there is no such file.

        Raises:
            InputError: no YAML, or no mapping.
        """
        try:
            found = yaml.safe_load(self.text(path)) or {}
        except yaml.YAMLError as error:
            raise InputError(f"{self.sha[:12]}:{path}: not valid YAML: {single_line(str(error))}") from error
        if not isinstance(found, dict):
            raise InputError(f"{self.sha[:12]}:{path}: expected keys and values, found {type(found).__name__}")
        return found

    @cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml as it stands, unchecked: an older commit may know other keys."""
        if PARAMS not in self.files:
            raise InputError(f"{self.sha[:12]}: no {PARAMS} in this commit; name a commit of the project")
        return self.yaml(PARAMS)

    @cached_property
    def outputs(self) -> dict[str, str]:
        """DVC's digest of every output, by its path: from dvc.lock and from .dvc files."""
        found = [out for stage in self.yaml(LOCK).get("stages", {}).values() for out in stage.get("outs", [])]
        digests = {str(out["path"]): str(out["md5"]) for out in found if "md5" in out and out["path"] != CODE_FILE}
        for path in self.files:
            if path.endswith(".dvc"):
                for out in self.yaml(path).get("outs", []):
                    digests[(Path(path).parent / out["path"]).as_posix()] = str(out.get("md5", ""))
        return digests

    def data_commit(self, digests: dict[str, str]) -> str:
        """The commit that `resolve` names as the version of the data."""
        return commit_of(self.repo, self.sha, digests)

    def below(self, folder: str) -> dict[str, str]:
        """The git hash of every file in a folder, or of the file itself."""
        return {path: blob for path, blob in self.files.items() if path == folder or path.startswith(f"{folder}/")}

    def write(self, names: list[str], out: Path) -> None:
        """Write files and folders of this commit below `out`."""
        wanted = {path: blob for name in names for path, blob in self.below(name).items()}
        listed = "".join(f"{blob}\n" for blob in wanted.values())
        answer = io.BytesIO(git.run(self.repo, "cat-file", "--batch", stdin=listed.encode()))
        for path in wanted:
            size = int(answer.readline().split()[2])
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(answer.read(size))
            answer.readline()


def find_repository(root: Path) -> tuple[Path, str]:
    """The top of the git repository around a project, and the project's folder in it.

    Raises:
        InputError: there is none.
    """
    repo = git.top_folder(root)
    folder = root.resolve().relative_to(repo.resolve()).as_posix()
    return repo, "" if folder == "." else folder


def default_base(repo: Path, head: str) -> str:
    """What a commit is compared with: where it left the main branch, and on the main branch the commit before it.

    Raises:
        InputError: no main branch, nothing in common with it, or no earlier commit.
    """
    for name in MAIN:
        main = _commit(repo, name)
        common = main and git.query(repo, "merge-base", main, head)
        base = common if common != head else _commit(repo, f"{head}^")
        if base:
            return base
    raise InputError(
        f"--base: {head[:12]} has nothing in common with {' or '.join(MAIN)}, or nothing before it; name a commit"
        + git.shallow_hint(repo)
    )


def _commit(repo: Path, name: str) -> str:
    return git.query(repo, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")


def origin(repo: Path) -> str:
    """The URL of the remote `origin`, without a user in it; empty without one."""
    return re.sub(r"^(https?://)[^/@]*@", r"\1", git.query(repo, "config", "--get", "remote.origin.url"))


def is_own(repo: Path, folder: str, named: str) -> bool:
    """Whether `data.repo` means the repository that the project is in: by its folder, or by the URL of its origin."""
    if is_url(named):
        return _plain(named) == _plain(origin(repo))
    top = repo.resolve()
    return (top / folder / named).resolve() == top


def _plain(url: str) -> str:
    """A URL without scheme, user and `.git`: https://host/a/b.git and git@host:a/b are one repository."""
    rest = re.sub(r"^[\w.+-]+://", "", url) if "://" in url else url.replace(":", "/", 1)
    return re.sub(r"(\.git)?/*$", "", re.sub(r"^[^/@]*@", "", rest)).lower()
