"""One tree of exceptions, drawn where it is defined."""

import ast
import inspect

from components.common import errors
from tests.conftest import ROOT

TREE = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}


def test_the_drawing_holds_every_exception_below_the_one_it_derives_from() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in str(errors.__doc__).splitlines():
        name = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").strip().split(" ")[0]
        if name.endswith("Error") or name == "Exception":
            depth = line.index(name) // 4
            path[depth:] = [name]
            if depth:
                drawn[name] = path[depth - 1]
    assert drawn == {name: kind.__mro__[1].__name__ for name, kind in TREE.items()}


def test_no_other_file_defines_an_exception_of_ours() -> None:
    found = {}
    for package in ("components", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(base) for base in node.bases):
                    found.setdefault(path.relative_to(ROOT).as_posix(), []).append(node.name)
    assert set(found) == {"components/common/errors.py"}
    assert all(name.endswith("Error") for name in TREE)


def test_only_what_passes_by_itself_is_retryable() -> None:
    assert {name for name, kind in TREE.items() if kind.retryable} == {
        "InterruptedRunError",
        "RunPendingError",
        "WaitTimeoutError",
    }
    assert errors.KubeflowApiError("busy", retryable=True).retryable
    assert not errors.RequestRejectedError("no", 403).retryable
