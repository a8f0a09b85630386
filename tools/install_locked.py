"""Install what extras of pyproject.toml need, as requirements.lock has it: these versions, files of these hashes.

    python tools/install_locked.py EXTRA... [--venv FOLDER] [--torch-index URL]

Needs nothing but Python and pip. pip decides nothing: which packages an extra needs is read from the lock, which names
for each package those that need it. Torch differs: pip chooses among its builds, of which those for CPUs need no CUDA
packages. So its wheel comes first, its hash is looked for in the lock, and what it says of itself decides.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK, PROJECT = ROOT / "requirements.lock", ROOT / "pyproject.toml"


def normal(requirement: str) -> str:
    """The normalised name of the distribution that a requirement names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


def locked(lock: str) -> dict[str, str]:
    """The lines of each package in a lock file, with its hashes and comments."""
    blocks = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    return {normal(block.partition("==")[0]): block for block in blocks}


def fits(requirement: str, packages: dict[str, str]) -> bool:
    """Whether the lock has a package of that name and, if the requirement has a version, of that version (13.0 is
    13.0.0).
    """
    version = re.search(r"==([\w.]+?)(\.\*)?(?![\w.*])", requirement)
    pinned = packages.get(normal(requirement), "")
    return bool(pinned) and (not version or re.match(rf"\S+=={re.escape(version[1])}(?![\w+])", pinned) is not None)


def roots(extras: list[str], project: dict[str, Any]) -> set[str]:
    """Names of the packages that the project itself needs with some of its extras."""
    found, todo = set(), [*project["dependencies"]]
    for extra in extras:
        todo += project["optional-dependencies"][extra]
    for requirement in todo:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        found |= roots(own[1].split(","), project) if own else {normal(requirement)}
    return found


def needed(extras: list[str], without: dict[str, set[str]] | None = None) -> list[str]:
    """Names of all packages in the lock that some extras need, directly or not.

    Args:
        extras: names of extras in pyproject.toml.
        without: for packages whose installed build is known, what it needs; else all count that the lock names.
    """
    packages = {
        name: block
        for name, block in locked(LOCK.read_text(encoding="utf-8")).items()
        if {*extras} & {*re.findall(r"^ +# for (.*)$", block, re.MULTILINE)[0].split()}
    }
    wants: dict[str, set[str]] = {name: set() for name in packages}
    for name, block in packages.items():
        for parent in re.findall(r"^ +#(?: via)? +([\w.-]+)$", block, re.MULTILINE):
            wants.setdefault(normal(parent), set()).add(name)
    for name, only in (without or {}).items():
        wants[name] = wants.get(name, set()) & only
    found: set[str] = set()
    todo = roots(extras, tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]) & packages.keys()
    while todo:
        found |= todo
        todo = set().union(*(wants.get(name, set()) for name in todo)) - found
    return sorted(found)


def pip(venv: str, *words: str) -> None:
    """Run pip for an environment."""
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", f"{venv}/bin/python", "--disable-pip-version-check", *words],
        check=True,
    )


def install(venv: str, *words: str) -> None:
    """Install packages, without compiling all their files: Python compiles those that are imported."""
    pip(venv, "install", "-q", "--no-compile", *words)


def installed(venv: str, name: str) -> dict[str, list[str]]:
    """What a package of an environment needs, by its version without a local part such as `+cpu`; empty without it."""
    site = next(Path(venv).glob("lib/python3*/site-packages"))
    found = distributions(name=name, path=[str(site)])
    return {distribution.version.partition("+")[0]: distribution.requires or [] for distribution in found}


def install_torch(venv: str, lines: str, index: str) -> None:
    """Install the build of torch that pip takes on this machine.

    Args:
        venv: the environment.
        lines: what the lock says of torch.
        index: an index whose builds are taken whatever their hash, or "".
    """
    version = re.split(r"[\s;]", lines)[0]
    with tempfile.TemporaryDirectory() as folder:
        pip(venv, "download", "-q", "--no-deps", "-d", folder, *index_words(index), version)
        (wheel,) = Path(folder).iterdir()
        with wheel.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest() in lines
        if not known and not index:
            sys.exit(f"error: {wheel.name} has none of the hashes in {LOCK.name}; TORCH_INDEX=URL trusts an index")
        install(venv, "--no-deps", str(wheel))


def index_words(index: str) -> list[str]:
    """pip's words for an index, if there is one."""
    return ["--index-url", index] if index else []


def main() -> None:
    """Install."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--venv", default=sys.prefix)
    parser.add_argument("--torch-index", default="", help="an index that is trusted for torch and what only it needs")
    arguments = parser.parse_args()
    venv, index = arguments.venv, arguments.torch_index
    packages = locked(LOCK.read_text(encoding="utf-8"))
    without = {}
    if "torch" in needed(arguments.extras):
        if not any(fits(f"torch=={version}", packages) for version in installed(venv, "torch")):
            install_torch(venv, packages["torch"], index)
        (wants,) = installed(venv, "torch").values()
        others = [requirement for requirement in wants if not fits(requirement, packages)]
        without["torch"] = {normal(requirement) for requirement in wants if requirement not in others}
        if index and others:
            install(venv, *index_words(index), *others)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(packages[name] for name in needed(arguments.extras, without) if name != "torch"))
        file.flush()
        install(venv, "--require-hashes", "--no-deps", "-r", file.name)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
