"""The stages from validate to evaluate, run on pairs that can be learned, for the tests that build on them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.common.files import read_json, write_manifest
from components.config.params import load_config
from components.dataset.records import content_id
from components.dpo.stage import run_dpo
from components.evaluate.candidates import Inputs
from components.evaluate.stage import run_evaluate
from components.sft.stage import run_sft
from components.validate.stage import run_validate
from tests.conftest import ROOT, move_home

SETTINGS = [
    "model.precision=fp32",
    "model.max_length=128",
    "validate.min_rows=1",
    "sft.max_steps=1",
    "dpo.epochs=4",
    "dpo.learning_rate=1e-2",
    "evaluate.generations_per_language=1",
    "evaluate.max_new_tokens=3",
    "evaluate.bootstrap_resamples=1000",
    "gate.min_pairs=20",
]
SHORT = [
    *SETTINGS,
    "sft.max_steps=3",
    "dpo.max_steps=3",
    "sft.batch_size=3",
    "dpo.batch_size=3",
    "dpo.learning_rate=1e-3",
]
"""Three steps each of sft and of dpo, in batches of three."""
TEST_SET = "cc"
COUNTS = {"train": 32, "validation": 16, "test": 40}


def rows(split: str, kind: str) -> list[dict[str, Any]]:
    """Pairs whose chosen answer begins with one word and whose rejected answer with another."""
    made_rows = []
    for number in range(COUNTS[split]):
        lang = "zh" if number % 2 else "en"
        prompt = [{"role": "user", "content": f"{split} {number * 37 % 101}"}]
        good = f"好的 {number}" if lang == "zh" else f"certainly {number}"
        bad = f"不行 {number}" if lang == "zh" else f"never {number}"
        answers = {"chosen": good, "rejected": bad} if kind == "preferences" else {"response": good}
        facts = {"lang": lang, "source": "made", "license": "Apache-2.0"}
        made_rows.append(
            {"id": content_id(prompt, *answers.values()), "group": content_id(prompt), "prompt": prompt}
            | facts
            | answers
        )
    return made_rows


class Stages:
    """Runs the stages in a folder.

    Args:
        folder: gets everything.
        tiny: the base model.
        sets: settings of sft besides `SETTINGS`.
    """

    def __init__(self, folder: Path, tiny: Path, *sets: str) -> None:
        self.folder = folder
        self.base = folder / "base"
        shutil.copytree(tiny, self.base)
        write_manifest(self.base)
        for kind in ("preferences", "instructions"):
            (folder / "data" / kind).mkdir(parents=True)
            for split in COUNTS:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, kind))
                (folder / "data" / kind / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        config = load_config(ROOT / "params.yaml", [*SETTINGS, *sets])
        reports = (folder / "v.html", folder / "v.md")
        run_validate(config.validate_, config.model.max_length, folder / "data", self.base, folder / "clean", *reports)
        run_sft(config.sft, config.model, folder / "clean", self.base, folder / "sft")

    def sft(self, out: Path, home: Path) -> Path:
        """Run sft again with its own home folder, as on another machine."""
        config = load_config(ROOT / "params.yaml", SETTINGS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBEALIGN_HOME", str(home))
            run_sft(config.sft, config.model, self.folder / "clean", self.base, out)
        return out

    def align(self, name: str, *sets: str, incumbent: str = "") -> dict[str, Any]:
        config = load_config(ROOT / "params.yaml", [*SETTINGS, *sets])
        out = self.folder / name / "policy"
        run_dpo(config.dpo, config.model, self.folder / "clean", self.base, self.folder / "sft", out)
        return self.judge(name, *sets, incumbent=incumbent)

    def judge(self, name: str, *sets: str, incumbent: str = "") -> dict[str, Any]:
        """Evaluate the policy that was aligned under a name."""
        config = load_config(ROOT / "params.yaml", [*SETTINGS, *sets])
        out = self.folder / name
        folders = (self.folder / "clean", self.base, self.folder / "sft", out / "policy")
        inputs = Inputs(*folders, incumbent, 1, True, TEST_SET)
        reports = (out / "report.html", out / "report.md")
        run_evaluate(config.evaluate, config.gate, config.model, inputs, {}, "kk", out / "evaluation", *reports)
        evaluation: dict[str, Any] = read_json(out / "evaluation" / "evaluation.json")
        return evaluation | {"verdict": read_json(out / "evaluation" / "verdict.json")}


@pytest.fixture(scope="session")
def stages(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Validated data and a trained SFT model; a test aligns under its own name and undoes its changes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stages")
        move_home(folder / "home", patch)
        return Stages(folder, tiny_model)


@pytest.fixture
def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed up KFP's compiler, which for an error message's sake reads the whole stack with its source lines at every
    task setting: with torch's modules loaded a compilation takes 1.5 s instead of 0.1 s.
    """
    frame = (None, None, None, "a setting")
    monkeypatch.setattr("kfp.dsl.pipeline_task.inspect", SimpleNamespace(stack=lambda: [frame, frame]))
