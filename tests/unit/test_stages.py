"""The training and judging stages one after another on pairs that can be learnt, without Kubeflow."""

import json

import pytest

from components.common.config import load_config
from components.common.errors import KubealignError
from components.common.files import write_manifest
from components.register.stage import Lineage, run_register
from tests.conftest import ROOT
from tests.unit.conftest import Stages


def test_dpo_on_learnable_pairs_passes_the_gate_and_without_its_update_it_does_not(stages: Stages) -> None:
    on = stages.align("on")
    assert on["verdict"]["passed"], on["verdict"]["sentence"]
    assert on["models"]["policy"]["overall"]["reward_accuracy"]["value"] > 0.9
    off = stages.align("off", "dpo.lr=1e-30")
    assert off["verdict"]["verdict"] == "no evidence" and not off["verdict"]["passed"]


def test_swapped_labels_in_training_are_called_worse(stages: Stages) -> None:
    path = stages.folder / "clean" / "preferences" / "train.jsonl"
    text = path.read_text()
    try:
        swapped = [json.loads(line) for line in text.splitlines()]
        for row in swapped:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in swapped))
        write_manifest(stages.folder / "clean")
        assert stages.align("swapped")["verdict"]["verdict"] == "worse"
    finally:
        path.write_text(text)
        write_manifest(stages.folder / "clean")


def test_a_verdict_on_another_model_registers_nothing(stages: Stages) -> None:
    stages.align("one")
    stages.align("two", "dpo.seed=9")
    config = load_config(ROOT / "params.yaml").register_
    lineage = Lineage(*["x"] * 9)
    with pytest.raises(KubealignError, match="the verdict is about policy"):
        run_register(
            config,
            lineage,
            {},
            stages.folder / "one" / "policy",
            stages.folder / "two" / "evaluation",
            stages.folder / "two" / "report.html",
            stages.folder / "result.json",
        )


def test_changed_weights_are_refused_before_they_are_loaded(stages: Stages) -> None:
    weights = stages.folder / "sft" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(KubealignError, match="adapter_model.safetensors changed since it was written"):
            stages.align("tampered")
    finally:
        weights.write_bytes(content)
