"""`kubealign run` killed at random points and started again ends with the weights of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from components.common.files import sha256_file
from components.stages import ORDERED
from tests.support.project import Project

pytestmark = pytest.mark.integration

LONGER = [
    "sft.max_steps=6",
    "dpo.max_steps=6",
    "sft.checkpoint_every_s=0.01",
    "dpo.checkpoint_every_s=0.01",
    "sft.eval_every_steps=4",
    "dpo.eval_every_steps=4",
]


class Killer:
    """A project, and what its undisturbed run gave."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.project = Project(folder, tiny)
        self.log = folder / "log"
        done = self.project.run(*LONGER)
        assert done.returncode == 0, done.stdout + done.stderr
        self.undisturbed = self.weights()
        assert set(self.undisturbed) == {"sft", "dpo"}
        self.forget()

    def forget(self) -> None:
        shutil.rmtree(self.project.root / ".kubealign")

    def weights(self) -> dict[str, str]:
        """Hash of the adapter of each training stage."""
        found = {}
        for path in (self.project.root / ".kubealign").rglob("adapter_model.safetensors"):
            if (path.parent.parent / "training.json").exists():
                stage = "dpo" if (path.parent.parent / "model").is_dir() else "sft"
                assert found.setdefault(stage, sha256_file(path)) == sha256_file(path)
        return found

    def run_and_kill(self, stage: str, after_s: float) -> bool:
        """Kill the whole run some time after a stage began; False when it had ended by then."""
        with self.log.open("w") as log:
            running = subprocess.Popen(
                self.project.words(*LONGER),
                cwd=self.project.elsewhere,
                env=self.project.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while running.poll() is None and f"{stage}: " not in self.log.read_text():
            time.sleep(0.05)
        time.sleep(after_s)
        alive = running.poll() is None
        if alive:
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        return alive

    def finish(self, points: list[tuple[str, float]]) -> str:
        done = self.project.run(*LONGER)
        assert done.returncode == 0, f"killed at {points}: {done.stdout}{done.stderr}"
        assert self.weights() == self.undisturbed, f"killed at {points}"
        return done.stdout


@pytest.fixture(scope="module")
def killer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(tmp_path_factory.mktemp("kills"), tiny_model)


def test_a_run_killed_three_times_ends_with_bit_identical_weights(killer: Killer) -> None:
    points = [(stage, random.uniform(4.0, 9.0)) for stage in ("sft", "dpo", "dpo")]
    killed = [killer.run_and_kill(stage, after_s) for stage, after_s in points]
    assert any(killed)
    killer.finish(points)
    killer.forget()


@pytest.mark.long
def test_twenty_random_kill_points_end_with_bit_identical_weights(killer: Killer) -> None:
    n_killed = n_resumed = 0
    while n_killed < 20:
        point = (random.choice(ORDERED), random.uniform(0.0, 12.0))
        if killer.run_and_kill(*point):
            n_killed += 1
            n_resumed += "resuming after step" in killer.finish([point])
        killer.forget()
    print(f"{n_killed} kills, {n_resumed} of them in training")
    assert n_resumed >= 2
