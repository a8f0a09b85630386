"""Files of 200 rows in the schemas of public data sets, from `kubealign data add` to a registered model."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.config.params import load_config
from components.dataset.records import SPLITS, read_lines
from components.validate.stage import run_validate
from tests.conftest import ROOT, environment_without_home
from tests.support.data_project import kubealign, make_project
from tests.support.project import ALL, ran
from tests.support.public_schemas import write_files
from tests.support.repositories import dvc, git

pytestmark = [pytest.mark.integration, pytest.mark.long]
SOURCES = {"hh_harmless", "hh_helpful", "evol_instruct", "helpsteer3", "orca_zh", "medicalgpt"}
"""UltraFeedback's rows name their own."""


@pytest.fixture(scope="module")
def project(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project of its own to which all the files were added and committed."""
    folder = tmp_path_factory.mktemp("public")
    root = make_project(folder / "project")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["model"] |= {"base": str(tiny_model), "max_length": 256}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "files").mkdir()
    files = [str(path) for path in write_files(folder / "files")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEALIGN_HOME", str(root / ".kubealign"))
        done = kubealign(root, "add", *files, "--licence", "MIT", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        dvc(root, "repro", "-q")
        git(root, "add", "-A")
        git(root, "commit", "-qm", "data")
        yield root


def test_every_row_becomes_a_pair_and_passes_every_check(project: Path, tiny_model: Path, tmp_path: Path) -> None:
    pairs = [row for split in SPLITS for row in read_lines(project / "data" / "preferences" / f"{split}.jsonl")]
    assert Counter(row["source"] for row in pairs) == dict.fromkeys(SOURCES, 200)
    assert Counter(row["lang"] for row in pairs) == {"en": 800, "zh": 400}
    config = load_config(project / "params.yaml")
    run_validate(
        config.validate_, 256, project / "data", tiny_model, tmp_path, tmp_path / "page.html", tmp_path / "page.md"
    )
    for found in json.loads((tmp_path / "clean" / "validation.json").read_text()).values():
        assert (found["clean"], found["quarantined"], found["too_long"]) == (1200, 0, 0)
        assert {check["name"] for check in found["checks"] if check["failed"]} == set()


def test_a_run_trains_on_all_of_them(project: Path) -> None:
    sets = ["sft.max_steps=2", "dpo.max_steps=2", "evaluate.generations_per_language=1", "evaluate.max_new_tokens=16"]
    command = [sys.executable, "-P", "-m", "pipelines.cli", "run", "--project", str(project)]
    command += [word for setting in sets for word in ("--set", setting)]
    environment = environment_without_home() | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran(done) == ALL
    command[4:] = ["report", "--json", "--project", str(project)]
    report = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert report["model_uri"] == "models:/kubealign/1" and report["languages"]["policy"].keys() == {"en", "zh"}
