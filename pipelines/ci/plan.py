"""`kubealign ci plan`: what a change between two commits means, which steps of the pipeline have to run, and why.

The orders of both commits are made from git and dvc.lock, as `resolve` would make them, and compared; nothing is run or
downloaded. A step runs when its own order changed, or what KFP's cache goes by beside it, or a step before it runs.
"""

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from components.common.files import digest
from components.common.provenance import LOCK, code_parts, module_digest, without_prose
from components.config.model import ModelConfig
from components.config.params import Config
from components.orders import Facts, Order, config_key, make_orders
from components.sources.base_model import EMBEDDED
from components.sources.data import data_folders, embedded_model
from components.stages import BY_NAME, CACHED, ORDERED, STAGES
from pipelines.ci.revisions import Revision, default_base, find_repository, is_own
from pipelines.ci.staleness import stale
from pipelines.git import find_commit

GRAPH = "pipelines/alignment.py"
IMAGES = "components/common/images.py"
BUILT_FROM = ("components", "pyproject.toml", LOCK)
DATA_SECTIONS = ("data", "prepare", "validate")
UNCHANGED = "as it was"
NEVER_CACHED = "never cached: it looks up what is true now"
UNCERTAIN = {GRAPH: ": it may pass something else", "register.name": ": another champion to beat"}
"""Changes that need not make a step run, and why they may."""
REASONS = 4
"""Reasons that a row of the table names; the others are counted."""


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


@dataclass(frozen=True)
class Project:
    """What a commit would run: all that each step depends on, by name, and the key of what a retraining would make.

    `moving` are names that may mean something else without a change here.
    """

    depends: dict[str, dict[str, str]]
    key: str
    moving: tuple[str, ...]


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
        before, after = read_project(old, trees[0], runner), read_project(new, trees[1], runner)
        errors = tuple(stale(new, trees[1]))
        changed = sorted({path for path, _ in _built_from(old) ^ _built_from(new)})
        prepared = _data_row(old, new, errors)
        touched = data_changed(old, new)
    images = Row("images", "build anew" if changed else "as they are", tuple(_short(changed)))
    rows = (prepared, images, *_rows(before, after))
    retrain = before.key != after.key or bool(after.moving)
    return Plan(first, last, rows, retrain, bool(changed), touched or bool(errors), errors)


def read_project(revision: Revision, tree: Path, runner: str) -> Project:
    """What a commit would run; `tree` gets its code, which is read, never run."""
    revision.write(["components", LOCK], tree)
    code = {step: code_parts(f"components.{step}.stage", tree) for step in ORDERED}
    sections = _sections(revision, runner)
    data, moving = _data(revision, sections["data"])
    base, moving_base = _base_model(revision, sections)
    names: dict[str, Any] = {
        "data_repo": str(sections["data"]["repo"]),
        "data_path": _path(sections["data"]),
        "git_commit": "",
        "data_clean": True,
    }
    digests = {step: digest(list(parts))[:16] for step, parts in code.items()}
    facts = Facts(**data, **base, **names, test_set="", code=digests)
    orders = make_orders(sections, facts)
    depends = {}
    for step in CACHED:
        files, libraries = code[step]
        depends[step] = _values(orders[step]) | files | libraries | _beside(revision, step, sections, runner)
    return Project(depends, config_key(sections, facts), (*moving, *moving_base))


def _values(order: Order) -> dict[str, str]:
    """What an order holds, by names that a person knows."""
    found = {f"{section}.{key}": value for section, keys in order.sections.items() for key, value in keys.items()}
    return {name: str(value) for name, value in (found | order.origin | order.facts).items() if name != "lineage"}


def _sections(revision: Revision, runner: str) -> dict[str, dict[str, Any]]:
    """The configuration, with its defaults; a section of an older commit that this code cannot read, as it stands."""
    sections = {}
    for name, default in Config().sections().items():
        given = revision.params.get(name) or {}
        try:
            sections[name] = Config.model_validate({name: given}).sections()[name]
        except ValidationError:
            sections[name] = {key: value for key, value in (default | given).items() if value != "auto"}
    gpus = runner == "kubeflow" and (sections["cluster"].get("train") or {}).get("gpus")
    try:
        model = ModelConfig.model_validate(sections["model"]).resolved("gpu+bf16" if gpus else "cpu")
    except ValidationError:
        return sections
    return sections | {"model": model.model_dump(mode="json")}


def _version(revision: Revision) -> str:
    """The project's version, which is the images' tag."""
    return str(tomllib.loads(revision.text("pyproject.toml")).get("project", {}).get("version"))


