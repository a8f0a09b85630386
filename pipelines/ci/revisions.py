"""A commit of the project, read from git without a work tree or a git binary: its files, and its state of DVC."""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import InputError, single_line
from components.config.params import PARAMS
from components.sources.data import LOCK, commit_of, is_url

MAIN = ("origin/main", "main")
CODE_FILE = "data/prepare.code"
"""What DVC's stage `code` writes and `prepare` depends on: the digest of the code that makes the data."""


class Revision:
    """A commit of a repository, as the project's files in it.

    Args:
        repo: dulwich's repository.
        folder: the project's folder in it, as a path from its top.
        sha: the commit.
    """

    def __init__(self, repo: Any, folder: str, sha: str) -> None:
        from dulwich.object_store import iter_tree_contents

        self.repo, self.folder, self.sha = repo, folder, sha
        prefix = f"{folder}/" if folder else ""
        found = iter_tree_contents(repo.object_store, repo[sha.encode()].tree)
        named = ((entry.path.decode(errors="replace"), entry.sha.decode()) for entry in found)
        self.files = {path.removeprefix(prefix): blob for path, blob in named if path.startswith(prefix)}
        """The git hash of every file, by its path in the project."""

    def content(self, path: str) -> bytes:
        """A file's content; empty when there is no such file."""
        blob = self.files.get(path)
        return self.repo[blob.encode()].data if blob else b""

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
        return commit_of(Path(self.repo.path), self.sha, digests)

    def below(self, folder: str) -> dict[str, str]:
        """The git hash of every file in a folder, or of the file itself."""
        return {path: blob for path, blob in self.files.items() if path == folder or path.startswith(f"{folder}/")}

    def write(self, names: list[str], out: Path) -> None:
        """Write files and folders of this commit below `out`."""
        for name in names:
            for path, blob in self.below(name).items():
                target = out / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.repo[blob.encode()].data)


@contextmanager
def opened_repository(root: Path) -> Iterator[tuple[Any, str]]:
    """The git repository around a project, and the project's folder in it.

    Raises:
        InputError: there is none.
    """
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo

    try:
        repo = Repo.discover(str(root))
    except NotGitRepository as error:
        raise InputError(f"{root}: not in a git repository; expected a clone of the project") from error
    with repo:
        folder = root.resolve().relative_to(Path(repo.path).resolve()).as_posix()
        yield repo, "" if folder == "." else folder


def find_commit(repo: Any, name: str) -> str:
    """The commit that a name means: a branch, tag, abbreviated or whole hash, also as in `HEAD^` and `HEAD~2`.

    Raises:
        InputError: no such commit in this clone.
    """
    from scmrepo.exceptions import RevError
    from scmrepo.git import Git

    try:
        with closing(Git(repo.path)) as scm:
            return str(scm.resolve_rev(name))
    except RevError as error:
        raise InputError(
            f"{name}: no such commit in this clone; a shallow clone lacks it (in GitHub Actions: fetch-depth: 0)"
        ) from error


def default_base(repo: Any, head: str) -> str:
    """What a commit is compared with: where it left the main branch, and on the main branch the commit before it.

    Raises:
        InputError: no main branch, nothing in common with it, or no earlier commit.
    """
    from dulwich.graph import find_merge_base

    for name in MAIN:
        try:
            main = find_commit(repo, name)
        except InputError:
            continue
        common = [found.decode() for found in find_merge_base(repo, [main.encode(), head.encode()])]
        if common and common[0] != head:
            return str(common[0])
        parents = repo[head.encode()].parents
        if common and parents:
            return str(parents[0].decode())
    raise InputError(
        f"--base: {head[:12]} has nothing in common with {' or '.join(MAIN)}, or nothing before it; name a commit"
    )


def origin(repo: Any) -> str:
    """The URL of the remote `origin`, without a user in it; empty without one."""
    try:
        return re.sub(r"^(https?://)[^/@]*@", r"\1", repo.get_config().get((b"remote", b"origin"), b"url").decode())
    except KeyError:
        return ""


def is_own(repo: Any, folder: str, named: str) -> bool:
    """Whether `data.repo` means the repository that the project is in: by its folder, or by the URL of its origin."""
    if is_url(named):
        return _plain(named) == _plain(origin(repo))
    top = Path(repo.path).resolve()
    return (top / folder / named).resolve() == top


def _plain(url: str) -> str:
    """A URL without scheme, user and `.git`: https://host/a/b.git and git@host:a/b are one repository."""
    rest = re.sub(r"^[\w.+-]+://", "", url) if "://" in url else url.replace(":", "/", 1)
    return re.sub(r"(\.git)?/*$", "", re.sub(r"^[^/@]*@", "", rest)).lower()
