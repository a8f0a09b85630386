"""Steps forked from a run's child end as processes of their own do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import json, os, sys
from kfp import dsl
from pipelines.local import steps

name, bodies, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[4]
steps.GPUS = json.loads(sys.argv[3])
for number, body in enumerate(bodies):
    code = f"def {name}(value: str) -> str:\\n    import os, sys\\n    {body}\\n    return value\\n"
    command = ["sh", "-ec", 'd=$(mktemp -d); printf "%s" "$0" > $d/c.py; python3 -m kfp.dsl.executor_main'
      ' --component_module_path $d/c.py "$@"'.replace("python3", sys.executable), "from kfp import dsl\\n" + code,
      "--executor_input", json.dumps({"inputs": {"parameterValues": {"value": "x"}},
        "outputs": {"parameters": {"Output": {"outputFile": out + "/value"}}, "outputFile": f"{out}/{number}.json"}}),
      "--function_to_execute", name]
    code = steps.run_step(command, {"OF_THE_STEP": "yes"})
    print("\\nended", code, "mlflow" in sys.modules, "OF_THE_STEP" in os.environ)
"""


def run(folder: Path, name: str, bodies: list[str], gpus: list[str]) -> list[tuple[str, str]]:
    """For each step, one after the other: how it ended, and what was written before."""
    words = [sys.executable, "-c", PROGRAM, name, json.dumps(bodies), json.dumps(gpus), str(folder)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True)
    written = re.split(r"^ended (.*)\n", done.stdout, flags=re.MULTILINE)
    return list(zip(written[1::2], written[::2], strict=False))


def test_a_forked_step_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    """A step that ended otherwise changes nothing for the one after it."""
    codes = {
        "raise ValueError('no such thing')": 1,
        "sys.exit(3)": 3,
        "os._exit(4)": 4,
        "os.kill(os.getpid(), 9)": -9,
        "assert os.environ['OF_THE_STEP'] == 'yes' and 'mlflow' in sys.modules": 0,
    }
    found = run(tmp_path, "fetch", [*codes], [])
    assert [ended for ended, _ in found] == [f"{code} True False" for code in codes.values()], found
    assert ["no such thing" in before for _, before in found] == [True, False, False, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"4.json"}


@pytest.mark.parametrize(("name", "gpus"), [("fetch", ["/dev/null"]), ("other", [])])
def test_where_there_is_a_gpu_and_for_other_components_a_step_is_a_process_of_its_own(
    tmp_path: Path, name: str, gpus: list[str]
) -> None:
    ((ended, before),) = run(tmp_path, name, ["assert 'mlflow' not in sys.modules; sys.exit(5)"], gpus)
    assert ended == "5 False False", before