def _data(revision: Revision, data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The data: of this repository as DVC recorded it, of another one by name; and the names that move."""
    repo, name = str(data["repo"]), str(data["revision"])
    preferences, instructions = data_folders(_path(data))
    if not is_own(revision.repo, revision.folder, repo):
        facts = {"preferences_digest": f"{repo}@{name}", "instructions_digest": f"{repo}@{name}", "data_commit": name}
        return facts, [] if len(name) == 40 else [f"data.revision {name}"]
    digests = {folder: revision.outputs.get(folder, "") for folder in (preferences, instructions)}
    facts = {"preferences_digest": digests[preferences], "instructions_digest": digests[instructions]}
    return facts | {"data_commit": revision.data_commit(digests)}, []


def _path(data: dict[str, Any]) -> str:
    return str(data.get("path", "data"))


def _base_model(revision: Revision, sections: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Base model and chat template: what is in git or DVC by content, else by name; and the names that move."""
    model = sections["model"]
    base, template, pinned = str(model.get("base")), str(model.get("chat_template")), str(model.get("revision") or "")
    folder = embedded_model(_path(sections["data"])) if base == EMBEDDED else base
    own = revision.outputs.get(folder) or digest(revision.below(folder))
    known = bool(revision.outputs.get(folder) or revision.below(folder)) or base == EMBEDDED
    definite = known or bool(pinned) or (base.startswith("models:/") and "@" not in base)
    facts = {"base_reference": base, "base_digest": own if known else f"{base}@{pinned}"}
    facts |= {"template": template, "template_digest": revision.files.get(template, template)}
    return facts, [] if definite else [f"model.base {base}"]


def _beside(revision: Revision, step: str, sections: dict[str, dict[str, Any]], runner: str) -> dict[str, str]:
    """What makes a step run beside its order, though no result depends on it: KFP's cache goes by it."""
    shell = f"components/{step}/component.py"
    images = digest([module_digest(revision.text(IMAGES)), _version(revision)])
    found = {shell: _component(revision.text(shell), step), IMAGES: images}
    if runner == "kubeflow":
        image = f"{BY_NAME[step].image}_image"
        found |= {f"cluster.{key}": str(sections["cluster"].get(key)) for key in (image, "state")}
    if step == CACHED[0]:
        found[GRAPH] = module_digest(revision.text(GRAPH))
    if "incumbent" in BY_NAME[step].facts:
        found["register.name"] = str(sections["register"].get("name"))
    return found


def _component(text: str, name: str) -> str:
    """What KFP ships of a component: its function and decorator, without what is for people."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return digest(ast.dump(without_prose(ast.Module(list(nodes), []))))


def _built_from(revision: Revision) -> set[tuple[str, str]]:
    """The files that the images are built from."""
    found = {item for name in BUILT_FROM for item in revision.below(name).items()}
    return {(path, blob) for path, blob in found if "/tests/" not in path and not path.endswith(".md")}


def _rows(before: Project, after: Project) -> list[Row]:
    """A row for every stage; the reasons of a step that runs after another one end with that."""
    rows: list[Row] = []
    last: Row | None = None
    for stage in STAGES:
        if not stage.cached:
            rows.append(Row(stage.name, "runs", (NEVER_CACHED,)))
            continue
        old, new = before.depends[stage.name], after.depends[stage.name]
        changed = [name for name in [*new, *(old.keys() - new.keys())] if old.get(name) != new.get(name)]
        reasons = [_reason(name, old.get(name, ""), new.get(name, "")) for name in changed]
        reasons += [f"{name} may mean something new" for name in after.moving if stage.name == CACHED[0]]
        reasons = [*_short(reasons), *([f"after {last.step}"] if last else [])]
        surely = set(changed) - UNCERTAIN.keys() or (last and last.state == "runs")
        state = "runs" if surely else "may run" if reasons else "cached"
        rows.append(Row(stage.name, state, tuple(reasons)))
        last = rows[-1] if reasons else last
    return rows


def _short(reasons: list[str]) -> list[str]:
    more = len(reasons) - REASONS
    return [*reasons[:REASONS], f"and {more} more"] if more > 0 else reasons


def _reason(name: str, old: str, new: str) -> str:
    title = f"{name.replace('.', '/')}.py" if name.startswith("components.") else name
    more = UNCERTAIN.get(name, "")
    if old and new and "/" not in title:
        return f"{title} {_shown(old)} → {_shown(new)}{more}"
    return f"{title} {'changed' if old and new else 'added' if new else 'removed'}{more}"


def _shown(value: str) -> str:
    return value[:8] if re.fullmatch(r"[0-9a-f]{32,}(\.dir)?", value) else value


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
