"""A step's code has an identity as wide as its behaviour: texts for people and pages change nothing, an engine does."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.common import provenance
from components.common.provenance import checked_out, code_digest, imported_modules, source_digest
from components.config.params import load_config
from components.stages import ORDERED
from components.training.run import checkpoint_folder
from tests.conftest import ROOT
from tests.support.repositories import git

Edit = Callable[[Path], object]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code, whose digests are taken."""
    shutil.copytree(ROOT / "components", tmp_path / "components", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / provenance.LOCK, tmp_path)
    monkeypatch.setattr(provenance, "PACKAGES", tmp_path)
    monkeypatch.setattr(provenance, "versions", lambda names: {})
    return tmp_path


def appended(path: str, text: str) -> Edit:
    def edit(root: Path) -> None:
        assert (root / path).is_file(), f"{path} is not there"
        with (root / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return edit


def replaced(path: str, pattern: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        text, count = re.subn(pattern, new, (root / path).read_text(encoding="utf-8"), count=1)
        assert count == 1, f"{pattern} is not in {path}"
        (root / path).write_text(text, encoding="utf-8")

    return edit


def digests() -> dict[str, str]:
    return {stage: code_digest(stage) for stage in ORDERED}


def checkpoints() -> list[str]:
    """The names of the folders of a training of each kind."""
    config = load_config(ROOT / "params.yaml", ["model.precision=fp32", "model.hardware=cpu"])
    names = []
    for stage, section in (("sft", config.sft), ("dpo", config.dpo)):
        with checkpoint_folder(stage, section, config.model, "data", "base") as folder:
            names.append(folder.name)
    return names


NOTHING = {
    "a comment": appended("components/engine/loop.py", "# more\n"),
    "layout": appended("components/engine/loop.py", "\n\n\n"),
    "a module's docstring": replaced("components/engine/objectives.py", '^"""', '"""More: '),
    "a function's docstring": replaced("components/training/run.py", r'(def step_metrics.*\n    """)', r"\1More: "),
    "a constant's docstring": replaced("components/engine/checkpoints.py", '"""Checkpoints kept', '"""More kept'),
    "the style sheet": appended("components/report/page.css", "b { color: red }\n"),
    "the page's script": appended("components/report/page.js", "// more\n"),
    "what makes a page": appended("components/report/html.py", "\nX = 1\n"),
    "the page of validate": appended("components/validate/report_page.py", "\nX = 1\n"),
    "the page of evaluate": appended("components/evaluate/report_page.py", "\nX = 1\n"),
    "the model card": appended("components/register/card.py", "\nX = 1\n"),
    "a page template": appended("components/report/templates/alignment.html.jinja", "<p>{{ sentence }}</p>"),
    "a field's description": replaced(
        "components/dpo/config.py", "KL penalty coefficient", "coefficient of the KL penalty"
    ),
    "a word of cluster": replaced("components/config/cluster.py", "Kubeflow profile that", "The profile that"),
    "a knob of cluster": replaced("components/config/cluster.py", "    nodes: int", "    x: int = 1\n    nodes: int"),
    "the aggregate": appended("components/config/params.py", "\nX = 1\n"),
    "the table of stages": appended("components/stages.py", "\nX = 1\n"),
    "a README": appended("components/sft/README.md", "more\n"),
    "a test": appended("components/sft/tests/test_component_unit.py", "\nX = 1\n"),
}
BEHAVIOUR = {
    "the training loop": (appended("components/engine/loop.py", "\nX = 1\n"), "sft dpo evaluate"),
    "the objectives": (
        replaced("components/engine/objectives.py", "return", "pass\n    return"),
        "sft dpo evaluate register",
    ),
    "a stage": (appended("components/dpo/stage.py", "\nX = 1\n"), "dpo"),
    "a check of the data": (appended("components/validate/duplicates.py", "\nX = 1\n"), "validate"),
    "the rules of the gate": (appended("components/gate/rules.py", "\nX = 1\n"), "evaluate register"),
    "the default of a knob": (replaced("components/dpo/config.py", "default=0.1,", "default=0.2,"), "dpo"),
    "a new knob": (
        replaced("components/sft/config.py", "    train_on_turns", "    more: int = 1\n    train_on_turns"),
        "sft",
    ),
    "a chat template": (
        appended("components/dataset/templates/chatml.jinja", "{# more #}"),
        "fetch validate sft dpo evaluate",
    ),
    "peft in the lock file": (replaced(provenance.LOCK, r"(?m)^peft==.*", "peft==9.9.9"), "sft dpo evaluate"),
    "Great Expectations in the lock file": (
        replaced(provenance.LOCK, r"(?m)^great.expectations==.*", "great-expectations==9.9.9"),
        "validate",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_text_for_people_or_a_page_changes_no_digest_and_no_checkpoint(tree: Path, name: str) -> None:
    before = digests(), checkpoints()
    NOTHING[name](tree)
    assert (digests(), checkpoints()) == before


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_a_behaviour_changes_the_digests_of_the_stages_that_have_it(tree: Path, name: str) -> None:
    edit, expected = BEHAVIOUR[name]
    before = digests()
    edit(tree)
    after = digests()
    assert {stage for stage in ORDERED if after[stage] != before[stage]} == set(expected.split())


def test_a_changed_engine_leaves_no_checkpoint_to_go_on_from(tree: Path) -> None:
    before = checkpoints()
    BEHAVIOUR["the training loop"][0](tree)
    assert not set(checkpoints()) & set(before)


def test_the_check_notices_a_digest_that_takes_texts_for_code(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "module_digest", provenance.digest)
    before = digests()
    NOTHING["a function's docstring"](tree)
    assert digests() != before


def test_the_check_notices_a_digest_that_takes_pages_for_results(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "WITHOUT_RESULT", re.compile("nothing"))
    before = digests()
    NOTHING["the page of validate"](tree)
    assert {stage for stage in ORDERED if digests()[stage] != before[stage]} == {"validate"}


def test_what_is_taken_for_a_page_is_there() -> None:
    """A page writer that is renamed must stay one."""
    writers = [path for path in (ROOT / "components").rglob("*.py") if path.stem in ("report_page", "card")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in writers]
    assert len(names) == 3 and all(provenance.WITHOUT_RESULT.fullmatch(name) for name in names)


def test_the_code_follows_what_a_stage_imports_and_nothing_else() -> None:
    modules = imported_modules("components.dpo.stage")
    assert "components.engine.objectives" in modules and "components.dataset.chat" in modules
    assert "components.validate.stage" not in modules and "components.evaluate.stage" not in modules
    sections = {name for name in modules if re.search(r"\.config(\.|$)", name)}
    known = {"components.config.section", "components.config.model"}
    assert sections == known | {"components.dpo.config", "components.training.config"}
    assert code_digest("dpo") != code_digest("sft")


def test_the_data_is_stale_for_another_content_id_and_not_for_a_readme_or_a_comment(tree: Path) -> None:
    start = "components.prepare.stage"
    before = source_digest(start, tree)
    appended("components/prepare/README.md", "more\n")(tree)
    appended("components/dataset/records.py", "# more\n")(tree)
    replaced(provenance.LOCK, r"(?m)^torch==.*", "torch==9.9.9")(tree)
    assert source_digest(start, tree) == before
    replaced("components/dataset/records.py", r"(def content_id(.|\n)*?    return )", r"\1'x' + ")(tree)
    assert source_digest(start, tree) != before


def test_the_lock_of_the_data_is_that_of_this_code_and_goes_by_no_other_file_of_it() -> None:
    text = f"{source_digest(provenance.DATA_STAGE, ROOT)}\n"
    stage = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]["prepare"]
    known = {dep["path"]: dep["md5"] for dep in stage["deps"]}
    assert known["data/prepare.code"] == hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), (
        "run `dvc repro`"
    )
    assert not [path for path in known if path.startswith("components")]
    assert "components.common.provenance" not in imported_modules(provenance.DATA_STAGE)


def test_an_image_without_a_library_has_the_digest_of_one_with_the_locked_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resolve` runs in the data image, which has no torch, and keys the cache of steps in the one that has."""
    shutil.copytree(ROOT / "components", tmp_path / "components", ignore=shutil.ignore_patterns("__pycache__"))
    installed = provenance.versions(provenance.LIBRARIES.values())
    lock = "".join(f"{name.replace('-', '_')}=={version}\n" for name, version in installed.items())
    monkeypatch.setattr(provenance, "PACKAGES", tmp_path)
    (tmp_path / provenance.LOCK).write_text(lock)
    everywhere = code_digest("sft")
    without = {name: version for name, version in installed.items() if name not in ("torch", "peft", "accelerate")}
    monkeypatch.setattr(provenance, "versions", lambda names: without)
    assert code_digest("sft") == everywhere
    (tmp_path / provenance.LOCK).write_text(lock.replace(f"torch=={installed['torch']}", "torch==9.9.9"))
    assert code_digest("sft") != everywhere


@pytest.mark.integration
def test_what_git_leaves_out_of_a_checkout_is_no_difference(tmp_path: Path) -> None:
    other, top = tmp_path / "other", tmp_path / "top"
    git(tmp_path, "init", "-q", "other")
    git(other, "commit", "-q", "--allow-empty", "-m", "one")
    git(tmp_path, "init", "-q", "top")
    for name in ("a", "b"):
        (top / name).mkdir()
        (top / name / "file").write_text(name)
    local = ("-c", "protocol.file.allow=always")
    git(top, *local, "submodule", "add", "-q", str(other), "sub")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "all")
    head, clone = git(top, "rev-parse", "HEAD"), tmp_path / "clone"
    assert checked_out(top) == head
    git(tmp_path, "clone", "-q", str(top), "clone")
    assert checked_out(clone) == head and not list((clone / "sub").iterdir()), "not initialised"
    git(clone, "sparse-checkout", "set", "a")
    assert checked_out(clone / "a") == head and not (clone / "b").exists()
    (clone / "a" / "file").write_text("other")
    assert checked_out(clone) == f"{head}-dirty"
    git(clone, "checkout", "-q", "--", "a")
    git(clone, *local, "submodule", "update", "-q", "--init")
    assert checked_out(clone) == head
    git(clone / "sub", "commit", "-q", "--allow-empty", "-m", "two")
    assert checked_out(clone) == f"{head}-dirty" and "sub" in git(clone, "status", "--short")
    git(clone / "sub", "checkout", "-q", "HEAD~1")
    git(clone, "update-index", "--split-index")
    assert checked_out(clone) == f"{head}-dirty", "dulwich cannot read it"
    assert checked_out(tmp_path) == "unknown"
