"""Folders and small files in a place that several machines see: a mounted volume, or a prefix in an S3 bucket.

A place is written as an absolute path or as s3://bucket/prefix. A folder in it counts once its manifest is there, which
goes up last, and is checked against it when it comes back.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import KubealignError
from components.common.files import MANIFEST, digest, replacing, replacing_folder, verify_manifest, write_text
from components.tracking import run as tracking

S3 = "s3://"


def push(folder: Path, place: str) -> None:
    """Bring a folder with a manifest to a place, unless it is there."""
    if exists(f"{place}/{MANIFEST}"):
        return
    if not place.startswith(S3):
        with replacing_folder(Path(place)) as aside:
            shutil.copytree(folder, aside, dirs_exist_ok=True)
        return
    bucket, prefix = _split(place)
    client = _client()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == folder / MANIFEST):
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")


def pull(place: str, folder: Path) -> None:
    """Bring a folder from a place; it appears whole, checked against its manifest.

    Raises:
        KubealignError: it is not there, or not as its manifest says.
    """
    if not exists(f"{place}/{MANIFEST}"):
        raise KubealignError(f"{place}: no {MANIFEST} there; expected a folder that a step has written")
    with replacing_folder(folder) as aside:
        if place.startswith(S3):
            bucket, prefix = _split(place)
            for key in _keys(bucket, prefix):
                target = aside / key.removeprefix(f"{prefix}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                _client().download_file(bucket, key, str(target))
        else:
            shutil.copytree(place, aside, dirs_exist_ok=True)
        verify_manifest(aside)


def write(place: str, text: str) -> None:
    """Write a small file that appears whole."""
    if place.startswith(S3):
        bucket, key = _split(place)
        _client().put_object(Bucket=bucket, Key=key, Body=text.encode())
    else:
        write_text(Path(place), text)


def read(place: str) -> str:
    """The text of a small file."""
    if not place.startswith(S3):
        return Path(place).read_text(encoding="utf-8")
    bucket, key = _split(place)
    text: str = _client().get_object(Bucket=bucket, Key=key)["Body"].read().decode()
    return text


def exists(place: str) -> bool:
    """Whether a file is there."""
    if not place.startswith(S3):
        return Path(place).is_file()
    bucket, key = _split(place)
    return key in _keys(bucket, key, exact=True)


def remove(place: str) -> None:
    """Remove a folder, its manifest first."""
    if not place.startswith(S3):
        shutil.rmtree(place, ignore_errors=True)
        return
    bucket, prefix = _split(place)
    for key in sorted(_keys(bucket, prefix), key=lambda key: not key.endswith(MANIFEST)):
        _client().delete_object(Bucket=bucket, Key=key)


def local_copy(place: str | Path) -> Path:
    """A folder, or a YAML file, on this machine: itself when it is a path, and otherwise brought here once.

    Processes that torchrun started on one machine share the copy; the first of them makes it.
    """
    place = str(place)
    if not place.startswith(S3):
        return Path(place)
    target = tracking.home() / "inputs" / f"{digest(place)[:24]}{Path(place).suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            if place.endswith((".yaml", ".yml")):
                with replacing(target) as aside:
                    aside.write_text(read(place), encoding="utf-8")
            else:
                pull(place, target)
    return target


@contextmanager
def output(place: str) -> Iterator[Path]:
    """A folder to write a stage's output to, which the first process brings to its place at the end."""
    if not place.startswith(S3):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / "out"
        if tracking.is_main_process():
            push(Path(scratch) / "out", place)


def _split(place: str) -> tuple[str, str]:
    bucket, _, key = place.removeprefix(S3).partition("/")
    return bucket, key.strip("/")


def _keys(bucket: str, prefix: str, exact: bool = False) -> list[str]:
    start = prefix if exact else f"{prefix}/"
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def _client() -> Any:
    import boto3

    return boto3.client("s3")
