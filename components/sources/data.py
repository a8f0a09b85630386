"""Resolution of a data revision: its commit, the DVC digests of the folders, and whether a commit records them."""

import errno
import hashlib
import heapq
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from components.common.errors import InputError, KubealignError, error_chain, single_line
from components.common.files import inside
from components.common.limits import ANSWER_S, answer_limit, time_limit
from components.common.secrets import without_credentials, without_query
from components.common.urls import check_repository, is_url, parse_url
from components.dataset.records import NO_DATA
from components.sources import remotes
from components.tracking.store import in_pod

WORKSPACE = "workspace"
DATA_SETS = ("preferences", "instructions")
LOCK = "dvc.lock"
SHALLOW = "a shallow clone: `git fetch --unshallow` gets the rest (in GitHub Actions: fetch-depth: 0)"
PARTIAL = "a partial clone, which lacks old objects: clone all of it"
"""Of a history that ends too early, as SHALLOW."""
OPEN_LIMIT_S = 600.0
"""Longest time to clone a repository: its history and DVC's records, not the data."""
Folders = tuple[str, ...]
Outs = dict[str, dict[str, Any]]
"""DVC's record of each folder: md5, size in bytes, number of files."""


@dataclass(frozen=True)
class DataVersion:
    """A version of the data set; digests are DVC's md5 of a folder, `<32 hex digits>.dir`.

    `test_set` is the md5 of the test split's pairs, empty where they were not among the folders; `clean` means that a
    commit records exactly these folders.
    """

    commit: str
    digests: dict[str, str]
    test_set: str
    clean: bool


def data_folders(path: str) -> Folders:
    """The folders of both data sets in a repository, for its data.path."""
    return tuple((PurePosixPath(path) / name).as_posix() for name in DATA_SETS)


def embedded_model(path: str) -> str:
    """The folder of the embedded base model, for the repository's data.path."""
    return (PurePosixPath(path) / "base_model").as_posix()


def workspace_digest(root: Path, folder: str) -> str:
    """DVC's digest of a folder as it is in the workspace, whatever dvc.lock says.

    Raises:
        InputError: the folder does not exist, or `root` is not a DVC repository.
    """
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB

    path = root / folder
    if not (root / ".dvc").is_dir():
        raise InputError(f"{root}: not a DVC repository; `dvc init` makes it one, or name another data.repo")
    if not path.is_dir() or not any(path.iterdir()):
        raise InputError(f"{path}: not found or empty; {NO_DATA}")
    # Without dvc.repo.Repo, which writes below .dvc: a step may see the repository read-only.
    _, _, tree = build(LocalHashFileDB(localfs, str(root / ".dvc" / "cache")), str(path), localfs, "md5", dry_run=True)
    return str(tree.hash_info.value)


