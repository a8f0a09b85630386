"""A commit of the project, read from git without a checkout: its files and its DVC outputs."""

import io
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import InputError, single_line
from components.common.urls import is_url
from components.config.params import PARAMS
from components.sources.data import LOCK, commit_of, recorded_outs
from pipelines import git

MAIN = ("origin/main", "main")
CODE_FILE = "data/prepare.code"
"""Digest of the code that makes the data: written by DVC's stage `code`, a dependency of `prepare`."""


class Revision:
    """The project's files at a commit of its repository.

    Args:
        repo: the top folder of the repository's work tree.
        folder: the project's folder, as a path relative to `repo`.
        sha: the commit.
    """

    def __init__(self, repo: Path, folder: str, sha: str) -> None:
        self.repo, self.folder, self.sha = repo, folder, sha
        prefix = f"{folder}/" if folder else ""
        entries = git.query(repo, "ls-tree", "-r", "-z", "--end-of-options", sha).split("\0")
        # Each entry is `<mode> <type> <hash>\t<path>`.
        split = [entry.split("\t", 1) for entry in entries if entry]
        inside = {path.removeprefix(prefix): info.split() for info, path in split if path.startswith(prefix)}
        self.files = {path: info[2] for path, info in inside.items()}
        """The git hash of every file, by its path in the project; for a submodule, its commit."""
        self.submodules = {path for path, info in inside.items() if info[1] == "commit"}

    def content(self, path: str) -> bytes:
        """A file's content; empty when there is no such file."""
        blob = "" if path in self.submodules else self.files.get(path)
        return git.run(self.repo, "cat-file", "blob", blob) if blob else b""

    def text(self, path: str) -> str:
        """A file's content as text; empty when there is no such file."""
        return self.content(path).decode("utf-8", errors="replace")

    def yaml(self, path: str) -> dict[str, Any]:
        """A YAML file's content; empty when there is no such file.

        Raises:
            InputError: not YAML, or not a mapping.
        """
        try:
            content = yaml.safe_load(self.text(path)) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.sha[:12]}:{path}: not valid YAML: {single_line(str(error))}") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.sha[:12]}:{path}: expected keys and values, found {type(content).__name__}")
        return content

    @cached_property
    def params(self) -> dict[str, Any]:
        """params.yaml as committed, not validated: an older commit may have other keys."""
        if PARAMS not in self.files:
            raise InputError(f"{self.sha[:12]}: no {PARAMS} in this commit; name a commit of the project")
        return self.yaml(PARAMS)

    @cached_property
    def outputs(self) -> dict[str, str]:
        """DVC's digest of every output, by its path: from dvc.lock and from .dvc files."""
        outs = self._outs(LOCK)
        digests = {out["path"]: str(out["md5"]) for out in outs if "md5" in out and out["path"] != CODE_FILE}
        for path in self.files:
            if path.endswith(".dvc"):
                for out in self._outs(path):
                    digests[(Path(path).parent / out["path"]).as_posix()] = str(out.get("md5", ""))
        return digests

    def _outs(self, path: str) -> list[dict[str, Any]]:
        return recorded_outs(self.content(path), f"{self.sha[:12]}:{path}")

    def data_commit(self, digests: dict[str, str]) -> str:
        """The commit that `resolve` would record as the version of the data."""
        return commit_of(self.repo, self.sha, digests, self.folder)

    def below(self, folder: str) -> dict[str, str]:
        """The git hash of every file in a folder; for a file, its own."""
        return {path: blob for path, blob in self.files.items() if path == folder or path.startswith(f"{folder}/")}

    def write(self, names: list[str], out: Path) -> None:
        """Write files and folders of this commit below `out`."""
        below = {path: blob for name in names for path, blob in self.below(name).items()}
        blobs = {path: blob for path, blob in below.items() if path not in self.submodules}
        requests = "".join(f"{blob}\n" for blob in blobs.values())
        batch = io.BytesIO(git.run(self.repo, "cat-file", "--batch", stdin=requests.encode()))
        for path in blobs:
            size = int(batch.readline().split()[2])
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(batch.read(size))
            batch.readline()


def find_repository(root: Path) -> tuple[Path, str]:
    """The top folder of the git repository that a project is in, and the project's path in it.

    Raises:
        InputError: the project is in no git repository.
    """
    repo = git.top_folder(root)
    folder = root.resolve().relative_to(repo.resolve()).as_posix()
    return repo, "" if folder == "." else folder


def branch_point(repo: Path, head: str) -> str | None:
    """The commit where a head branched off the main branch; empty on the main branch, None without a common one."""
    for name in MAIN:
        main = _commit(repo, name)
        common = main and git.query(repo, "merge-base", main, head)
        if common:
            return common if common != head else ""
    return None


def default_base(repo: Path, head: str) -> str:
    """The commit to compare a head with: where it branched off the main branch; on the main branch, its parent.

    Raises:
        InputError: no main branch, no common ancestor with it, or no parent commit.
    """
    branched = branch_point(repo, head)
    base = _commit(repo, f"{head}^") if branched == "" else branched
    if not base:
        raise InputError(
            f"--base: {head[:12]} has no common ancestor with {' or '.join(MAIN)}, or no parent; name a commit"
            + git.shallow_hint(repo)
        )
    return base


def _commit(repo: Path, name: str) -> str:
    return git.query(repo, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")


def origin(repo: Path) -> str:
    """The URL of the remote `origin`, without its user; empty if there is no such remote."""
    return re.sub(r"^(https?://)[^/@]*@", r"\1", git.query(repo, "config", "--get", "remote.origin.url"))


def is_own(repo: Path, folder: str, data_repo: str) -> bool:
    """Whether `data.repo` is the project's own repository, given as a path or as the URL of its origin."""
    if is_url(data_repo):
        return _normalize_url(data_repo) == _normalize_url(origin(repo))
    top = repo.resolve()
    return (top / folder / data_repo).resolve() == top


def _normalize_url(url: str) -> str:
    """A URL without scheme, user and `.git`: https://host/a/b.git and git@host:a/b are the same repository."""
    rest = re.sub(r"^[\w.+-]+://", "", url) if "://" in url else url.replace(":", "/", 1)
    return re.sub(r"(\.git)?/*$", "", re.sub(r"^[^/@]*@", "", rest)).lower()
