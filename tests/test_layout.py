"""The tests' own order: no test module imports another, and what starts servers or programs is marked so."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import programs

MODULES = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("components/*/tests/test_*.py")])


def imported_tests(text: str) -> set[str]:
    """The test modules that a module imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if any(part.startswith("test_") for part in name.split("."))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_module_imports_another(path: Path) -> None:
    assert imported_tests(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from tests.engine.test_loop import x",
        "from tests.engine import test_loop",
        "import tests.engine.test_loop",
        "def f() -> None:\n    from tests.engine.test_loop import x",
    ],
)
def test_an_import_of_a_test_module_is_noticed(line: str) -> None:
    assert imported_tests(f"import json\n{line}\n")


def test_a_plain_test_cannot_start_a_program() -> None:
    """This one is not marked `integration`."""
    with pytest.raises(AssertionError, match=r"git is started by a test that is not marked `integration`"):
        programs.check("git")