def resolve_data(repo: str, revision: str, folders: Folders) -> DataVersion:
    """Resolve a repository and revision to a commit and digests.

    A revision resolves to the commit that gave the folders their present content, so that commits that leave the data
    unchanged do not make a new version.

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
    with opened(repo, revision, folders) as fs:
        digests = {folder: recorded_digest(fs, folder, f"{repo} at {revision}") for folder in folders}
        test_file = _test_file(folders)
        # The list of a folder's files is content too, and may have to come from a remote.
        preferences = str(PurePosixPath(test_file).parent)
        reading = remote_errors(repo, revision, preferences, digests.get(preferences, ""))
        with _remote_limit(repo, revision), reading:
            try:
                test_set = str(fs.info(test_file)["dvc_info"]["md5"]) if test_file else ""
            except FileNotFoundError:
                test_set = ""
        commit = fs.repo.scm.resolve_rev(revision)
        return DataVersion(commit_of(Path(fs.repo.scm.root_dir), commit, digests), digests, test_set, clean=True)


def recorded_digest(fs: Any, folder: str, where: str) -> str:
    """DVC's digest of a folder in an opened repository; `where` names the repository and the revision.

    Raises:
        InputError: DVC does not track it there.
    """
    try:
        return str(fs.info(folder)["dvc_info"]["md5"])
    except (FileNotFoundError, KeyError) as error:
        raise InputError(f"{without_credentials(where)}: {folder} is not a DVC-tracked folder there") from error


def _test_file(folders: Folders) -> str:
    """The file of the held-out pairs, if their folder is among these; validate rejects a data set without them."""
    preferences = (folder for folder in folders if PurePosixPath(folder).name == DATA_SETS[0])
    return next((f"{folder}/test.jsonl" for folder in preferences), "")


def _workspace_test_set(root: Path, folders: Folders) -> str:
    test_file = _test_file(folders)
    if not test_file or not (root / test_file).is_file():
        return ""
    with (root / test_file).open("rb") as file:
        # The md5 that DVC would record, so that a commit and the workspace name the same test set.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _is_committed(root: Path, digests: dict[str, str]) -> bool:
    """Whether the checked-out commit records these digests, in dvc.lock or in a .dvc file."""
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo

    try:
        with Repo.discover(str(root)) as repo:
            project = root.resolve().relative_to(Path(repo.path).resolve()).as_posix()
            records = _Records(repo, tuple(digests), "" if project == "." else project)
            return _digests(records.of(repo[repo.head()]) or {}) == digests
    except (NotGitRepository, KeyError, InputError):
        return False


@contextmanager
def remote_errors(repo: str, revision: str, folder: str, digest: str) -> Iterator[None]:
    """Report errors of reading a folder's content, which has DVC's digest, as one sentence."""
    from botocore.exceptions import BotoCoreError
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    where = f"{without_credentials(repo)} at {revision}: the content of {folder}"
    try:
        yield
    except (OSError, BotoCoreError, DvcException, DataIndexDirError) as error:
        # DVC hides why it could not read the list of a folder's files behind an error of its own.
        why = error.__cause__ if isinstance(error, DataIndexDirError) and error.__cause__ else error
        if isinstance(why, FileNotFoundError):
            asked = " or ".join(asked_remotes(repo, revision)) or "a remote, of which the repository has none"
            # Where the list of a folder's files is in a remote, DVC takes all of the folder for pushed.
            first = "" if isinstance(error, DataIndexDirError) else f"delete {object_path(digest)} in the remote, then "
            raise InputError(
                f"{where} is neither in the DVC cache nor in {asked}; {first}{push_again(revision)}"
            ) from error
        if isinstance(why, OSError) and (why.filename or why.errno == errno.ENOSPC):
            raise  # an error of the local disk: errors of a remote name no file
        reason = single_line(str(why))
        if isinstance(why, PermissionError):
            raise InputError(
                f"{where} may not be read from the DVC remote ({reason}); check the key (AWS_ACCESS_KEY_ID,"
                " AWS_SECRET_ACCESS_KEY, or cluster.data_secret) and its rights"
            ) from error
        raise KubealignError(
            f"{where} cannot be fetched from the DVC remote: {reason}; the files fetched so far are kept;"
            " run it again to resume"
        ) from error


def _remote_limit(repo: str, revision: str) -> AbstractContextManager[None]:
    """Limit the reading of a revision's records from its DVC remote."""
    where = f"{without_credentials(repo)} at {revision}"
    return time_limit(OPEN_LIMIT_S, f"{where}: the DVC remote is too slow; run it again")


def object_path(digest: str) -> str:
    """Where a DVC remote has an object."""
    return f"files/md5/{digest[:2]}/{digest[2:]}"


def push_again(revision: str) -> str:
    """How to bring a revision's content to the remote, for a message."""
    return f"`git checkout {revision} && dvc push` where the data was made"


