"""Folders and small files in a location that several machines share: a mounted volume, or a prefix in an S3 bucket.

A location is an absolute path or s3://bucket/prefix. A folder there is complete once its manifest exists: the manifest
is uploaded last, and a download is verified against it.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import KubealignError
from components.common.files import (
    MANIFEST,
    check_listed,
    digest,
    inside,
    parse_manifest,
    replacing,
    replacing_folder,
    verify_manifest,
    write_text,
)
from components.common.limits import ANSWER_S
from components.tracking import store
from components.tracking.run import is_main_process

S3 = "s3://"


def upload(folder: Path, location: str) -> None:
    """Copy a folder with a manifest to a location, unless it is already there."""
    if exists(f"{location}/{MANIFEST}"):
        return
    if not location.startswith(S3):
        with replacing_folder(Path(location)) as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        return
    fs = s3_filesystem()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path == folder / MANIFEST):
        fs.put_file(str(path), f"{location}/{path.relative_to(folder).as_posix()}")


def download(location: str, folder: Path) -> None:
    """Copy a folder from a location; it appears atomically, verified against its manifest.

    Raises:
        KubealignError: it is missing or differs from its manifest.
        InputError: a name in it that is none of a file below the folder, or not in its manifest.
    """
    if not exists(f"{location}/{MANIFEST}"):
        raise KubealignError(f"{location}: no {MANIFEST} there; expected a folder that a step has written")
    manifest = read(f"{location}/{MANIFEST}")
    names = sorted(_names(location))
    check_listed(names, parse_manifest(manifest, location), location)
    with replacing_folder(folder) as staging:
        fs = s3_filesystem() if location.startswith(S3) else None
        for name in names:
            target = inside(staging, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if fs is None:
                shutil.copyfile(inside(Path(location), name), target, follow_symlinks=False)
            else:
                fs.get_file(f"{location}/{name}", str(target))
        verify_manifest(staging)


def _names(location: str) -> list[str]:
    """The relative paths of the files in a location; those in a bucket may be anything."""
    if location.startswith(S3):
        prefix = f"{location.removeprefix(S3)}/"
        return [path.removeprefix(prefix) for path in s3_filesystem().find(location)]
    root = Path(location)
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]


def write(location: str, text: str) -> None:
    """Write a small file; it appears whole or not at all."""
    if location.startswith(S3):
        s3_filesystem().pipe_file(location, text.encode())
    else:
        write_text(Path(location), text)


def read(location: str) -> str:
    """The text of a small file."""
    if not location.startswith(S3):
        return Path(location).read_text(encoding="utf-8")
    content: bytes = s3_filesystem().cat_file(location)
    return content.decode()


def exists(location: str) -> bool:
    """Whether a file exists."""
    if not location.startswith(S3):
        return Path(location).is_file()
    return bool(s3_filesystem().exists(location))


def remove(location: str) -> None:
    """Remove a folder, its manifest first."""
    if not location.startswith(S3):
        shutil.rmtree(location, ignore_errors=True)
        return
    fs = s3_filesystem()
    for path in sorted(fs.find(location), key=lambda path: not path.endswith(MANIFEST)):
        fs.rm_file(path)


def materialize(location: str | Path) -> Path:
    """The local path of a folder or YAML file, which is downloaded once unless the location is a path already.

    Processes that torchrun started on one machine share the copy; the first of them downloads it.
    """
    location = str(location)
    if not location.startswith(S3):
        return Path(location)
    target = store.home() / "inputs" / f"{digest(location)[:24]}{Path(location).suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            if location.endswith((".yaml", ".yml")):
                with replacing(target) as staging:
                    staging.write_text(read(location), encoding="utf-8")
            else:
                download(location, target)
    return target


@contextmanager
def output(location: str) -> Iterator[Path]:
    """Yield a folder for a stage's output; rank 0 uploads it to the location at the end."""
    if not location.startswith(S3):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / "out"
        if is_main_process():
            upload(Path(scratch) / "out", location)


def s3_filesystem() -> Any:
    """The S3 of the environment (AWS_ENDPOINT_URL and the keys), without a cache: other machines write there, too."""
    import s3fs

    # Three attempts of a minute each; s3fs and botocore would wait 5 x 5 minutes for a server that is silent.
    bounds = {"connect_timeout": 10, "read_timeout": ANSWER_S, "retries": {"max_attempts": 2}}
    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=bounds)
