"""Every component's folder follows the catalogue kubeflow/pipelines-components."""

import ast
import inspect
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from kfp import dsl
from typer.testing import CliRunner

from components.__main__ import app
from components.common.errors import KubealignError
from components.stages import CACHED, STAGE_NAMES
from tests.conftest import ROOT
from tests.tools.component_readmes import expected, interface, load_component

OWN = "components.common.images"
"""The one module of ours that component.py may import outside its body."""


def foreign_imports(code: str) -> list[str]:
    """What a file imports outside functions that is neither the standard library nor kfp nor our image names."""
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return [name for name in names if name != OWN and name.split(".")[0] not in {"kfp", *sys.stdlib_module_names}]


def test_the_components_are_those_of_the_pipeline() -> None:
    assert {path.parent.name for path in (ROOT / "components").glob("*/component.py")} == set(STAGE_NAMES)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_component_imports_at_its_top_only_the_standard_library_and_kfp(stage: str) -> None:
    assert foreign_imports((ROOT / "components" / stage / "component.py").read_text()) == []


def test_the_image_names_need_the_standard_library_only() -> None:
    assert foreign_imports((ROOT / "components" / "common" / "images.py").read_text()) == []


def test_other_imports_are_noticed() -> None:
    code = "import os, torch.nn\nfrom . import stage\nfrom components.dpo.stage import run_dpo\nfrom kfp import dsl\n"
    assert foreign_imports(code) == ["torch.nn", ".", "components.dpo.stage"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_metadata_has_the_fields_of_the_catalogue(stage: str) -> None:
    metadata = yaml.safe_load((ROOT / "components" / stage / "metadata.yaml").read_text())
    assert list(metadata) == ["name", "stability", "dependencies", "tags", "lastVerified"]
    assert metadata["name"] == load_component(stage).name == stage
    assert metadata["stability"] in ("experimental", "alpha", "beta", "stable")
    assert isinstance(metadata["lastVerified"], datetime)
    needs = [need for kind in metadata["dependencies"].values() for need in kind]
    assert "Pipelines" in [need["name"] for need in metadata["dependencies"]["kubeflow"]]
    for need in needs:
        assert re.fullmatch(r">=\d+\.\d+\.\d+", need["version"]), f"{need}: the catalogue wants all three numbers"


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_component_has_its_two_test_files(stage: str) -> None:
    found = {path.name for path in (ROOT / "components" / stage / "tests").glob("*.py")}
    assert found == {"test_component_unit.py", "test_component_local.py"}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_the_readme_says_what_the_component_says(stage: str) -> None:
    folder = ROOT / "components" / stage
    assert (folder / "README.md").read_text(encoding="utf-8") == expected(folder), "run `make readmes`"


def test_a_readme_that_says_something_else_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "dpo"
    folder.mkdir()
    for name in ("README.md", "metadata.yaml"):
        shutil.copy(ROOT / "components" / "dpo" / name, folder)
    readme, metadata = folder / "README.md", folder / "metadata.yaml"
    good = readme.read_text(encoding="utf-8")
    for old, new in (("The SFT model", "A SFT model"), ("| `order` |", "| `ordre` |"), ("str", "int")):
        readme.write_text(good.replace(old, new), encoding="utf-8")
        assert expected(folder) == good != readme.read_text(encoding="utf-8")
    readme.write_text(good + "More by hand.\n", encoding="utf-8")
    assert expected(folder) == good + "More by hand.\n"
    metadata.write_text(metadata.read_text().replace("alpha", "stable"))
    assert "Stability: stable" in expected(folder)
    readme.write_text("# dpo\n")
    with pytest.raises(ValueError, match="expected one section between .*, found 0"):
        expected(folder)


def test_a_docstring_that_leaves_an_input_out_is_noticed() -> None:
    @dsl.component(base_image="python")
    def half(told: str, untold: str) -> str:
        """Do half.

        Args:
            told: something.

        Returns:
            Something else.
        """
        return told + untold

    with pytest.raises(ValueError, match=r"half: docstring and signature differ in \['untold'\]"):
        interface(half)


@pytest.mark.parametrize(("stage", "most"), [("register", 13), ("evaluate", 10), ("dpo", 6), ("sft", 5)])
def test_a_step_takes_its_order_and_artifacts_and_little_else(stage: str, most: int) -> None:
    """Counted as a reader of the signature does: inputs and outputs, without what the function returns."""
    names = list(inspect.signature(load_component(stage).python_func).parameters)
    assert names[0] == "order" and len(names) <= most, names


def test_the_commands_of_the_readmes_know_their_options(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with settings and without anything else: fetch misses the repository, the others their inputs."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = {}
    for page in sorted((ROOT / "components").glob("*/README.md")):
        for words in re.findall(r"- Run: `python -P -m components ([^`]+)`", page.read_text(encoding="utf-8")):
            commands[page.parent.name] = CliRunner().invoke(app, words.split()).exception
    assert commands.keys() == set(CACHED)
    assert "not a DVC repository" in str(commands.pop("fetch"))
    for stage, error in commands.items():
        assert isinstance(error, KubealignError) and "build/" in str(error), (stage, error)
