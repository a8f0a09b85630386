"""`kubealign ci plan`: what a change between two commits means, which steps of the pipeline have to run, and why.

The inputs of every step are those that `pipelines/alignment.py` passes to it, read from git and dvc.lock of both
commits; nothing is run or downloaded. A step runs when one of its own inputs changed or a step before it runs.
"""

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.common.files import digest
from components.common.provenance import LOCK, code_parts
from components.sources.base_model import EMBEDDED
from components.sources.data import data_folders, embedded_model
from pipelines.ci.revisions import Revision, default_base, find_repository, is_own
from pipelines.ci.staleness import stale
from pipelines.git import find_commit
from pipelines.platform import TRAIN_STEPS

SECTIONS = {
    "fetch": ("data", "model"),
    "validate": ("validate", "model"),
    "sft": ("sft", "model"),
    "dpo": ("dpo", "model"),
    "evaluate": ("evaluate", "gate", "model"),
}
"""The sections of params.yaml that each step gets; the steps stand one after another."""
FACTS = ("data.repo", "data.revision", "model.base", "model.template")
"""Keys whose meaning is compared, not their text: `resolve` makes facts of them."""
GRAPH = "pipelines/alignment.py"
IMAGES = "components/common/images.py"
BUILT_FROM = ("components", "pyproject.toml", LOCK)
DATA_SECTIONS = ("data", "prepare", "validate")
UNCHANGED = "as it was"
NEVER_CACHED = "never cached: it looks up what is true now"
REASONS = 4
"""Reasons that a row of the table names; the others are counted."""


@dataclass(frozen=True)
class Input:
    """What a step depends on.

    `value` is compared and `shown` to a person. A model made with another value is another model when `keyed`; else the
    step runs anew to the same result. Whether a change makes the step run is not `certain` for everything, and a name
    that `moves` may mean something else without a change here.
    """

    value: Any
    shown: str = ""
    keyed: bool = True
    certain: bool = True
    moves: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the plan: `runs`, `may run` or `cached`; for data and images what is to do."""

    step: str
    state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What has to happen: `retrain`, build `images`, look at the `data`; `errors` is to be mended before."""

    base: str
    head: str
    rows: tuple[Row, ...]
    retrain: bool
    images: bool
    data: bool
    errors: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        steps = {row.step: {"state": row.state, "reasons": list(row.reasons)} for row in self.rows}
        facts = {"base": self.base, "head": self.head, "steps": steps, "errors": list(self.errors)}
        return facts | self.outputs()

    def outputs(self) -> dict[str, bool]:
        """What the jobs of a CI system go by."""
        return {"retrain": self.retrain, "images": self.images, "data": self.data}

    def sentence(self) -> str:
        """The conclusion."""
        since = f"since {self.base[:12]}"
        if self.retrain:
            return f"What a model is made of changed {since}: retrain."
        return f"Nothing that a model is made of changed {since}: no retraining."


def make_plan(root: Path, base: str, head: str, runner: str) -> Plan:
    """Compare two commits of a project.

    Args:
        root: the project's folder, in a git repository.
        base: a commit; empty, or zeros as hosts name what was before a branch's first push, for the default.
        head: a commit.
        runner: where the steps run; what `kubeflow` caches by includes images and volumes.

    Raises:
        InputError: no such commit, or a file in it that cannot be read.
    """
    repo, folder = find_repository(root)
    last = find_commit(repo, head)
    first = find_commit(repo, base) if base.strip("0") else default_base(repo, last)
    with TemporaryDirectory(prefix="kubealign-") as temporary:
        old, new = Revision(repo, folder, first), Revision(repo, folder, last)
        trees = Path(temporary) / "old", Path(temporary) / "new"
        before, after = _inputs(old, trees[0], runner), _inputs(new, trees[1], runner)
        errors = tuple(stale(new, trees[1]))
        changed = sorted({path for path, _ in _built_from(old) ^ _built_from(new)})
        steps, keyed = _compare(before, after)
        prepared = _data_row(old, new, errors)
        touched = data_changed(old, new)
    images = Row("images", "build anew" if changed else "as they are", tuple(_short(changed)))
    ends = Row("resolve", "runs", (NEVER_CACHED,)), Row("register", "runs", (NEVER_CACHED,))
    rows = (prepared, images, ends[0], *steps, ends[1])
    return Plan(first, last, rows, keyed, bool(changed), touched or bool(errors), errors)


