"""Code provenance: the digest of the code that a stage runs, the commit, the installed packages."""

import ast
import importlib.metadata
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from components.common.files import digest, sha256_file, write_text

PACKAGES = Path(__file__).resolve().parent.parent.parent
LOCK = "requirements.lock"
DATA_STAGE = "components.prepare.stage"
DATA_CODE = "prepare.code"
LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "great_expectations": "great-expectations",
    "mlflow": "mlflow-skinny",
}
"""Libraries whose version is part of the digest of the code that imports them: module -> distribution."""
WITHOUT_RESULT = re.compile(r"components\.(stages|orders|report(\..*)?|\w+\.(report_page|card))")
"""Modules that no result depends on: those that only write pages and cards, which no later step reads, and those that
make the orders, whose content is itself part of every key.
"""
CHAT = "components.dataset.chat"
CHAT_TEMPLATES = "components/dataset/templates"
"""Folder of the files that are part of that module's code."""


def code_digest(stage: str) -> str:
    """Digest of the code that a stage runs.

    KFP's cache key covers a component's body, but not its imports; so this digest is passed as a parameter.
    """
    return modules_digest(f"components.{stage}.stage")


def modules_digest(start: str) -> str:
    """Digest of `code_parts`."""
    return digest(list(code_parts(start, PACKAGES)))[:16]


def source_digest(start: str, tree: Path) -> str:
    """Digest of our own code behind a module, without the libraries."""
    return digest(code_parts(start, tree)[0])[:16]


def write_code_of_data(data: Path) -> None:
    """Write data/prepare.code: the digest of the code that makes the data, on which DVC's stage depends."""
    write_text(data / DATA_CODE, f"{source_digest(DATA_STAGE, PACKAGES)}\n")


def code_parts(start: str, tree: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The code and libraries that determine the behaviour of a module.

    Args:
        start: one of our modules.
        tree: the folder with the package `components`; a tree other than ours is read, never executed.

    Returns:
        the digests of all our modules that `start` imports, directly or not, except those without a result, and of the
        chat templates; and the versions of the libraries that they import: the installed ones, else those in the
        tree's requirements.lock, so that all images agree, whichever libraries they contain.
    """
    modules = imported_modules(start, tree)
    files = {name: module_digest(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    if CHAT in modules:
        templates = sorted((tree / CHAT_TEMPLATES).glob("*.jinja"))
        files |= {path.relative_to(tree).as_posix(): sha256_file(path) for path in templates}
    sources = [path.read_text(encoding="utf-8") for path in modules.values()]
    imported = {name.partition(".")[0] for source in sources for name in _imports(source)}
    used = [distribution for module, distribution in LIBRARIES.items() if module in imported]
    known = locked_versions(tree / LOCK) | (versions(used) if tree == PACKAGES else {})
    return files, {name: known[name] for name in used if name in known}


@cache
def module_digest(source: str) -> str:
    """Digest of a module's syntax tree without comments, layout, docstrings and field descriptions."""
    return digest(ast.dump(without_prose(ast.parse(source))))


def without_prose(tree: ast.Module) -> ast.Module:
    """A syntax tree without texts for people: docstrings, and the descriptions of pydantic fields."""
    stripped: ast.Module = _WithoutProse().visit(tree)
    return stripped


class _WithoutProse(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "Field":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


def locked_versions(lock: Path) -> dict[str, str]:
    """The versions of LIBRARIES in a lock file; none without the file."""
    if not lock.is_file():
        return {}
    pins = re.findall(r"^([\w.-]+)==([^\s;+]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
    return {name: pinned[name] for name in LIBRARIES.values() if name in pinned}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, without local parts such as `+cpu`."""
    installed = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name).partition("+")[0]
    return installed


def environment() -> str:
    """Every installed distribution as a line `name==version`, sorted, in the format of pip."""
    installed = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(installed.items()))


def imported_modules(start: str, tree: Path | None = None) -> dict[str, Path]:
    """Every module of the package `components` that `start` imports, directly or not, at any level of its code.

    Those without a result (WITHOUT_RESULT) are left out, with the modules that only they import.
    """
    modules: dict[str, Path] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        path = _module_file(name, tree or PACKAGES)
        if name in modules or path is None or WITHOUT_RESULT.fullmatch(name):
            continue
        modules[name] = path
        waiting += _imports(path.read_text(encoding="utf-8"))
    return modules


@cache
def _imports(source: str) -> list[str]:
    """Every name that a module may import."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@cache
def git_commit() -> str:
    """Commit of this code, with the suffix `-dirty` if tracked files differ; KUBEALIGN_GIT_COMMIT in an image."""
    commit = os.environ.get("KUBEALIGN_GIT_COMMIT")
    if commit:
        return commit
    return checked_out(PACKAGES)


def checked_out(folder: Path) -> str:
    """The commit of the repository that a folder is in, with the suffix `-dirty` if tracked files differ; or `unknown`.

    What git leaves out is no difference: a submodule that is not initialised, a file outside of a sparse checkout. An
    index that dulwich cannot read, a split or a sparse one, cannot be shown to be clean.
    """
    from dulwich.errors import ChecksumMismatch, NotGitRepository
    from dulwich.index import UnsupportedIndexFormat
    from dulwich.repo import Repo

    try:
        with Repo.discover(str(folder)) as repo:
            head: str = repo.head().decode()
            try:
                return head + ("-dirty" if _differs(repo) else "")
            except (ChecksumMismatch, UnsupportedIndexFormat):
                return f"{head}-dirty"
    except (NotGitRepository, KeyError):
        return "unknown"


def _differs(repo: Any) -> bool:
    """Whether tracked files or the commits of submodules differ from the commit that is checked out."""
    from dulwich import porcelain
    from dulwich.objects import S_ISGITLINK

    state = porcelain.status(repo, untracked_files="no")
    index = repo.open_index()
    submodules = {path: sha for path, sha, mode in index.iterobjects() if S_ISGITLINK(mode)}
    changed = set(state.unstaged) - submodules.keys() or any(state.staged.values())
    return bool(changed) or any(_has_moved(Path(repo.path), path, sha) for path, sha in submodules.items())


def _has_moved(top: Path, path: bytes, recorded: bytes) -> bool:
    """Whether a submodule has another commit checked out than the recorded one."""
    from dulwich.index import read_submodule_head

    folder = top / os.fsdecode(path)
    return (folder / ".git").exists() and read_submodule_head(str(folder)) != recorded


def _module_file(name: str, tree: Path) -> Path | None:
    if name.split(".", maxsplit=1)[0] != "components":
        return None
    path = tree.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)
