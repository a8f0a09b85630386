"""`kubealign ci plan` on a real git and DVC repository: what each kind of change means, and why."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.common.errors import InputError
from components.stages import CACHED
from pipelines.ci.data_report import data_report
from pipelines.ci.plan import make_plan
from pipelines.ci.revisions import branch_point, default_base, find_repository, is_own
from pipelines.git import changed_files, find_commit
from tests.support.clone import Clone, Edit, appended, output, replaced, setting
from tests.support.repositories import dvc, git

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone(tmp_path_factory.mktemp("clone"))


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
    "only the version": Case(
        [replaced("pyproject.toml", r'version = "[\d.]+"', 'version = "9.9.9"')],
        "fetch",
        "components/common/images.py changed",
        retrain=False,
        images=True,
    ),
    "only dpo.beta": Case([setting("dpo.beta", 0.2)], "dpo", "dpo.beta 0.1 → 0.2"),
    "sft.learning_rate": Case([setting("sft.learning_rate", 1e-5)], "sft", "sft.learning_rate 0.0002 → 1e-05"),
    "validate.min_rows": Case([setting("validate.min_rows", 9)], "validate", "validate.min_rows 8 → 9"),
    "only the gate": Case([setting("gate.alpha", 0.01)], "evaluate", "gate.alpha 0.05 → 0.01"),
    "only evaluate": Case([setting("evaluate.seed", 4)], "evaluate", "evaluate.seed 3 → 4"),
    "model.max_length": Case([setting("model.max_length", 512)], "validate", "model.max_length 768 → 512"),
    "only Chinese rows": Case([chinese_rows], "fetch", r"preferences_digest \w{8} → \w{8}"),
    "only instructions": Case([output("data/instructions")], "fetch", r"instructions_digest \w{8} → 55555555"),
    "base model by name": Case(
        [setting("model.base", "models:/llama/3")], "fetch", "base_reference embedded → models:"
    ),
    "embedded base model": Case([output("data/base_model")], "fetch", r"base_digest \w{8} → 55555555"),
    "a base model's alias": Case(
        [setting("model.base", "models:/llama@best")], "fetch", "base_reference embedded → models:/llama@best"
    ),
    "the chat template": Case([setting("model.chat_template", "chatml")], "fetch", "template model → chatml"),
    "the day of the template": Case(
        [setting("model.template_date", "2025-01-31")], "fetch", "template_date 2024-07-26 → 2025-01-31"
    ),
    "torch in the lock file": Case(
        [replaced("requirements.lock", r"(?m)^torch==.*", "torch==9.9.9")],
        "sft",
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
        [appended("components/common/files.py", "\nX = 1\n")],
        "fetch",
        "components/common/files.py",
        images=True,
        error="prepare is stale (its code changed)",
    ),
    "a chat template": Case(
        [appended("components/dataset/templates/chatml.jinja", "{# more #}")],
        "fetch",
        "components/dataset/templates/chatml.jinja changed",
        images=True,
    ),
    "texts for people and pages": Case(
        [
            appended("components/engine/loop.py", "# more\n"),
            replaced("components/engine/objectives.py", '^"""', '"""More: '),
            replaced("components/dpo/config.py", "KL penalty coefficient", "coefficient of the KL penalty"),
            replaced("components/sft/component.py", r'    """.*', r"\g<0> More."),
            appended("components/report/page.css", "b { color: red }\n"),
            appended("components/report/html.py", "\nX = 1\n"),
            appended("components/validate/report_page.py", "\nX = 1\n"),
            appended("components/evaluate/report_page.py", "\nX = 1\n"),
            appended("components/prepare/README.md", "more\n"),
            appended("components/prepare/split.py", "# more\n"),
        ],
        retrain=False,
        images=True,
    ),
    "a knob of the cluster": Case(
        [replaced("components/config/cluster.py", "    nodes: int", "    x: int = 1\n    nodes: int")],
        retrain=False,
        images=True,
    ),
    "a component's shell": Case(
        [
            replaced(
                "components/sft/component.py", r"show_metrics\(metrics, values\)", "show_metrics(metrics, dict(values))"
            )
        ],
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
    "register.format": Case([setting("register.format", "adapter")]),
    "register.promote": Case([setting("register.promote", False)], retrain=False),
    "data of another repository": Case(
        [setting("data.repo", "https://git.example.com/d.git"), setting("data.revision", "main")],
        "fetch",
        "data_repo . → https",
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
        error="prepare is stale (its code changed)",
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
    assert rows["fetch"].reasons == ("model.base models:/llama@best may have changed",)


def test_the_data_of_an_earlier_time_again_is_the_same_model_and_another_commit_of_the_data(clone: Clone) -> None:
    clone.commit(output("data/preferences"))
    shutil.copy(clone.root / "dvc.lock", clone.root / "saved")
    git(clone.root, "checkout", "-q", clone.base, "--", "dvc.lock")
    (clone.root / "saved").unlink()
    git(clone.root, "commit", "-qam", "back")
    plan = make_plan(clone.root, clone.base, "HEAD", "kubeflow")
    rows = {row.step: row for row in plan.rows}
    assert not plan.retrain and rows["fetch"].state == "runs"
    assert re.fullmatch(r"data_commit \w{8} → \w{8}", rows["fetch"].reasons[0])


def test_the_default_base_is_where_the_branch_left_main_and_on_main_the_commit_before(clone: Clone) -> None:
    branch = clone.commit(setting("dpo.beta", 0.3))
    git(clone.root, "checkout", "-q", "--detach", branch)
    assert make_plan(clone.root, "", "HEAD", "kubeflow").base == clone.base
    git(clone.root, "branch", "-f", "main", branch)
    try:
        assert default_base(clone.root, branch) == clone.base and branch_point(clone.root, branch) == ""
    finally:
        git(clone.root, "branch", "-f", "main", clone.base)
    with pytest.raises(InputError, match="no such commit in this clone$"):
        make_plan(clone.root, "beef" * 10, "HEAD", "kubeflow")
    with pytest.raises(InputError, match="^--output=x: no such commit in this clone$"):
        make_plan(clone.root, "--output=x", "HEAD", "kubeflow")


MARKERS = "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n"
BROKEN: dict[str, tuple[str, str]] = {
    "dvc.lock": (MARKERS, "dvc.lock: not valid YAML"),
    "params.yaml": (MARKERS, "params.yaml: not valid YAML"),
    "a section of params.yaml": ("dpo: 3\n", "params.yaml: dpo: expected a section, found int"),
    "data/more.dvc": ("outs: 3\n", "data/more.dvc: expected stages and outputs"),
    "pyproject.toml": (MARKERS, "code that cannot be read"),
    "components/dpo/stage.py": (MARKERS, "code that cannot be read"),
    "components/dpo/component.py": (MARKERS, "code that cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_base_that_cannot_be_read_means_that_everything_changed(clone: Clone, name: str) -> None:
    text, why = BROKEN[name]
    file = name.rsplit(maxsplit=1)[-1]
    broken = clone.commit(lambda root: (root / file).write_text(text))
    plan = make_plan(clone.root, broken, clone.base, "kubeflow")
    assert f"{broken[:12]} cannot be read ({broken[:12]}" in plan.sentence() and why in plan.sentence()
    assert plan.retrain and plan.images and plan.data and not plan.errors
    assert {row.state for row in plan.rows} == {"runs", "done", "build anew"}
    with pytest.raises(InputError, match=re.escape(f"{broken[:12]}:")) as error:
        make_plan(clone.root, clone.base, broken, "kubeflow")
    assert why in str(error.value)


def test_a_report_on_what_mends_the_data_says_that_it_cannot_compare(clone: Clone) -> None:
    broken = clone.commit(appended("dvc.lock", MARKERS))
    text = data_report(clone.root, broken, clone.base).text
    assert f"The rows cannot be compared: {broken[:12]}:dvc.lock: not valid YAML" in text and "## Validation: " in text


def test_a_submodule_anywhere_breaks_no_plan(clone: Clone, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "other")
    git(tmp_path / "other", "commit", "-q", "--allow-empty", "-m", "other")

    def add(root: Path) -> None:
        for folder in ("components/third_party", "third.dvc"):
            git(root, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(tmp_path / "other"), folder)

    plan = clone.plan(add)
    git(clone.root, "submodule", "deinit", "-q", "--all", "--force")
    assert not changed_files(clone.root)
    assert not plan.retrain and plan.images and not plan.errors
    git(clone.root, "checkout", "-q", clone.base)
    shutil.rmtree(clone.root / ".git" / "modules")


def test_a_shallow_clone_says_that_it_lacks_the_commit(clone: Clone, tmp_path: Path) -> None:
    head = clone.commit()
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{clone.root}", "shallow")
    for base in ("", clone.base):
        with pytest.raises(InputError, match="a shallow clone: .*fetch-depth: 0") as error:
            make_plan(tmp_path / "shallow", base, head, "kubeflow")
    assert f"{clone.base}: no such commit" in str(error.value)


def test_a_folder_without_git_and_a_machine_without_git_are_told_apart(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="not in a git repository; expected a clone of the project"):
        find_repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="git: no such program on the PATH"):
        find_repository(clone.root)


def test_hooks_and_variables_of_another_repository_change_nothing(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the command runs in a hook of another repository, and this one has a file system monitor of its own."""
    git(clone.root, "checkout", "-q", clone.base)
    (tmp_path / "monitor").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "monitor").chmod(0o755)
    git(clone.root, "config", "core.fsmonitor", str(tmp_path / "monitor"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    try:
        assert find_commit(clone.root, "HEAD") == clone.base and not changed_files(clone.root)
        (clone.root / "README.md").write_text("other\n")
        assert changed_files(clone.root) == ["README.md"] and not (tmp_path / "ran").exists()
    finally:
        monkeypatch.delenv("GIT_DIR")
        git(clone.root, "config", "--unset", "core.fsmonitor")
        git(clone.root, "checkout", "-q", "README.md")


def test_a_repository_is_known_by_its_folder_and_by_every_spelling_of_its_origin(clone: Clone) -> None:
    git(clone.root, "remote", "add", "origin", "git@git.example.com:team/data.git")
    try:
        repo, folder = find_repository(clone.root)
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
