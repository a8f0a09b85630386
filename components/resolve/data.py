"""Which data a revision means: its commit, the DVC digests of the folders, and whether a commit records just that."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import InputError

WORKSPACE = "workspace"
DATA_FOLDERS = ("data/preferences", "data/instructions")
EMBEDDED_MODEL = "data/base_model"
TEST_SET = "data/preferences/test.jsonl"


@dataclass(frozen=True)
class DataVersion:
    """A version of the data set; digests are DVC's md5 of a folder, `<32 hex digits>.dir`.

    `test_set` is the md5 of the test side's pairs, empty where none were asked for; `clean` says that a commit records
    just these folders.
    """

    commit: str
    digests: dict[str, str]
    test_set: str
    clean: bool


def is_url(repo: str) -> bool:
    """Whether a repository is named by URL (or scp-like address) rather than by path."""
    return "://" in repo or repo.startswith("git@")


def workspace_digest(root: Path, folder: str) -> str:
    """DVC's digest of a folder as it stands in the workspace, whatever dvc.lock says.

    Raises:
        InputError: the folder is not there, or `root` is no DVC repository.
    """
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB

    path = root / folder
    if not (root / ".dvc").is_dir():
        raise InputError(f"{root}: not a DVC repository; `dvc init` makes it one, or name another data.repo")
    if not path.is_dir() or not any(path.iterdir()):
        raise InputError(f"{path}: not found or empty; `make data` (dvc repro) makes it, `dvc pull` fetches it")
    # Without dvc.repo.Repo, which wants to write below .dvc: a step may see the repository read-only.
    _, _, tree = build(LocalHashFileDB(localfs, str(root / ".dvc" / "cache")), str(path), localfs, "md5", dry_run=True)
    return str(tree.hash_info.value)


def resolve_data(repo: str, revision: str, folders: tuple[str, ...] = DATA_FOLDERS) -> DataVersion:
    """The commit and digests that a repository and revision mean now.

    A revision resolves to the commit that gave the folders their present content, so that commits which leave the
    data alone do not make a new version.

    Raises:
        InputError: no such repository, revision or folder.
    """
    if revision == WORKSPACE:
        if is_url(repo):
            raise InputError(
                f"data.revision=workspace needs a local repository, and data.repo is {repo}; name a branch"
            )
        root = Path(repo).resolve()
        digests = {folder: workspace_digest(root, folder) for folder in folders}
        return DataVersion(WORKSPACE, digests, _workspace_test_set(root, folders), _is_committed(root, digests))
    with opened(repo, revision) as fs:
        digests = {}
        for folder in folders:
            try:
                digests[folder] = str(fs.info(folder)["dvc_info"]["md5"])
            except (FileNotFoundError, KeyError) as error:
                raise InputError(f"{repo}@{revision}: {folder} is not a DVC-tracked folder there") from error
        test_set = str(fs.info(TEST_SET)["dvc_info"]["md5"]) if _holds_test_set(folders) else ""
        commit = fs.repo.scm.resolve_rev(revision)
        return DataVersion(_commit_of(Path(fs.repo.scm.root_dir), commit, digests), digests, test_set, clean=True)


def _holds_test_set(folders: tuple[str, ...]) -> bool:
    return any(TEST_SET.startswith(f"{folder}/") for folder in folders)


def _workspace_test_set(root: Path, folders: tuple[str, ...]) -> str:
    if not _holds_test_set(folders):
        return ""
    try:
        with (root / TEST_SET).open("rb") as file:
            # As DVC names the file, so that a commit and the workspace mean the same test set.
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except FileNotFoundError as error:
        raise InputError(f"{root / TEST_SET}: not found; `make data` (dvc repro) makes it") from error


def _is_committed(root: Path, digests: dict[str, str]) -> bool:
    """Whether the commit that is checked out records these digests, in dvc.lock or in a .dvc file."""
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo

    try:
        with Repo.discover(str(root)) as repo:
            recorded = _recorded(repo, repo.head().decode(), tuple(digests))
    except (NotGitRepository, KeyError):
        return False
    return all(recorded.get(folder) == md5 for folder, md5 in digests.items())


class opened:  # noqa: N801 - reads as the context manager it is: `with opened(repo, revision) as fs`
    """A repository at a revision as a read-only file system; a URL is cloned, without a git binary."""

    def __init__(self, repo: str, revision: str) -> None:
        self.repo, self.revision = repo, revision

    def __enter__(self) -> Any:
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc.scm import SCMError

        try:
            self.fs = DVCFileSystem(url=self.repo, rev=self.revision)
            self.fs.info("/")  # the repository is opened only when something is asked of it
        except (DvcException, SCMError) as error:
            raise InputError(
                f"data.repo={self.repo}, data.revision={self.revision}: {' '.join(str(error).split())};"
                " expected a git repository with DVC data and a branch, tag or commit of it"
            ) from error
        return self.fs

    def __exit__(self, *exception: object) -> None:
        self.fs.close()


def _commit_of(root: Path, commit: str, digests: dict[str, str]) -> str:
    """The oldest commit of an unbroken line back from `commit` in which dvc.lock gives the folders these digests."""
    from dulwich.repo import Repo

    oldest = commit
    with Repo(str(root)) as repo:
        for sha in _lock_changes(repo, commit):
            recorded = _recorded(repo, sha)
            if any(recorded.get(folder) != md5 for folder, md5 in digests.items()):
                break
            oldest = sha
    return oldest


def _lock_changes(repo: Any, commit: str) -> Iterator[str]:
    for entry in repo.get_walker(include=[commit.encode()], paths=[b"dvc.lock"]):
        yield entry.commit.id.decode()


def _recorded(repo: Any, sha: str, folders: tuple[str, ...] = ()) -> dict[str, str]:
    """Digests that a commit records: all of dvc.lock, and of `folders` those that have a .dvc file of their own."""
    lock = _yaml_at(repo, sha, "dvc.lock")
    outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
    found = {out["path"]: out["md5"] for out in outs if "md5" in out}
    for folder in folders:
        for out in _yaml_at(repo, sha, f"{folder}.dvc").get("outs", []):
            found[folder] = out.get("md5", "")
    return found


def _yaml_at(repo: Any, sha: str, path: str) -> dict[str, Any]:
    from dulwich.object_store import tree_lookup_path

    try:
        _, blob = tree_lookup_path(repo.__getitem__, repo[sha.encode()].tree, path.encode())
    except KeyError:
        return {}
    found: dict[str, Any] = yaml.safe_load(repo[blob].data) or {}
    return found
