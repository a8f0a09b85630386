"""Atomic writing of files and folders, and manifests of their hashes."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import InputError, KubealignError, single_line

MANIFEST = "manifest.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
CACHE_DIR = "cache"
"""Folder that no manifest covers: for data that can be recomputed and so may be lost or damaged."""


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """The sha256 of a JSON value, in hexadecimal; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its relative path; the manifest and `CACHE_DIR` are left out."""
    left_out = (folder / MANIFEST, folder / CACHE_DIR)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not {path, *path.parents} & {*left_out})
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of all files below `folder`."""
    return digest(file_hashes(folder))


def inside(folder: Path, name: str) -> Path:
    """The path of a file below a folder, for a name that others chose: in a bucket, lock, archive or manifest.

    Raises:
        InputError: the name is absolute, has empty parts, `..`, a backslash or control characters, or leads out of the
            folder through a link.
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & {*parts}
    if not plain or not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{single_line(repr(name))[:200]}: not a name of a file below {folder}; expected a relative path without"
            " `..`, empty parts or control characters"
        )
    return folder / name


def parse_manifest(text: str | bytes, where: str) -> dict[str, str]:
    """The hash of every file, by its relative path, from the text of a manifest.

    Raises:
        KubealignError: not a manifest, or an empty one.
        InputError: a name in it is none of a file below the folder.
    """
    try:
        hashes = json.loads(text)
        sound = bool(hashes) and all(isinstance(value, str) and SHA256.fullmatch(value) for value in hashes.values())
    except (ValueError, AttributeError) as error:
        raise KubealignError(f"{where}: no readable {MANIFEST}; run the step that writes it again") from error
    if not sound:
        raise KubealignError(f"{where}: {MANIFEST} names no files with their hashes; run the step that writes it again")
    for name in hashes:
        inside(Path(where), name)
    return {str(name): str(value) for name, value in hashes.items()}


def check_listed(names: Iterable[str], hashes: Mapping[str, str], where: str) -> None:
    """Check that files that are about to be copied are those of a manifest, and that all have plain names.

    Raises:
        InputError: a name that is none, or not in the manifest.
    """
    for name in names:
        inside(Path(where), name)
        if name != MANIFEST and name not in hashes and not name.startswith(f"{CACHE_DIR}/"):
            raise InputError(f"{where}: {name} is not in its {MANIFEST}; remove it, or the folder, and run again")


def write_manifest(folder: Path) -> str:
    """Record the hash of every file of `folder` in its manifest.json; returns the folder's digest."""
    hashes = file_hashes(folder)
    write_text(folder / MANIFEST, json.dumps(hashes, indent=1) + "\n")
    return digest(hashes)


def verify_manifest(folder: Path) -> str:
    """Compare the files of `folder` with its manifest; returns the folder's digest.

    Raises:
        KubealignError: no manifest, or a file is missing, added or changed.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise KubealignError(f"{folder}: no readable {MANIFEST}; run the step that writes it again") from error
    expected = parse_manifest(text, str(folder))
    actual = file_hashes(folder)
    if mismatch := difference(expected, actual):
        raise KubealignError(f"{folder}: {mismatch} since it was written; remove the folder and run the step again")
    return digest(actual)


def difference(expected: Mapping[str, str], actual: Mapping[str, str]) -> str:
    """The first file whose hash is not the expected one, such as `a.json is missing`; empty if all match."""
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            problem = (
                "is missing" if name not in actual else "is not in the manifest" if name not in expected else "changed"
            )
            return f"{name} {problem}"
    return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file path beside `path` to write to; on success it is synced and replaces `path` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.chmod(0o644)
        staging.replace(path)
        sync_folder(path.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a folder: it appears with all its files, readable by everyone, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        for entry in staging.rglob("*"):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
            if entry.is_file():
                with entry.open("rb") as file:
                    os.fsync(file.fileno())
        if path.exists():
            shutil.rmtree(path)
        staging.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; it appears whole or not at all."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole or not at all. Raises ValueError for a number that is not finite."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
