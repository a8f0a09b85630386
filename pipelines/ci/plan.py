"""`kubealign ci plan`: what changed between two commits, which steps of the pipeline must run, and why.

The orders of both commits are computed from git and dvc.lock, as `resolve` would compute them, and compared; nothing is
run or downloaded. A step runs if its order changed, if anything else in its KFP cache key changed, or if a step before
it runs.
"""

import ast
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from components.common.errors import InputError, single_line
from components.common.files import digest
from components.common.provenance import LOCK, code_parts, module_digest, without_prose
from components.config.model import ModelConfig
from components.config.params import PARAMS, Config
from components.orders import Facts, Order, config_key, make_orders
from components.register.config import RegisterConfig
from components.sources.base_model import EMBEDDED
from components.sources.data import data_folders, embedded_model
from components.stages import BY_NAME, CACHED, ORDERED, STAGES
from pipelines.ci.judged import last_judged
from pipelines.ci.revisions import Revision, branch_point, find_repository, is_own
from pipelines.ci.staleness import stale
from pipelines.git import find_commit, shallow_hint

GRAPH = "pipelines/alignment.py"
IMAGES = "components/common/images.py"
BUILT_FROM = ("components", "pyproject.toml", LOCK)
DATA_SECTIONS = ("data", "prepare", "validate")
UNCHANGED = "as it was"
NEVER_CACHED = "never cached: it reads the current state"
UNCERTAIN = {GRAPH: ": it may pass something else", "register.name": ": there may be another champion to beat"}
"""Changes that may make a step run, and why."""
REASONS = 4
"""Reasons that a row of the table lists; the rest are only counted."""