def _inputs(revision: Revision, tree: Path, runner: str) -> dict[str, dict[str, Input]]:
    """The inputs of every step at a commit, by their names; `tree` gets the files that they are computed from."""
    revision.write(["components", LOCK], tree)
    found: dict[str, dict[str, Input]] = {}
    for step, sections in SECTIONS.items():
        settings = {key: value for section in sections for key, value in _settings(revision, section)}
        found[step] = settings | _code(step, tree) | _surroundings(revision, step, tree, runner)
    found["fetch"] |= _data(revision) | _base_model(revision)
    name = str((revision.params.get("register") or {}).get("name"))
    found["evaluate"]["register.name"] = Input(name, name, certain=False)
    return found


def _settings(revision: Revision, section: str) -> Iterator[tuple[str, Input]]:
    for key, value in (revision.params.get(section) or {}).items():
        if f"{section}.{key}" not in FACTS:
            yield f"{section}.{key}", Input(value, str(value))


def _code(step: str, tree: Path) -> dict[str, Input]:
    files, libraries = code_parts(f"components.{step}.stage", tree)
    return {name: Input(sha) for name, sha in files.items()} | {
        name: Input(version, version) for name, version in libraries.items()
    }


def _surroundings(revision: Revision, step: str, tree: Path, runner: str) -> dict[str, Input]:
    """What KFP's cache goes by beside the arguments, though no result depends on it."""
    shell = f"components/{step}/component.py"
    found = {
        shell: Input(_component(tree / shell, step), keyed=False),
        IMAGES: Input([_code_of(revision.text(IMAGES)), _version(revision)], keyed=False),
        GRAPH: Input(_code_of(revision.text(GRAPH)), keyed=False, certain=False),
    }
    if runner == "kubeflow":
        cluster = revision.params.get("cluster") or {}
        for key in ("train_image" if step in TRAIN_STEPS else "data_image", "state"):
            found[f"cluster.{key}"] = Input(cluster.get(key), str(cluster.get(key)), keyed=False)
    return found


def _version(revision: Revision) -> str:
    """The project's version, which is the images' tag."""
    return str(tomllib.loads(revision.text("pyproject.toml")).get("project", {}).get("version"))


