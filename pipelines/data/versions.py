"""What differs between two versions of the data, and which versions there are."""

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

from components.common.errors import InputError
from components.config.data import DataConfig
from components.dataset.records import SPLITS, iter_lines
from components.prepare.sources import ADDED
from components.sources.data import DATA_SETS, WORKSPACE, data_folders, history, opened
from pipelines import git

KINDS = ("added", "removed", "changed")
Place = tuple[str, str, str]
"""Data set, language and source."""


@dataclass(frozen=True)
class Entry:
    """A row of a version, without its text; `prompt` and `rest` are hashes of this process."""

    lang: str
    source: str
    prompt: int
    rest: int


def compare(old: Path, new: Path) -> dict[Place, Counter[str]]:
    """Rows added, removed and changed between two data folders, by data set, language and source.

    A row changed when the same prompt and answers stand elsewhere (another side or group) or under another language,
    source or licence, or when the same prompt of the same source has another answer. A row that repeats counts as
    often as it stands there.
    """
    found: dict[Place, Counter[str]] = {}
    for name in DATA_SETS:
        before, after = _entries(old / name), _entries(new / name)
        gone: list[Entry] = []
        come: list[Entry] = []
        for identity in before.keys() | after.keys():
            left = Counter(before.get(identity, ()))
            right = Counter(after.get(identity, ()))
            lost, won = list((left - right).elements()), list((right - left).elements())
            both = min(len(lost), len(won))
            _count(found, name, "changed", won[:both])
            gone += lost[both:]
            come += won[both:]
        answered = Counter((entry.source, entry.prompt) for entry in gone)
        for entry in come:
            key = (entry.source, entry.prompt)
            _count(found, name, "changed" if answered[key] > 0 else "added", [entry])
            answered[key] -= 1
        answered = Counter((entry.source, entry.prompt) for entry in come)
        for entry in gone:
            key = (entry.source, entry.prompt)
            if answered[key] <= 0:
                _count(found, name, "removed", [entry])
            answered[key] -= 1
    return dict(sorted(found.items()))


def diff(data: DataConfig, old: str, new: str) -> dict[Place, Counter[str]]:
    """As `compare`, for two revisions of a repository; `workspace` is the files as they are.

    Raises:
        InputError: a revision that does not exist, or whose content is not to be had.
    """
    with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
        folders = [_version(data, revision, Path(temporary) / str(i)) for i, revision in enumerate((old, new))]
        return compare(*folders)


def log(root: Path, commit: str, path: str) -> list[dict[str, Any]]:
    """The versions of the data up to a commit, the newest first: those that gave a data set another content."""
    folders = data_folders(path)
    tags = git.tags(root)
    versions = [(entry, outs) for entry, outs in history(root, commit, folders) if len(outs) == len(folders)]
    found = []
    for (entry, outs), older in zip(versions, [*(outs for _, outs in versions[1:]), {}], strict=True):
        digests = {name: outs[folder]["md5"] for name, folder in zip(DATA_SETS, folders, strict=True)}
        if all(older.get(folder, {}).get("md5") == outs[folder]["md5"] for folder in folders):
            continue
        sha = entry.id.decode()
        found.append(
            {
                "commit": sha,
                "tags": sorted(tags.get(sha, [])),
                "time": entry.commit_time,
                "message": entry.message.decode(errors="replace").partition("\n")[0],
                **digests,
                "bytes": sum(int(outs[folder].get("size", 0)) for folder in folders),
                "added": _added_sources(root, sha, path),
            }
        )
    return found


def _entries(folder: Path) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for split in SPLITS if folder.is_dir() else ():
        for _, row in iter_lines(folder / f"{split}.jsonl"):
            lang, source = str(row.get("lang")), str(row.get("source"))
            entry = Entry(lang, source, hash(orjson.dumps(row.get("prompt"))), hash((split, orjson.dumps(row))))
            found.setdefault(str(row.get("id")), []).append(entry)
    return found


def _count(found: dict[Place, Counter[str]], name: str, kind: str, entries: Iterable[Entry]) -> None:
    for entry in entries:
        found.setdefault((name, entry.lang, entry.source), Counter())[kind] += 1


def _version(data: DataConfig, revision: str, out: Path) -> Path:
    """A folder with both data sets of a revision."""
    if revision == WORKSPACE:
        folder = Path(data.repo) / data.path
        missing = [name for name in DATA_SETS if not (folder / name).is_dir()]
        if missing:
            raise InputError(
                f"{folder / missing[0]}: not found; `make data` (dvc repro) makes it, `dvc pull` fetches it"
            )
        return folder
    with opened(data.repo, revision) as fs:
        for name, folder_name in zip(DATA_SETS, data_folders(data.path), strict=True):
            try:
                fs.get(folder_name, str(out / name), recursive=True)
            except FileNotFoundError as error:
                raise InputError(
                    f"{data.repo}@{revision}: the content of {folder_name} is neither in the DVC cache nor in a remote;"
                    " `dvc fetch --all-commits` brings it"
                ) from error
    return out


def _added_sources(root: Path, commit: str, path: str) -> list[str]:
    """The team's own sources that a version holds."""
    lock = yaml.safe_load(git.content(root, commit, f"{path}/sources.lock")) or {}
    return sorted(lock.get(ADDED) or {})
