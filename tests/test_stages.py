"""The table of stages, and that nothing else lists them: a list made by hand is found."""

import ast
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.stages import BY_NAME, CACHED, LINEAGE, ORDERED, STAGE_NAMES, STAGES
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

TABLE = Path("components/stages.py")
PREPARE = "prepare"
"""DVC's stage, which has a folder beside the others."""
SEVERAL = 3
"""Stages that a literal may not name together."""


def test_the_stages_are_these() -> None:
    assert " ".join(STAGE_NAMES) == "resolve fetch validate sft dpo evaluate register"
    assert " ".join(ORDERED) == "fetch validate sft dpo evaluate register"
    assert " ".join(CACHED) == "fetch validate sft dpo evaluate" and " ".join(LINEAGE) == "fetch validate sft dpo"
    assert " ".join(name for name in STAGE_NAMES if BY_NAME[name].image == "train") == "sft dpo evaluate"
    assert [name for name in STAGE_NAMES if BY_NAME[name].several_nodes] == ["sft", "dpo"]


def lists_in_code(text: str) -> Iterator[int]:
    """The lines of literals that name several stages."""
    for node in ast.walk(ast.parse(text)):
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        named = [part.value for part in parts if isinstance(part, ast.Constant) and part.value in STAGE_NAMES]
        if len(set(named)) >= SEVERAL:
            yield node.lineno  # type: ignore[attr-defined]


def lists_in_yaml(found: Any) -> Iterator[list[str]]:
    """The stages in every list of a document that names several."""
    if isinstance(found, list):
        named = [part for part in found if isinstance(part, str) and part in STAGE_NAMES]
        if len(named) >= SEVERAL:
            yield named
    for part in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from lists_in_yaml(part)


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_module_lists_the_stages_by_hand() -> None:
    files = [path for path in tracked("*.py") if path != TABLE]
    assert len(files) > 150
    found = [f"{path}:{line}" for path in files for line in lists_in_code((ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "read these from components/stages.py"


def test_the_manifests_and_workflows_name_the_stages_of_the_table() -> None:
    found = {}
    for path in tracked("k8s/*.yaml", ".github/*.yml", "*.yaml"):
        if "golden" not in path.parts:
            documents = yaml.safe_load_all((ROOT / path).read_text(encoding="utf-8"))
            for names in (names for document in documents for names in lists_in_yaml(document)):
                found.setdefault(str(path), []).append(names)
    assert set(found) == {"k8s/base/network.yaml", "k8s/overlays/dev/network.yaml"}
    with_s3_key = [stage.name for stage in STAGES if {"data", "state"} & {*stage.secrets}]
    for path, lists in found.items():
        expected = with_s3_key if "dev" in path else list(STAGE_NAMES)
        assert all(names == expected for names in lists), path


def test_the_import_contracts_name_the_stages_of_the_table() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    named = {contract["id"]: contract for contract in contracts}
    rooms = {PREPARE, *STAGE_NAMES}
    assert set(named["stages"]["modules"]) == {f"components.{name}" for name in rooms}
    assert rooms in [set(layer.split(" | ")) for layer in named["rooms"]["layers"]]


@pytest.mark.parametrize(
    "code", ['X = ("sft", "dpo", "fetch")', 'x(["resolve", 1, "dpo", "sft"])', '{"sft", "dpo", "fetch"}']
)
def test_a_list_made_by_hand_is_found(code: str) -> None:
    assert list(lists_in_code(f"\n{code}\n")) == [2]
    assert not list(lists_in_code('X = ("sft", "dpo")\n"sft", "dpo", "other"\n'))


def test_a_manifest_that_forgets_a_stage_is_found() -> None:
    text = (ROOT / "k8s/base/network.yaml").read_text(encoding="utf-8").replace("evaluate, register", "register")
    lists = [names for document in yaml.safe_load_all(text) for names in lists_in_yaml(document)]
    assert lists and all(names != list(STAGE_NAMES) for names in lists)
