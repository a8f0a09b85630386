"""Whether a commit's dvc.lock is up to date: `dvc status` for a commit, without a checkout or its data.

`dvc status --json` itself needs a checkout, takes 3 seconds, and where the data is not pulled calls every output "not
in cache" and every dependency on one "deleted", so its answer would have to be filtered by the same rules.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.common.provenance import DATA_STAGE, source_digest
from components.config.params import PARAMS
from components.sources.data import LOCK
from pipelines.ci.revisions import CODE_FILE, Revision


def stale(revision: Revision, tree: Path) -> Iterator[str]:
    """A sentence for every stage of dvc.yaml that `dvc repro` would run.

    Args:
        revision: the commit.
        tree: a scratch folder for the files that stages depend on.
    """
    recorded = revision.yaml(LOCK).get("stages") or {}
    for name, stage in (revision.yaml("dvc.yaml").get("stages") or {}).items():
        reasons = list(_reasons(revision, tree, stage, recorded.get(name)))
        if reasons:
            yield f"{name} is stale ({', '.join(reasons)}): run `dvc repro` and commit {LOCK}"


def _reasons(revision: Revision, tree: Path, stage: dict[str, Any], lock: dict[str, Any] | None) -> Iterator[str]:
    if lock is None:
        yield f"not in {LOCK}"
        return
    if stage.get("cmd") != lock.get("cmd"):
        yield "its command changed"
    locked = {str(dep["path"]): dep.get("md5") for dep in lock.get("deps", [])}
    for dep in map(_path, stage.get("deps", [])):
        if dep == CODE_FILE:
            if locked.get(dep) != _code_md5(revision, tree):
                yield "its code changed"
            continue
        md5 = revision.outputs.get(dep) or _md5(revision, tree, dep)
        if dep not in locked or md5 != locked[dep]:
            yield f"{dep} changed" if md5 else f"{dep} is not in this commit"
    outputs = {str(out["path"]) for out in lock.get("outs", [])}
    yield from (f"{out} is not in {LOCK}" for out in map(_path, stage.get("outs", [])) if out not in outputs)
    for file, keys in _params(stage):
        locked_params = lock.get("params", {}).get(file, {})
        values = revision.yaml(file)
        yield from (f"{key} of {file} changed" for key in keys if locked_params.get(key) != _value(values, key))


def _code_md5(revision: Revision, tree: Path) -> str:
    """The md5 that DVC would record for data/prepare.code, which holds the digest of this commit's `prepare` code."""
    revision.write(["components"], tree)
    text = f"{source_digest(DATA_STAGE, tree)}\n"
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _path(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(next(iter(entry)))


def _params(stage: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for entry in stage.get("params", []):
        if isinstance(entry, str):
            yield PARAMS, [entry]
        else:
            yield from entry.items()


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _md5(revision: Revision, tree: Path, name: str) -> str:
    """DVC's md5 of a file, or of a folder (with the suffix `.dir`); empty if the commit does not contain it."""
    if name in revision.files:
        return hashlib.md5(revision.content(name), usedforsecurity=False).hexdigest()
    if not revision.below(name):
        return ""
    from dvc.fs import localfs
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB

    revision.write([name], tree)
    cache = LocalHashFileDB(localfs, str(tree / ".cache"))
    _, _, built = build(cache, str(tree / name), localfs, "md5", dry_run=True)
    return str(built.hash_info.value)