def _component(path: Path, name: str) -> str:
    """The source of a component's function, which is what KFP ships, and its decorator."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return "\n".join([*map(ast.unparse, node.decorator_list), ast.get_source_segment(text, node) or ""])
    return ""


def _code_of(text: str) -> str:
    """Code without its comments and layout."""
    return digest(ast.dump(ast.parse(text)))


def _data(revision: Revision) -> dict[str, Input]:
    """The data: of this repository as DVC recorded it, of another one by name."""
    data = revision.params.get("data") or {}
    repo, name = str(data.get("repo", "")), str(data.get("revision", ""))
    where = {"data.repo": Input(repo, repo, keyed=False)}
    if not is_own(revision.repo, revision.folder, repo):
        return where | {"data.revision": _name(name, len(name) == 40)}
    digests = {folder: revision.outputs.get(folder, "") for folder in data_folders(_data_path(revision))}
    commit = revision.data_commit(digests)
    return (
        where
        | {folder: Input(value, value[:8] or "nothing") for folder, value in digests.items()}
        | {"the commit of the data": Input(commit, commit[:12], keyed=False)}
    )


def _data_path(revision: Revision) -> str:
    return str((revision.params.get("data") or {}).get("path", "data"))


def _base_model(revision: Revision) -> dict[str, Input]:
    """Base model and chat template: what is in git or DVC by content, anything else by name."""
    model = revision.params.get("model") or {}
    base, template = str(model.get("base", "")), str(model.get("template", ""))
    folder = embedded_model(_data_path(revision)) if base == EMBEDDED else base
    own = revision.outputs.get(folder) or revision.below(folder)
    definite = bool(own) or base == EMBEDDED or (base.startswith("models:/") and "@" not in base)
    pinned = definite or bool(model.get("revision"))
    file = revision.files.get(template)
    return {
        "model.base": _name(base, pinned),
        "the base model's files": Input(own, str(own)[:8] if isinstance(own, str) else ""),
        "model.template": Input([template, file], template),
    }


def _name(name: str, definite: bool) -> Input:
    return Input(name, name, moves=not definite)


def _built_from(revision: Revision) -> set[tuple[str, str]]:
    """The files that the images are built from."""
    found = {item for name in BUILT_FROM for item in revision.below(name).items()}
    return {(path, blob) for path, blob in found if "/tests/" not in path and not path.endswith(".md")}


def _compare(before: dict[str, dict[str, Input]], after: dict[str, dict[str, Input]]) -> tuple[list[Row], bool]:
    """A row for every step, and whether a change makes, or may make, another model."""
    rows: list[Row] = []
    retrain = False
    for step, new in after.items():
        old = before[step]
        changed = {
            name: new.get(name) or old[name]
            for name in [*new, *(old.keys() - new.keys())]
            if name not in new or name not in old or old[name].value != new[name].value
        }
        moving = {name: found for name, found in new.items() if found.moves and name not in changed}
        reasons = [_reason(name, old.get(name), new.get(name)) for name in changed]
        reasons += [f"{name} {found.shown} may mean something new" for name, found in moving.items()]
        earlier = [row.step for row in rows if row.state != "cached"][-1:]
        reasons = [*_short(reasons), *(f"after {name}" for name in earlier)]
        surely = any(found.certain for found in changed.values()) or any(row.state == "runs" for row in rows)
        state = "runs" if surely else "may run" if reasons else "cached"
        retrain = retrain or bool(moving) or any(found.keyed for found in changed.values())
        rows.append(Row(step, state, tuple(reasons)))
    return rows, retrain


def _short(reasons: list[str]) -> list[str]:
    more = len(reasons) - REASONS
    return [*reasons[:REASONS], f"and {more} more"] if more > 0 else reasons


def _reason(name: str, old: Input | None, new: Input | None) -> str:
    was, now = (found.shown if found else "" for found in (old, new))
    title = name.replace(".", "/") + ".py" if name.startswith("components.") else name
    if name == GRAPH:
        return f"{GRAPH} changed: it may pass something else"
    if name == "register.name":
        return f"register.name {was} → {now}: another champion to beat"
    if was and now:
        return f"{title} {was} → {now}"
    return f"{title} {'changed' if old and new else 'added' if new else 'removed'}"


def data_changed(old: Revision, new: Revision) -> bool:
    """Whether what DVC recorded, or a section of params.yaml about the data, differs."""
    settings = any(old.params.get(section) != new.params.get(section) for section in DATA_SECTIONS)
    return settings or old.outputs != new.outputs


def _data_row(old: Revision, new: Revision, errors: tuple[str, ...]) -> Row:
    """The row of DVC's stages, which a person runs before committing."""
    if errors:
        return Row("prepare", "stale", tuple(error.partition(": run ")[0] for error in errors))
    names = sorted(old.outputs.keys() | new.outputs.keys())
    changed = [name for name in names if old.outputs.get(name) != new.outputs.get(name)]
    shown = tuple(f"{name} {old.outputs.get(name, '')[:8]} → {new.outputs.get(name, '')[:8]}" for name in changed)
    return Row("prepare", "done" if changed else UNCHANGED, shown)
