"""Versions of the data: their list, and the rows that differ between two of them."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from components.common.errors import InputError
from components.common.files import inside
from components.config.data import DataConfig
from components.dataset.records import NO_DATA, SPLITS, iter_lines, name_of
from components.prepare.sources import ADDED
from components.sources.data import (
    DATA_SETS,
    WORKSPACE,
    data_folders,
    history,
    opened,
    recorded_digest,
    remote_errors,
    tracked_files,
)
from pipelines import git

KINDS = ("added", "removed", "changed")
SliceKey = tuple[str, str, str]
"""Data set, language and source."""


@dataclass(frozen=True)
class Entry:
    """A row of a version, without its text; the hashes are those of Python, valid in this process alone."""

    lang: str
    source: str
    prompt_hash: int
    row_hash: int


def compare(old: Path, new: Path) -> dict[SliceKey, Counter[str]]:
    """Rows added, removed and changed between two data folders, by data set, language and source.

    A row counts as changed if the same prompt and answers are now in another split or group, or have another language,
    source or licence, or if the same prompt of the same source has another answer. Duplicate rows are all counted.
    """
    difference: dict[SliceKey, Counter[str]] = {}
    for name in DATA_SETS:
        before, after = _entries(old / name), _entries(new / name)
        removed: list[Entry] = []
        added: list[Entry] = []
        for row_id in before.keys() | after.keys():
            left = Counter(before.get(row_id, ()))
            right = Counter(after.get(row_id, ()))
            only_left, only_right = list((left - right).elements()), list((right - left).elements())
            matched = min(len(only_left), len(only_right))
            _count(difference, name, "changed", only_right[:matched])
            removed += only_left[matched:]
            added += only_right[matched:]
        unmatched = Counter((entry.source, entry.prompt_hash) for entry in removed)
        for entry in added:
            key = (entry.source, entry.prompt_hash)
            _count(difference, name, "changed" if unmatched[key] > 0 else "added", [entry])
            unmatched[key] -= 1
        unmatched = Counter((entry.source, entry.prompt_hash) for entry in added)
        for entry in removed:
            key = (entry.source, entry.prompt_hash)
            if unmatched[key] <= 0:
                _count(difference, name, "removed", [entry])
            unmatched[key] -= 1
    return dict(sorted(difference.items()))


def diff(data: DataConfig, old: str, new: str) -> dict[SliceKey, Counter[str]]:
    """Like `compare`, for two revisions of a repository; `workspace` means the current files.

    Raises:
        InputError: a revision does not exist, or its content cannot be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
        folders = [_fetch_version(data, revision, Path(temporary) / str(i)) for i, revision in enumerate((old, new))]
        return compare(*folders)


def log(root: Path, commit: str, path: str, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The versions of the data up to a commit, newest first: the commits that changed a data set's content.

    `warn` is told of every commit that is passed over, as its records cannot be read.
    """
    folders = data_folders(path)
    tags = git.tags(root)
    entries = []
    for entry, outs in history(root, commit, folders, warn=warn):
        if len(outs) < len(folders):
            continue
        sha = entry.id.decode()
        entries.append(
            {
                "commit": sha,
                "tags": sorted(tags.get(sha, [])),
                "time": entry.commit_time,
                "message": entry.message.decode(errors="replace").partition("\n")[0],
                **{name: outs[folder]["md5"] for name, folder in zip(DATA_SETS, folders, strict=True)},
                "bytes": sum(int(outs[folder].get("size", 0)) for folder in folders),
                "added": _added_sources(root, sha, path),
            }
        )
    return entries


def _entries(folder: Path) -> dict[str, list[Entry]]:
    """The rows of a data set by their ids."""
    entries: dict[str, list[Entry]] = {}
    for split in SPLITS if folder.is_dir() else ():
        for _, row in iter_lines(folder / f"{split}.jsonl"):
            lang, source = name_of(row.get("lang")), name_of(row.get("source"))
            entry = Entry(lang, source, hash(orjson.dumps(row.get("prompt"))), hash((split, orjson.dumps(row))))
            entries.setdefault(str(row.get("id")), []).append(entry)
    return entries


def _count(difference: dict[SliceKey, Counter[str]], name: str, kind: str, entries: Iterable[Entry]) -> None:
    for entry in entries:
        difference.setdefault((name, entry.lang, entry.source), Counter())[kind] += 1


def _fetch_version(data: DataConfig, revision: str, out: Path) -> Path:
    """The folder with both data sets of a revision: the workspace's own, or `out`, to which they are fetched."""
    if revision == WORKSPACE:
        folder = Path(data.repo) / data.path
        missing = [name for name in DATA_SETS if not (folder / name).is_dir()]
        if missing:
            raise InputError(f"{folder / missing[0]}: not found; {NO_DATA}")
        return folder
    folders = data_folders(data.path)
    with opened(data.repo, revision, folders) as fs:
        for name, folder_name in zip(DATA_SETS, folders, strict=True):
            digest = recorded_digest(fs, folder_name, f"{data.repo} at {revision}")
            with remote_errors(data.repo, revision, folder_name, digest):
                for path, file in tracked_files(fs, folder_name):
                    target = inside(out / name, file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(path, str(target))
    return out


def _added_sources(root: Path, commit: str, path: str) -> list[str]:
    """The sources in a version that `kubealign data add` added."""
    try:
        lock = yaml.safe_load(git.content(root, commit, f"{path}/sources.lock")) or {}
        return sorted(map(str, lock.get(ADDED) or {}))
    except (yaml.YAMLError, ValueError, AttributeError, TypeError):  # a broken list of names breaks no version
        return []