@dataclass(frozen=True)
class PlanRow:
    """A row of the plan: a step that `runs`, `may run` or is `cached`; for data and images, what to do."""

    step: str
    state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The actions that a change needs: `retrain`, build `images`, review the `data`; `errors` must be fixed first.

    `everything` says why everything counts as changed; it is empty where the commits could be compared.
    """

    base: str
    head: str
    rows: tuple[PlanRow, ...]
    retrain: bool
    images: bool
    data: bool
    errors: tuple[str, ...]
    everything: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        steps = {row.step: {"state": row.state, "reasons": list(row.reasons)} for row in self.rows}
        facts: dict[str, Any] = {"base": self.base, "head": self.head, "everything": self.everything, "steps": steps}
        return facts | {"errors": list(self.errors)} | self.outputs()

    def outputs(self) -> dict[str, bool]:
        """The outputs that decide which jobs of a CI system run."""
        return {"retrain": self.retrain, "images": self.images, "data": self.data}

    def sentence(self) -> str:
        """The conclusion in one sentence."""
        if self.everything:
            return f"{self.everything}, so everything counts as changed: retrain."
        since = f"since {self.base[:12]}"
        if self.retrain:
            return f"What a model is made of changed {since}: retrain."
        return f"Nothing that a model is made of changed {since}: no retraining."


@dataclass(frozen=True)
class Project:
    """What a commit would run: each step's dependencies by name, and the key of the model a retraining would make.

    `mutable_names` are names, such as branches and aliases, whose content may change without a commit here.
    """

    depends: dict[str, dict[str, str]]
    key: str
    mutable_names: tuple[str, ...]


def make_plan(root: Path, base: str, head: str, runner: str, log: Callable[[str], None] = lambda _: None) -> Plan:
    """Compare two commits of a project.

    Args:
        root: the project's folder, in a git repository.
        base: a commit; empty for where the head branched off the main branch, and on that for the last commit that
            was judged, however many were merged since. Zeros are empty (how Git hosts denote the state before a
            branch's first push).
        head: a commit.
        runner: where the steps run; the cache keys of `kubeflow` include images and volumes.
        log: is told of runs in MLflow that prove nothing.

    Without a base, or with one that cannot be read, such as one with conflict markers in dvc.lock, everything changed.

    Raises:
        InputError: no such commit, a file in the head that cannot be read, or MLflow does not say what was judged.
    """
    repo, folder = find_repository(root)
    head_commit = find_commit(repo, head)
    new = Revision(repo, folder, head_commit)
    base_commit, none = (find_commit(repo, base), "") if base.strip("0") else _base(new, log)
    with TemporaryDirectory(prefix="kubealign-") as temporary:
        trees = Path(temporary) / "old", Path(temporary) / "new"
        after = read_project(new, trees[1], runner)
        errors = tuple(stale(new, trees[1]))
        if none:
            return _everything("", head_commit, errors, none)
        try:
            old = Revision(repo, folder, base_commit)
            before = read_project(old, trees[0], runner)
            data, data_row = data_changed(old, new), _data_row(old, new, errors)
        except InputError as error:
            return _everything(base_commit, head_commit, errors, f"{base_commit[:12]} cannot be read ({error})")
    image_changes = sorted({path for path, _ in _built_from(old) ^ _built_from(new)})
    images_row = PlanRow("images", "build anew" if image_changes else "as they are", tuple(_short(image_changes)))
    rows = (data_row, images_row, *_rows(before, after))
    retrain = before.key != after.key or bool(after.mutable_names)
    return Plan(base_commit, head_commit, rows, retrain, bool(image_changes), data or bool(errors), errors)


def _base(head: Revision, log: Callable[[str], None]) -> tuple[str, str]:
    """The commit to compare a head with by default, or why there is none.

    Raises:
        InputError: MLflow does not say what was judged, or a shallow clone lacks it.
    """
    branched = branch_point(head.repo, head.sha)
    if branched:
        return branched, ""
    given = head.params.get("register")
    name = str((given if isinstance(given, dict) else {}).get("name", RegisterConfig().name))
    judged = last_judged(name, log)
    if not judged:
        return "", f"No commit has been judged for {name} yet"
    try:
        return find_commit(head.repo, judged), ""
    except InputError as error:
        if shallow_hint(head.repo):
            raise
        return "", f"The last judged commit is gone ({error}: was the history rewritten?)"


def _everything(base: str, head: str, errors: tuple[str, ...], why: str) -> Plan:
    """The plan where there is nothing to compare with."""
    data = PlanRow("prepare", "stale", _stale_reasons(errors)) if errors else PlanRow("prepare", "done", (why,))
    steps = [PlanRow(stage.name, "runs", (why if stage.cached else NEVER_CACHED,)) for stage in STAGES]
    rows = (data, PlanRow("images", "build anew", (why,)), *steps)
    return Plan(base, head, rows, retrain=True, images=True, data=True, errors=errors, everything=why)


def read_project(revision: Revision, tree: Path, runner: str) -> Project:
    """What a commit would run; its code is written to `tree` to be read, never run.

    Raises:
        InputError: a file of the commit cannot be read.
    """
    try:
        return _read_project(revision, tree, runner)
    except (SyntaxError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{revision.sha[:12]}: code that cannot be read: {single_line(str(error))}") from error


def _read_project(revision: Revision, tree: Path, runner: str) -> Project:
    revision.write(["components", LOCK], tree)
    code = {step: code_parts(f"components.{step}.stage", tree) for step in ORDERED}
    sections = _sections(revision, runner)
    data, mutable_data = _data(revision, sections["data"])
    base, mutable_base = _base_model(revision, sections)
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
        depends[step] = _values(orders[step]) | files | libraries | _cache_inputs(revision, step, sections, runner)
    return Project(depends, config_key(sections, facts), (*mutable_data, *mutable_base))


def _values(order: Order) -> dict[str, str]:
    """The values of an order, by their configuration keys and fact names."""
    settings = {f"{section}.{key}": value for section, keys in order.sections.items() for key, value in keys.items()}
    return {name: str(value) for name, value in (settings | order.origin | order.facts).items() if name != "lineage"}


def _sections(revision: Revision, runner: str) -> dict[str, dict[str, Any]]:
    """The configuration with its defaults; a section of an older commit that this code cannot parse is left as is."""
    sections = {}
    for name, default in Config().sections().items():
        given = revision.params.get(name) or {}
        if not isinstance(given, dict):
            raise InputError(f"{revision.sha[:12]}:{PARAMS}: {name}: expected a section, found {type(given).__name__}")
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
    """The project's version, which is also the images' tag."""
    return str(tomllib.loads(revision.text("pyproject.toml")).get("project", {}).get("version"))


def _data(revision: Revision, data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Facts about the data: DVC's digests if it is in this repository, else names; and which names are mutable."""
    repo, name = str(data["repo"]), str(data["revision"])
    preferences, instructions = data_folders(_path(data))
    if not is_own(revision.repo, revision.folder, repo):
        where = f"{repo} at {name}"
        facts = {"preferences_digest": where, "instructions_digest": where, "data_commit": name}
        return facts, [] if len(name) == 40 else [f"data.revision {name}"]
    digests = {folder: revision.outputs.get(folder, "") for folder in (preferences, instructions)}
    facts = {"preferences_digest": digests[preferences], "instructions_digest": digests[instructions]}
    return facts | {"data_commit": revision.data_commit(digests)}, []


def _path(data: dict[str, Any]) -> str:
    return str(data.get("path", "data"))


def _base_model(revision: Revision, sections: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Facts about base model and chat template: content digests if in git or DVC, else names; and mutable names."""
    model = sections["model"]
    base, template, pinned = str(model.get("base")), str(model.get("chat_template")), str(model.get("revision") or "")
    folder = embedded_model(_path(sections["data"])) if base == EMBEDDED else base
    content = revision.outputs.get(folder) or digest(revision.below(folder))
    in_repository = bool(revision.outputs.get(folder) or revision.below(folder)) or base == EMBEDDED
    immutable = in_repository or bool(pinned) or (base.startswith("models:/") and "@" not in base)
    facts = {"base_reference": base, "base_digest": content if in_repository else f"{base}@{pinned}"}
    facts |= {"template": template, "template_digest": revision.files.get(template, template)}
    facts["template_date"] = str(model.get("template_date"))
    return facts, [] if immutable else [f"model.base {base}"]


def _cache_inputs(revision: Revision, step: str, sections: dict[str, dict[str, Any]], runner: str) -> dict[str, str]:
    """Further inputs of a step's KFP cache key: they make it run, although its result does not depend on them."""
    shell = f"components/{step}/component.py"
    images = digest([module_digest(revision.text(IMAGES)), _version(revision)])
    inputs = {shell: _component_digest(revision.text(shell), step), IMAGES: images}
    if runner == "kubeflow":
        image = f"{BY_NAME[step].image}_image"
        inputs |= {f"cluster.{key}": str(sections["cluster"].get(key)) for key in (image, "state")}
    if step == CACHED[0]:
        inputs[GRAPH] = module_digest(revision.text(GRAPH))
    if "incumbent" in BY_NAME[step].facts:
        inputs["register.name"] = str(sections["register"].get("name"))
    return inputs


def _component_digest(text: str, name: str) -> str:
    """Digest of what KFP ships of a component: its function and decorator, without docstring and comments."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return digest(ast.dump(without_prose(ast.Module(list(nodes), []))))


def _built_from(revision: Revision) -> set[tuple[str, str]]:
    """The files that the images are built from, with their git hashes."""
    files = {item for name in BUILT_FROM for item in revision.below(name).items()}
    return {(path, blob) for path, blob in files if "/tests/" not in path and not path.endswith(".md")}


def _rows(before: Project, after: Project) -> list[PlanRow]:
    """A row for every stage; a step that runs because an earlier one does has that as its last reason."""
    rows: list[PlanRow] = []
    previous: PlanRow | None = None  # the last row of a cacheable stage that runs or may run
    for stage in STAGES:
        if not stage.cached:
            rows.append(PlanRow(stage.name, "runs", (NEVER_CACHED,)))
            continue
        old, new = before.depends[stage.name], after.depends[stage.name]
        changed = [name for name in [*new, *(old.keys() - new.keys())] if old.get(name) != new.get(name)]
        reasons = [_reason(name, old.get(name, ""), new.get(name, "")) for name in changed]
        reasons += [f"{name} may have changed" for name in after.mutable_names if stage.name == CACHED[0]]
        reasons = [*_short(reasons), *([f"after {previous.step}"] if previous else [])]
        certain = set(changed) - UNCERTAIN.keys() or (previous and previous.state == "runs")
        state = "runs" if certain else "may run" if reasons else "cached"
        rows.append(PlanRow(stage.name, state, tuple(reasons)))
        previous = rows[-1] if reasons else previous
    return rows


def _short(reasons: list[str]) -> list[str]:
    """The first reasons, and how many more there are."""
    more = len(reasons) - REASONS
    return [*reasons[:REASONS], f"and {more} more"] if more > 0 else reasons


def _reason(name: str, old: str, new: str) -> str:
    title = f"{name.replace('.', '/')}.py" if name.startswith("components.") else name
    note = UNCERTAIN.get(name, "")
    if old and new and "/" not in title:
        return f"{title} {_shown(old)} → {_shown(new)}{note}"
    return f"{title} {'changed' if old and new else 'added' if new else 'removed'}{note}"


def _shown(value: str) -> str:
    return value[:8] if re.fullmatch(r"[0-9a-f]{32,}(\.dir)?", value) else value


def data_changed(old: Revision, new: Revision) -> bool:
    """Whether DVC's recorded outputs, or a section of params.yaml about the data, differ."""
    settings = any(old.params.get(section) != new.params.get(section) for section in DATA_SECTIONS)
    return settings or old.outputs != new.outputs


def _data_row(old: Revision, new: Revision, errors: tuple[str, ...]) -> PlanRow:
    """The row of DVC's stages, which are run by hand before committing."""
    if errors:
        return PlanRow("prepare", "stale", _stale_reasons(errors))
    names = sorted(old.outputs.keys() | new.outputs.keys())
    changed = [name for name in names if old.outputs.get(name) != new.outputs.get(name)]
    shown = tuple(f"{name} {old.outputs.get(name, '')[:8]} → {new.outputs.get(name, '')[:8]}" for name in changed)
    return PlanRow("prepare", "done" if changed else UNCHANGED, shown)


def _stale_reasons(errors: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(error.partition(": run ")[0] for error in errors)
