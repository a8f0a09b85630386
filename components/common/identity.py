"""Names become facts: which code a stage runs, as a digest; which commit it stands at."""

import ast
import importlib.metadata
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from components.common.files import digest, sha256_file

PACKAGES = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "great-expectations", "mlflow-skinny", "kfp")
"""Libraries whose version is part of a stage's code."""
DATA_SUFFIXES = (".html", ".jinja", ".css")
"""Files beside the modules that are part of their code."""


def code_digest(stage: str) -> str:
    """Digest of the code that a stage runs.

    KFP's cache knows a component's body only, never what it imports; this goes in as a parameter (DESIGN, decision 2).
    """
    return modules_digest(f"components.{stage}.stage")


def modules_digest(start: str) -> str:
    """Digest of every module of ours that `start` reaches by imports, the templates and styles beside them, and the
    versions of the libraries.
    """
    modules = imported_modules(start)
    files = {name: sha256_file(path) for name, path in modules.items()}
    others = [path for folder in {path.parent for path in modules.values()} for path in _data_files(folder)]
    files |= {path.relative_to(PACKAGES).as_posix(): sha256_file(path) for path in others}
    return digest([files, versions(LIBRARIES)])[:16]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of those packages that are installed, without a build's `+cpu`."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def imported_modules(start: str) -> dict[str, Path]:
    """Every module of the package `components` that `start` imports, directly or not, wherever the import stands."""
    found: dict[str, Path] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        path = _module_file(name)
        if name in found or path is None:
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@cache
def git_commit() -> str:
    """Commit of this code, with `-dirty` behind it when tracked files differ; KUBEALIGN_GIT_COMMIT in an image."""
    told = os.environ.get("KUBEALIGN_GIT_COMMIT")
    if told:
        return told
    from dulwich import porcelain
    from dulwich.errors import NotGitRepository
    from dulwich.repo import Repo

    try:
        with Repo.discover(str(PACKAGES)) as repo:
            head: str = repo.head().decode()
            state = porcelain.status(repo, untracked_files="no")
            return head + ("-dirty" if state.unstaged or any(state.staged.values()) else "")
    except (NotGitRepository, KeyError):
        return "unknown"


def _module_file(name: str) -> Path | None:
    if name.split(".", maxsplit=1)[0] != "components":
        return None
    path = PACKAGES.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in DATA_SUFFIXES)
