"""Steps forked from a run's child end as processes of their own do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import json, os, sys
from kfp import dsl
from pipelines.local import steps

steps.GPUS = json.loads(sys.argv[3])
name, body = sys.argv[1:3]
code = f"def {name}(value: str) -> str:\\n    import os, sys\\n    {body}\\n    return value\\n"
command = ["sh", "-ec", 'd=$(mktemp -d); printf "%s" "$0" > $d/c.py; python3 -m kfp.dsl.executor_main'
  ' --component_module_path $d/c.py "$@"'.replace("python3", sys.executable), "from kfp import dsl\\n" + code,
  "--executor_input", json.dumps({"inputs": {"parameterValues": {"value": "x"}},
    "outputs": {"parameters": {"Output": {"outputFile": sys.argv[4]}}, "outputFile": sys.argv[4] + ".json"}}),
  "--function_to_execute", name]
print(steps.run_step(command, {"OF_THE_STEP": "yes"}), "mlflow" in sys.modules, "OF_THE_STEP" in os.environ)
"""


def run(folder: Path, name: str, body: str, gpus: list[str]) -> tuple[str, bytes]:
    """The last line that the program prints, and all before it."""
    words = [sys.executable, "-c", PROGRAM, name, body, json.dumps(gpus), str(folder / "out")]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    before, _, last = done.stdout.rstrip().rpartition(b"\n")
    return last.decode(), before


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("assert os.environ['OF_THE_STEP'] == 'yes' and 'mlflow' in sys.modules", 0),
        ("raise ValueError('no such thing')", 1),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -9),
    ],
)
def test_a_forked_step_ends_with_its_own_exit_code(tmp_path: Path, body: str, code: int) -> None:
    last, before = run(tmp_path, "fetch", body, [])
    assert last == f"{code} True False", before
    assert (b"no such thing" in before) == (code == 1)
    assert (tmp_path / "out.json").exists() == (code == 0)


@pytest.mark.parametrize(("name", "gpus"), [("fetch", ["/dev/null"]), ("other", [])])
def test_where_there_is_a_gpu_and_for_other_components_a_step_is_a_process_of_its_own(
    tmp_path: Path, name: str, gpus: list[str]
) -> None:
    last, before = run(tmp_path, name, "assert 'mlflow' not in sys.modules; sys.exit(5)", gpus)
    assert last == "5 False False", before