class opened:  # noqa: N801 - reads as the context manager it is: `with opened(repo, revision) as fs`
    """Open a repository at a revision as a read-only file system; a URL is cloned, without a git binary.

    Where the revision's own remote lacks the folders, for example because the team has moved it since, the file system
    reads from the present one.
    """

    def __init__(self, repo: str, revision: str, folders: Folders = ()) -> None:
        self.repo, self.revision, self.folders = repo, revision, folders
        self._limits = ExitStack()

    def __enter__(self) -> Any:
        with ExitStack() as limits:
            limits.enter_context(answer_limit())
            self.fs = self._open(self.revision)
            if not self._can_read(self.fs):
                present = self.present_remote()
                if present and present != _remote(self.fs):
                    other = self._open(self.revision, present)
                    if self._can_read(other):
                        self.fs, other = other, self.fs
                    other.close()
            self._limits = limits.pop_all()
        return self.fs

    def __exit__(self, *exception: object) -> None:
        self._limits.close()
        self.fs.close()

    def present_remote(self) -> dict[str, Any]:
        """DVC's configuration of the default remote of now: of the default branch of a URL, the workspace of a path."""
        try:
            fs = self._open(None)
        except InputError:
            return {}
        try:
            return _remote(fs)
        finally:
            fs.close()

    def _open(self, revision: str | None, config: dict[str, Any] | None = None) -> Any:
        import pygit2
        from dvc.api import DVCFileSystem
        from dvc.exceptions import DvcException
        from dvc.scm import SCMError

        check_address(self.repo)
        if is_url(self.repo) and not self.repo.startswith(("http", "file")):
            remotes.require_host_keys()
        # DVC clones without git, but reports progress through GitPython, which refuses to load without git.
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        # Whoever owns the folder: in a container it is often another user, and libgit2 runs nothing that it names.
        pygit2.settings.owner_validation = False
        name = without_credentials(self.repo)
        try:
            with time_limit(OPEN_LIMIT_S, f"data.repo={name}: the git server is too slow"):
                fs = DVCFileSystem(url=self.repo, rev=revision, config=config)
                # The repository is opened lazily, here; nothing in it may be read before it is checked.
                self._check_top(Path(fs.repo.scm.root_dir).resolve())
                remotes.check_repository(fs.repo, f"{name} at {revision or 'now'}", is_url(self.repo))
        except (DvcException, SCMError) as error:
            # The message "SCM error" alone says nothing; its causes do.
            reason = ": ".join(dict.fromkeys(single_line(str(cause)) for cause in error_chain(error) if str(cause)))
            if any(isinstance(cause, TimeoutError) or "timed out" in str(cause) for cause in error_chain(error)):
                raise KubealignError(
                    f"data.repo={name}: no answer within {ANSWER_S:.0f} s; run it again, or look whether the git server"
                    " is up"
                ) from error
            raise InputError(
                f"data.repo={name}, data.revision={self.revision}: {without_credentials(reason)};"
                " expected a git repository with DVC data and a branch, tag or commit of it"
            ) from error
        return fs

    def _check_top(self, top: Path) -> None:
        if not is_url(self.repo) and Path(self.repo).resolve() != top:
            raise InputError(
                f"data.repo={self.repo}: a folder of the git repository {top}; a revision is read of a project that is"
                " the whole repository, of any other only data.revision=workspace"
            )

    def _can_read(self, fs: Any) -> bool:
        """Whether every file of the folders is in the cache or the remote that a file system reads from."""
        from botocore.exceptions import BotoCoreError
        from dvc.exceptions import DvcException
        from dvc_data.index import DataIndexDirError

        try:
            with _remote_limit(self.repo, self.revision):
                for folder in self.folders:
                    for path in fs.find(folder):
                        fs.open(path).close()
        except (OSError, BotoCoreError, DvcException, DataIndexDirError):
            return False
        return True


def _remote(fs: Any) -> dict[str, Any]:
    """DVC's configuration of a repository's default remote, and of nothing else; empty without one."""
    config = fs.repo.config
    name = config["core"].get("remote")
    return {"core": {"remote": name}, "remote": {name: config["remote"][name]}} if name in config["remote"] else {}


def asked_remotes(repo: str, revision: str) -> list[str]:
    """The addresses of the remotes that `opened` reads from."""
    opening = opened(repo, revision)
    with opening as fs:
        found = [_remote(fs), opening.present_remote()]
    urls = [str(remote["remote"][remote["core"]["remote"]]["url"]) for remote in found if remote]
    return [without_credentials(url) for url in dict.fromkeys(urls)]


def tracked_files(fs: Any, folder: str) -> list[tuple[str, str]]:
    """The files of a data folder: each one's path in the repository, and its name below the folder.

    Raises:
        InputError: a name that is none of a file below the folder.
    """
    files = []
    for path in sorted(fs.find(folder)):
        before, _, name = path.removeprefix("/").partition(f"{folder}/")
        # An entry of the folder's list with a hostile name turns up as the folder itself, or under another one.
        name = f"/{path}" if before else name
        inside(Path(folder), name)
        files.append((path, name))
    return files


def check_address(repo: str) -> None:
    """Check the address of a repository that is about to be opened: a pod clones from https, nothing else.

    Raises:
        InputError: not a folder, or an address that `urls.check_repository` rejects.
    """
    try:
        check_repository(repo)
        if in_pod():
            parse_url(repo, ("https",))
    except ValueError as error:
        raise InputError(f"data.repo={without_query(repo)}: {error}") from error
    if not is_url(repo) and not Path(repo).is_dir():
        raise InputError(f"data.repo={repo}: no such folder; expected a git repository with DVC data, or its URL")


def history(
    root: Path, commit: str, folders: Folders, project: str = "", warn: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Any, Outs]]:
    """The commits that gave the folders a content that no parent has, newest first, each with its records of them.

    Args:
        root: top folder of the git repository.
        commit: where to start.
        folders: relative to the project.
        project: the DVC project's folder in the repository.
        warn: is told of every commit that is passed over, as its records cannot be read.

    Raises:
        InputError: the clone ends before the history does.
    """
    from dulwich.repo import Repo

    with Repo(str(root)) as repo:
        records = _Records(repo, folders, project)
        first = repo[commit.encode()]
        waiting, seen = [(-first.commit_time, first.id)], {first.id}
        while waiting:
            current = repo[heapq.heappop(waiting)[1]]
            for parent in current.parents:
                if parent not in seen and parent in repo.object_store:
                    seen.add(parent)
                    heapq.heappush(waiting, (-repo[parent].commit_time, parent))
            try:
                outs = records.of(current)
            except InputError as error:
                warn(str(error))
                continue
            before, whole = records.before(current)
            if not whole or outs is None:
                raise InputError(_cut_short(root, repo))
            if all(_digests(outs) != _digests(older) for _, older in before):
                yield current, outs


