"""A separate project for whole runs: the real data, a tiny model, its own copy of the code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from components.stages import STAGE_NAMES
from tests.conftest import ROOT, environment_without_home
from tests.support.repositories import git

ALL = set(STAGE_NAMES)


SMALL = [
    "model.max_length=256",
    "model.precision=fp32",
    "sft.max_steps=6",
    "sft.checkpoint_every_s=0.01",
    "dpo.max_steps=2",
    "evaluate.generations_per_language=1",
    "evaluate.max_new_tokens=4",
    "evaluate.bootstrap_resamples=1000",
    "validate.min_rows=2",
]


RUN_COMPILED = """
import sys
from kfp import components, local
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[2])
components.load_component_from_file(sys.argv[1])()
"""


class Project:
    """A project folder with the real data, its own copy of the code, and a working directory that is neither."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.root = folder / "project"
        self.code = folder / "code"
        self.tiny = folder / "tiny"
        self.elsewhere = folder / "elsewhere"
        shutil.copytree(tiny, self.tiny)
        (self.elsewhere / "components").mkdir(parents=True)
        (self.elsewhere / "components" / "__init__.py").write_text("raise RuntimeError('the wrong components')\n")
        for package in ("components", "pipelines"):
            shutil.copytree(ROOT / package, self.code / package, ignore=shutil.ignore_patterns("__pycache__"))
        self.root.mkdir()
        for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
            shutil.copy(ROOT / name, self.root)
        for name in ("preferences", "instructions"):
            shutil.copytree(ROOT / "data" / name, self.root / "data" / name)
        (self.root / ".gitignore").write_text(".kubealign/\ndata/\n")
        (self.root / ".dvc").mkdir()
        shutil.copy(ROOT / ".dvc" / "config", self.root / ".dvc")
        git(self.root, "init", "-q")
        git(self.root, "add", "-A")
        git(self.root, "commit", "-qm", "project")
        self.environment = environment_without_home() | {
            "PYTHONPATH": str(self.code),
            "PYTHONSAFEPATH": "1",
        }

    def command(self, *sets: str) -> list[str]:
        settings = [*SMALL, f"model.base={self.tiny}", *sets]
        options = [arg for setting in settings for arg in ("--set", setting)]
        return [sys.executable, "-P", "-m", "pipelines.cli", "run", "--project", str(self.root), *options]

    def run(self, *sets: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*sets), cwd=self.elsewhere, env=self.environment, capture_output=True, text=True, check=False
        )

    def run_compiled(self, folder: Path) -> dict[str, Any]:
        """Compile the pipeline to YAML and run it under KFP's local runner; returns the result of register."""
        compile_command = [arg if arg != "run" else "compile" for arg in self.command(f"data.repo={self.root}")]
        compiled, out = folder / "pipeline.yaml", folder / "out"
        for command in (
            [*compile_command, "--target", "local", "--out", str(compiled)],
            [sys.executable, "-P", "-c", RUN_COMPILED, str(compiled), str(out)],
        ):
            done = subprocess.run(
                command, cwd=self.elsewhere, env=self.environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        result: dict[str, Any] = json.loads(next(out.glob("*/register/result")).read_text())
        return result

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "pipelines.cli", *words, "--project", str(self.root)]
        return subprocess.run(
            command, cwd=self.elsewhere, env=self.environment, capture_output=True, text=True, check=False
        )

    def report(self) -> dict[str, Any]:
        command = [sys.executable, "-P", "-m", "pipelines.cli", "report", "--json", "--project", str(self.root)]
        done = subprocess.run(
            command, cwd=self.elsewhere, env=self.environment, capture_output=True, text=True, check=True
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def client(self) -> Any:
        import mlflow

        uri = f"sqlite:///{self.root}/.kubealign/mlflow.db"
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        return mlflow.MlflowClient(uri, uri)


def started(lines: list[str]) -> set[str]:
    """The steps that started, according to the output."""
    return {line.split(":")[0] for line in lines if line.endswith(": started")}


def ran(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The steps that ran rather than being cached, according to the output of a successful run."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    cached = {line.split(":")[0] for line in lines if line.endswith(": cached")}
    assert started(lines) | cached == ALL and not started(lines) & cached
    return started(lines)
