"""`kubealign ci plan` on a real git and DVC repository: what each kind of change means, and why."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from components.common.errors import InputError
from components.stages import CACHED
from pipelines.ci.plan import Plan, make_plan
from pipelines.ci.revisions import is_own, opened_repository
from tests.conftest import ROOT
from tests.pipelines.test_shell import dvc, git

DVC_YAML = {
    "stages": {
        "prepare": {
            "cmd": "prepare",
            "deps": ["components/prepare", "data/sources.lock"],
            "params": ["prepare"],
            "outs": ["data/preferences", "data/instructions"],
        },
        "base_model": {"cmd": "prepare --base-model", "deps": ["data/sources.lock"], "outs": ["data/base_model"]},
    }
}


class Clone:
    """A project in git and DVC; every change is a commit on top of the same base."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("components", "pipelines"):
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        for name in ("params.yaml", "requirements.lock", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, root)
        (root / "tests").mkdir()
        (root / "tests" / "test_x.py").write_text("")
        for name in ("preferences", "instructions", "base_model"):
            (root / "data" / name).mkdir(parents=True)
            (root / "data" / name / "train.jsonl").write_text('{"lang": "en"}\n{"lang": "zh"}\n')
        (root / "data" / "sources.lock").write_text("model: {}\n")
        (root / "dvc.yaml").write_text(yaml.safe_dump(DVC_YAML))
        git(root, "init", "-q", "-b", "main")
        dvc(root, "init", "-q")
        dvc(root, "commit", "-q", "-f")
        git(root, "add", "-A")
        git(root, "commit", "-qm", "base")
        self.base = git(root, "rev-parse", "HEAD")

    def commit(self, *edits: "Edit") -> str:
        git(self.root, "checkout", "-q", self.base)
        for edit in edits:
            edit(self.root)
        git(self.root, "add", "-A")
        git(self.root, "commit", "-q", "--allow-empty", "-m", "change")
        return git(self.root, "rev-parse", "HEAD")

    def plan(self, *edits: "Edit", runner: str = "kubeflow") -> Plan:
        return make_plan(self.root, self.base, self.commit(*edits), runner)


Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone"))


def setting(key: str, value: object) -> Edit:
    def edit(root: Path) -> None:
        params = yaml.safe_load((root / "params.yaml").read_text())
        section, name = key.split(".")
        params[section][name] = value
        (root / "params.yaml").write_text(yaml.safe_dump(params))

    return edit


def appended(path: str, text: str) -> Edit:
    def edit(root: Path) -> None:
        with (root / path).open("a") as file:
            file.write(text)

    return edit


