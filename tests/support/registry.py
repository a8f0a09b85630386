"""Versions in a registry, registered by the real stage under verdicts of a test's choosing."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.common.files import digest, read_json, write_json, write_manifest, write_text
from components.gate.results import SEAL
from components.gate.rules import GateContext, apply_gate
from components.register.stage import Lineage, RegisterInputs, run_register
from components.registry.evidence import fetch_statement
from components.stages import STAGE_NAMES
from components.tracking import store
from components.tracking.keys import seal
from components.tracking.run import SETTINGS
from pipelines.cli import app
from tests.conftest import ROOT
from tests.support.component_kit import Chain
from tests.support.versions import CONFIG, LENIENT, LINEAGE, with_outcome


class Shop:
    """Registers the chain's policy, or a copy with other weights, under a verdict of our choosing."""

    def __init__(self, chain: Chain, folder: Path) -> None:
        self.chain, self.folder = chain, folder
        self.made_for("cpu")

    def made_for(self, hardware: str) -> None:
        """Register from now on as runs whose settings `resolve` recorded for this hardware."""
        client = store.client()
        run_id = client.create_run(store.experiment_id(client)).info.run_id
        settings = (ROOT / "params.yaml").read_text(encoding="utf-8")
        client.log_text(run_id, settings.replace("hardware: auto", f"hardware: {hardware}"), SETTINGS)
        self.runs = dict.fromkeys(STAGE_NAMES[:-1], run_id)

    def register(
        self, better: bool = True, name: str = "one", kind: str = "merged", model: str = "m", **lineage: Any
    ) -> dict[str, Any]:
        """Register a model that is better than its rival, or equal to it."""
        made = replace(LINEAGE, **lineage)
        judged = self.judged(name, better, made)
        config = CONFIG.register_.model_copy(update={"name": model, "format": kind})
        return run_register(config, LENIENT, made, self.runs, judged, self.folder / name / "result.json")

    def judged(self, name: str, better: bool, lineage: Lineage) -> RegisterInputs:
        """The policy as another model (its name is part of it), with its verdict."""
        policy, evaluation = self.folder / name / "policy", self.folder / name / "evaluation"
        if not policy.exists():
            shutil.copytree(self.chain.policy, policy)
            for part in ("model", "adapter"):
                config = policy / part / ("config.json" if part == "model" else "adapter_config.json")
                write_json(config, read_json(config) | {"made_as": name} if part == "model" else read_json(config))
        write_manifest(policy)
        found = read_json(self.chain.evaluation / "evaluation.json")
        found["policy_digest"] = digest(read_json(policy / "manifest.json"))
        found = with_outcome(found, "incumbent" if lineage.incumbent else "sft", better, LENIENT)
        found["judged"] |= {"incumbent": lineage.incumbent, "decision_index": lineage.decision_index}
        found["judged"] |= {"test_set": lineage.test_set, "data_clean": lineage.data_clean}
        found["judged"]["incumbent_statement"] = self.statement(lineage.incumbent) if lineage.incumbent else ""
        context = GateContext(lineage.incumbent, lineage.decision_index, lineage.data_clean)
        write_sealed(evaluation, found)
        write_json(evaluation / "verdict.json", apply_gate(found, context, LENIENT))
        return RegisterInputs(policy, self.chain.base, evaluation, self.chain.clean, self.chain.report)

    def statement(self, uri: str) -> str:
        """sha256 of a version's statement."""
        name, version = uri.removeprefix("models:/").split("/")
        scratch = self.folder / "statements" / version
        scratch.mkdir(parents=True, exist_ok=True)
        return fetch_statement(name, version, scratch).digest


def write_sealed(folder: Path, evaluation: Any) -> None:
    """evaluation.json as our evaluate writes it."""
    write_json(folder / "evaluation.json", evaluation)
    write_text(folder / SEAL, seal(SEAL, (folder / "evaluation.json").read_bytes()))


@pytest.fixture
def shop(chain: Chain, tmp_path: Path) -> Shop:
    """A shop with a registry of its own."""
    return Shop(chain, tmp_path)


def cli(*words: str) -> Any:
    """The outcome of a command of this project."""
    return CliRunner().invoke(app, [*words, "--project", str(ROOT)])


def named(*words: str) -> Any:
    """Likewise, about the registered model `m`."""
    return cli(*words, "--name", "m")