def commit_of(root: Path, commit: str, digests: dict[str, str], project: str = "") -> str:
    """The oldest commit of the unbroken line back from `commit` that records these digests of the folders.

    A commit whose records cannot be read, such as one with conflict markers in dvc.lock, says nothing and is passed
    over.

    Raises:
        InputError: the clone ends before that line does.
    """
    from dulwich.repo import Repo

    with Repo(str(root)) as repo:
        records = _Records(repo, tuple(digests), project)
        oldest = repo[commit.encode()]
        while True:
            before, whole = records.before(oldest)
            same = [older for older, outs in before if _digests(outs) == digests]
            if not same and not whole:
                raise InputError(_cut_short(root, repo))
            if not same:
                return str(oldest.id.decode())
            oldest = same[0]


def recorded_outs(text: bytes, where: str) -> list[dict[str, Any]]:
    """The outputs that a dvc.lock or a .dvc file records.

    Raises:
        InputError: it is none, such as one with conflict markers.
    """
    try:
        content = yaml.safe_load(text) or {}
        stages = (content.get("stages") or {}).values() if "stages" in content else [content]
        return [{**out, "path": str(out["path"])} for stage in stages for out in stage.get("outs") or []]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML: {single_line(str(error))}") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{where}: expected stages and outputs as DVC writes them") from error


class _Records:
    """DVC's records of folders, commit by commit; each content of a file is read once.

    Parents are those that a commit names, whatever this clone makes of them: a shallow clone and `info/grafts` take a
    commit's parents away.
    """

    def __init__(self, repo: Any, folders: Folders, project: str = "") -> None:
        self.repo, self.folders, self.project = repo, folders, project
        self._read: dict[tuple[str, bytes], list[dict[str, Any]]] = {}

    def of(self, commit: Any) -> Outs | None:
        """A commit's records of the folders; None if the clone lacks a part of the commit.

        Raises:
            InputError: they cannot be read.
        """
        files = {name: self._file(commit.tree, name) for name in (LOCK, *(f"{folder}.dvc" for folder in self.folders))}
        if None in files.values():
            return None
        found = {out["path"]: out for out in self._outs(commit, LOCK, files[LOCK])}
        for folder in self.folders:
            for out in self._outs(commit, f"{folder}.dvc", files[f"{folder}.dvc"]):
                found[folder] = out
        return {folder: found[folder] for folder in self.folders if "md5" in found.get(folder, {})}

    def before(self, commit: Any) -> tuple[list[tuple[Any, Outs]], bool]:
        """The nearest commits before a commit whose records can be read, with these; and whether none is missing."""
        found: list[tuple[Any, Outs]] = []
        waiting, seen, whole = list(commit.parents), set(commit.parents), True
        while waiting:
            sha = waiting.pop(0)
            parent = self._object(sha)
            try:
                outs = parent and self.of(parent)
            except InputError:
                waiting += [older for older in parent.parents if older not in seen]
                seen |= set(parent.parents)
                continue
            if outs is None:
                whole = False
            else:
                found.append((parent, outs))
        return found, whole

    def _outs(self, commit: Any, name: str, blob: Any) -> list[dict[str, Any]]:
        if (name, blob.id) not in self._read:
            where = f"{commit.id.decode()[:12]}:{_joined(self.project, name)}"
            self._read[name, blob.id] = recorded_outs(blob.data, where)
        return self._read[name, blob.id]

    def _file(self, tree: bytes, name: str) -> Any:
        """A file of the project in a commit's tree: an empty one if it has none, None if the clone lacks it."""
        from dulwich.objects import S_ISGITLINK, Blob, Tree

        found = self._object(tree)
        for part in _joined(self.project, name).encode().split(b"/"):
            if found is None:
                return None
            if not isinstance(found, Tree) or part not in found or S_ISGITLINK(found[part][0]):
                return Blob()
            found = self._object(found[part][1])
        return Blob() if isinstance(found, Tree) else found

    def _object(self, sha: bytes) -> Any:
        """An object of the repository; None if the clone lacks it."""
        return self.repo[sha] if sha in self.repo.object_store else None


def _digests(outs: Outs) -> dict[str, str]:
    return {folder: str(out["md5"]) for folder, out in outs.items()}


def _cut_short(root: Path, repo: Any) -> str:
    kind = SHALLOW if repo.get_shallow() else PARTIAL
    return f"{root}: the history ends before the data's does; this is {kind}"


def _joined(project: str, path: str) -> str:
    return f"{project}/{path}" if project else path