def replaced(path: str, pattern: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        text, count = re.subn(pattern, new, (root / path).read_text(), count=1)
        assert count == 1, f"{pattern} is not in {path}"
        (root / path).write_text(text)

    return edit


def output(name: str) -> Edit:
    """A new digest of an output in dvc.lock, as after `dvc repro`."""
    return replaced("dvc.lock", rf"(path: {name}\n\s+hash: md5\n\s+md5: )\w{{32}}", rf"\g<1>{'5' * 32}")


def chinese_rows(root: Path) -> None:
    file = root / "data" / "preferences" / "train.jsonl"
    before = file.read_text()
    file.write_text(before + '{"lang": "zh", "more": 1}\n')
    dvc(root, "commit", "-q", "-f", "prepare")
    file.write_text(before)


@dataclass(frozen=True)
class Case:
    """A change, the first step that runs again with the reason that it gives, and what follows from it."""

    edits: list[Edit]
    first: str = ""
    why: str = ""
    retrain: bool = True
    images: bool = False
    state: str = "runs"
    error: str = ""


CASES = {
    "nothing": Case([], retrain=False),
    "only README": Case([appended("README.md", "more\n")], retrain=False),
    "only tests": Case([appended("tests/test_x.py", "x = 1\n")], retrain=False),
    "only dpo.beta": Case([setting("dpo.beta", 0.2)], "dpo", "dpo.beta 0.1 → 0.2"),
    "sft.lr": Case([setting("sft.lr", 1e-5)], "sft", "sft.lr 0.0002 → 1e-05"),
    "validate.min_rows": Case([setting("validate.min_rows", 9)], "validate", "validate.min_rows 8 → 9"),
    "only the gate": Case([setting("gate.alpha", 0.01)], "evaluate", "gate.alpha 0.05 → 0.01"),
    "only evaluate": Case([setting("evaluate.seed", 4)], "evaluate", "evaluate.seed 3 → 4"),
    "model.max_length": Case([setting("model.max_length", 512)], "fetch", "model.max_length 768 → 512"),
    "only Chinese rows": Case([chinese_rows], "fetch", r"data/preferences \w{8} → \w{8}"),
    "only instructions": Case([output("data/instructions")], "fetch", r"data/instructions \w{8} → 55555555"),
    "base model by name": Case([setting("model.base", "models:/llama/3")], "fetch", "model.base embedded → models:"),
    "embedded base model": Case([output("data/base_model")], "fetch", "base model's files .* → 55555555"),
    "a base model's alias": Case(
        [setting("model.base", "models:/llama@best")], "fetch", "model.base embedded → models:/llama@best"
    ),
    "the chat template": Case([setting("model.template", "chatml")], "fetch", "model.template model → chatml"),
    "torch in the lock file": Case(
        [replaced("requirements.lock", r"(?m)^torch==.*", "torch==9.9.9")],
        "fetch",
        r"torch [\d.]+ → 9.9.9",
        images=True,
    ),
    "a library that no step's result depends on": Case(
        [replaced("requirements.lock", r"(?m)^boto3==.*", "boto3==9.9.9")], retrain=False, images=True
    ),
    "one stage's code": Case(
        [appended("components/dpo/stage.py", "\nX = 1\n")], "dpo", "components/dpo/stage.py changed", images=True
    ),
    "the training engine": Case(
        [appended("components/engine/loop.py", "\nX = 1\n")], "sft", "components/engine/loop.py", images=True
    ),
    "common code": Case(
        [appended("components/common/files.py", "\nX = 1\n")], "fetch", "components/common/files.py", images=True
    ),
    "a component's shell": Case(
        [replaced("components/sft/component.py", r'    """.*', r"\g<0> More.")],
        "sft",
        "components/sft/component.py changed",
        retrain=False,
        images=True,
    ),
    "a component's tests and README": Case(
        [appended("components/sft/README.md", "x"), appended("components/sft/tests/test_component_unit.py", "\n")],
        retrain=False,
    ),
    "only pipelines/": Case([appended("pipelines/cli.py", "\n# more\n")], retrain=False),
    "the graph": Case(
        [appended("pipelines/alignment.py", "\nX = 1\n")],
        "fetch",
        "may pass something else",
        retrain=False,
        state="may run",
    ),
    "a comment on the graph": Case([appended("pipelines/alignment.py", "\n# more\n")], retrain=False),
    "only the cluster": Case([setting("cluster.retries", 5)], retrain=False),
    "an image of the cluster": Case(
        [setting("cluster.train_image", "r.example.com/train:1")], "sft", "cluster.train_image", retrain=False
    ),
    "register.name": Case(
        [setting("register.name", "other")], "evaluate", "register.name kubealign → other", state="may run"
    ),
    "register.promote": Case([setting("register.promote", False)], retrain=False),
    "data of another repository": Case(
        [setting("data.repo", "https://git.example.com/d.git"), setting("data.revision", "main")],
        "fetch",
        "data.repo . → https",
    ),
    "sources.lock without dvc.lock": Case(
        [appended("data/sources.lock", "x: 1\n")],
        retrain=False,
        error="prepare is stale (data/sources.lock changed): run `dvc repro` and commit dvc.lock",
    ),
    "prepare's settings without dvc.lock": Case(
        [setting("prepare.near_duplicate", 0.5)],
        retrain=False,
        error="prepare is stale (prepare of params.yaml changed)",
    ),
    "prepare's code without dvc.lock": Case(
        [appended("components/prepare/split.py", "\nX = 1\n")],
        retrain=False,
        images=True,
        error="prepare is stale (components/prepare changed)",
    ),
    "dvc.yaml without dvc.lock": Case(
        [replaced("dvc.yaml", "cmd: prepare --base-model", "cmd: other")],
        retrain=False,
        error="base_model is stale (its command changed)",
    ),
}


NEW_DATA = ("only Chinese rows", "only instructions", "embedded base model")


@pytest.mark.parametrize("name", CASES)
def test_a_change_runs_the_steps_that_depend_on_it_and_no_other(clone: Clone, name: str) -> None:
    case = CASES[name]
    plan = clone.plan(*case.edits)
    rows = {row.step: row for row in plan.rows}
    first = CACHED.index(case.first) if case.first else len(CACHED)
    expected = {step: case.state if number >= first else "cached" for number, step in enumerate(CACHED)}
    assert {step: rows[step].state for step in CACHED} == expected, plan
    if case.first:
        assert re.search(case.why, "; ".join(rows[case.first].reasons)), rows[case.first]
    assert (plan.retrain, plan.images) == (case.retrain, case.images), plan
    assert any(case.error in error for error in plan.errors) if case.error else not plan.errors, plan.errors
    assert rows["resolve"].state == rows["register"].state == "runs"
    assert rows["prepare"].state == ("stale" if case.error else "done" if name in NEW_DATA else "as it was")


def test_what_kubeflow_alone_caches_by_means_nothing_to_the_local_runner(clone: Clone) -> None:
    edit = setting("cluster.train_image", "r.example.com/train:1")
    plan = clone.plan(edit, runner="subprocess")
    assert {row.state for row in plan.rows if row.step in CACHED} == {"cached"}


def test_a_name_that_moves_may_mean_something_new_without_a_change(clone: Clone) -> None:
    git(clone.root, "checkout", "-q", clone.base)
    first = clone.commit(setting("model.base", "models:/llama@best"))
    appended("README.md", "x")(clone.root)
    git(clone.root, "commit", "-qam", "nothing else")
    plan = make_plan(clone.root, first, "HEAD", "kubeflow")
    rows = {row.step: row for row in plan.rows}
    assert {rows[step].state for step in CACHED} == {"may run"} and plan.retrain
    assert rows["fetch"].reasons == ("model.base models:/llama@best may mean something new",)


def test_the_data_of_an_earlier_time_again_is_the_same_model_and_another_commit_of_the_data(clone: Clone) -> None:
    clone.commit(output("data/preferences"))
    shutil.copy(clone.root / "dvc.lock", clone.root / "saved")
    git(clone.root, "checkout", "-q", clone.base, "--", "dvc.lock")
    (clone.root / "saved").unlink()
    git(clone.root, "commit", "-qam", "back")
    plan = make_plan(clone.root, clone.base, "HEAD", "kubeflow")
    rows = {row.step: row for row in plan.rows}
    assert not plan.retrain and rows["fetch"].state == "runs"
    assert re.fullmatch(r"the commit of the data \w{12} → \w{12}", rows["fetch"].reasons[0])


def test_the_default_base_is_where_the_branch_left_main_and_on_main_the_commit_before(clone: Clone) -> None:
    branch = clone.commit(setting("dpo.beta", 0.3))
    git(clone.root, "checkout", "-q", "--detach", branch)
    assert make_plan(clone.root, "", "HEAD", "kubeflow").base == clone.base
    git(clone.root, "branch", "-f", "main", branch)
    try:
        assert make_plan(clone.root, "0" * 40, "main", "kubeflow").base == clone.base
    finally:
        git(clone.root, "branch", "-f", "main", clone.base)
    with pytest.raises(InputError, match="no such commit in this clone; a shallow clone lacks it"):
        make_plan(clone.root, "beef" * 10, "HEAD", "kubeflow")


def test_a_repository_is_known_by_its_folder_and_by_every_spelling_of_its_origin(clone: Clone) -> None:
    git(clone.root, "remote", "add", "origin", "git@git.example.com:team/data.git")
    try:
        with opened_repository(clone.root) as (repo, folder):
            same = (
                ".",
                str(clone.root),
                "https://git.example.com/team/data",
                "ssh://git@git.example.com/team/data.git",
            )
            assert all(is_own(repo, folder, name) for name in same)
            other = ("..", "https://git.example.com/team/other", "https://git.example.org/team/data.git")
            assert not any(is_own(repo, folder, name) for name in other)
    finally:
        git(clone.root, "remote", "remove", "origin")


def test_the_command_prints_a_table_or_json_and_tells_the_next_job(
    clone: Clone, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    head = clone.commit(setting("dpo.beta", 0.3))
    words = ["ci", "plan", "--project", str(clone.root), "--base", clone.base, "--head", head]
    found = CliRunner().invoke(app, [*words, "--json", "--outputs", str(tmp_path / "outputs")])
    assert json.loads(found.stdout)["steps"]["dpo"] == {"state": "runs", "reasons": ["dpo.beta 0.1 → 0.3"]}
    assert (tmp_path / "outputs").read_text() == "retrain=true\nimages=false\ndata=false\n"
    assert "| dpo | runs | dpo.beta 0.1 → 0.3 |" in CliRunner().invoke(app, [*words, "--markdown"]).stdout
    assert "dpo.beta 0.1 → 0.3" in CliRunner().invoke(app, words).stdout
    stale = clone.commit(appended("data/sources.lock", "x: 1\n"))
    found = CliRunner().invoke(app, [*words[:-1], stale])
    assert found.exit_code == 1 and "run `dvc repro` and commit dvc.lock" in found.stderr
