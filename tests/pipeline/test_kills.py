"""`kubealign run`, killed at an event and started again, ends with the weights of an undisturbed training."""

import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from components.common.files import sha256_file
from components.config.params import load_config
from components.dpo.stage import run_dpo
from components.sft.stage import run_sft
from tests.conftest import ROOT
from tests.support.project import SMALL, Project

pytestmark = pytest.mark.integration

LONGER = [
    "sft.max_steps=6",
    "dpo.max_steps=6",
    "sft.checkpoint_every_s=0.01",
    "dpo.checkpoint_every_s=0.01",
    "sft.eval_every_steps=4",
    "dpo.eval_every_steps=4",
]
SEED = 21


def in_training(stage: str, out: str) -> dict[str, str]:
    """Points in a training stage: what is about to happen, as an audit event and a pattern for its argument."""
    steps = f"*/checkpoints/{stage}-*"
    return {
        f"{stage} step 1 appears": f"os.rename {steps}/step-000001",
        f"{stage} step 2 has tensors and gets its state": f"os.rename {steps}/.step-000002.*/state.json",
        f"{stage} step 3 is whole but for its manifest": f"os.rename {steps}/.step-000003.*/manifest.json",
        f"{stage} step 3 has appeared and step 1 is removed": f"shutil.rmtree {steps}/step-000001",
        f"{stage} step 4 appears": f"os.rename {steps}/step-000004",
        f"{stage} step 5 has appeared and step 3 is removed": f"shutil.rmtree {steps}/step-000003",
        f"what {stage} made appears": f"os.rename */{stage}/{out}",
    }


IN_SFT = in_training("sft", "sft_model")
IN_DPO = in_training("dpo", "policy")
ELSEWHERE = {
    "the data set appears": "os.rename */fetch/dataset",
    "the base model appears": "os.rename */fetch/base",
    "the first step enters the cache": "os.rename */steps/cache-*/*.json",
    "the clean data appears": "os.rename */validate/clean",
    "log-probs enter their cache": "os.rename */cache/logps/*.safetensors",
    "answers enter their cache": "os.rename */cache/answers/*.json",
    "the verdict appears": "os.rename */evaluate/evaluation/verdict.json",
    "the model goes to the registry": "open */mlartifacts/models/*/MLmodel",
    "the result appears": "os.rename */register/result",
}
POINTS = IN_SFT | IN_DPO | ELSEWHERE


class Killer:
    """A project whose runs can be killed."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.project = Project(folder, tiny)
        shutil.copy(ROOT / "tests" / "support" / "kill_at.py", self.project.code / "sitecustomize.py")
        self.log = folder / "log"

    def forget(self) -> None:
        """As if nothing had run yet."""
        shutil.rmtree(self.project.root / ".kubealign")

    def weights(self) -> dict[str, str]:
        """Hash of the adapter of each training stage."""
        found: dict[str, str] = {}
        for stage, out in (("sft", "sft_model"), ("dpo", "policy")):
            for path in self.made(stage, out).glob("adapter/adapter_model.safetensors"):
                found[stage] = sha256_file(path)
        return found

    def made(self, stage: str, name: str) -> Path:
        """The folder that the last run of a step made."""
        return sorted((self.project.root / ".kubealign" / "steps").glob(f"alignment-*/{stage}/{name}"))[-1]

    def run_and_kill(self, point: str) -> None:
        """Start the run, which is killed with all its processes at a point."""
        with self.log.open("w") as log:
            code = subprocess.run(
                self.project.command(*LONGER),
                cwd=self.project.elsewhere,
                env=self.project.environment | {"KILL_AT": POINTS[point]},
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,
            ).returncode
        assert code == -signal.SIGKILL, f"never came to the point where {point}: {self.log.read_text()[-2000:]}"

    def finish(self) -> str:
        """Start the run again and let it come to its end; gives what it says."""
        done = self.project.run(*LONGER)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def trained_in_one_go(self, folder: Path) -> dict[str, str]:
        """Hash of the adapters that this process trains on the data and the base model of the last run."""
        config = load_config(ROOT / "params.yaml", [*SMALL, *LONGER])
        clean, base = self.made("validate", "clean"), self.made("fetch", "base")
        run_sft(config.sft, config.model, clean, base, folder / "sft")
        run_dpo(config.dpo, config.model, clean, base, folder / "sft", folder / "dpo")
        return {stage: sha256_file(folder / stage / "adapter/adapter_model.safetensors") for stage in ("sft", "dpo")}


@pytest.fixture(scope="module")
def killer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(tmp_path_factory.mktemp("kills"), tiny_model)


def test_a_run_killed_in_sft_and_in_dpo_ends_with_bit_identical_weights(killer: Killer, tmp_path: Path) -> None:
    """The third run is killed too, as soon as it has trained: nothing is to be seen in the rest of it."""
    choice = random.Random(SEED)
    points = [choice.choice([*IN_SFT]), choice.choice([*IN_DPO]), "log-probs enter their cache"]
    for point in points:
        killer.run_and_kill(point)
    assert killer.weights() == killer.trained_in_one_go(tmp_path), f"killed when {points}"
    killer.forget()


@pytest.mark.long
def test_a_run_killed_at_any_point_ends_with_bit_identical_weights(killer: Killer) -> None:
    killer.finish()
    undisturbed = killer.weights()
    assert set(undisturbed) == {"sft", "dpo"}
    n_resumed = 0
    for point in random.Random(SEED).sample([*POINTS], len(POINTS)):
        killer.forget()
        killer.run_and_kill(point)
        n_resumed += "resuming after step" in killer.finish()
        assert killer.weights() == undisturbed, f"killed when {point}"
    print(f"{len(POINTS)} kills, {n_resumed} of them between two checkpoints")
    assert n_resumed == 2 * (len(IN_SFT) - 1)
