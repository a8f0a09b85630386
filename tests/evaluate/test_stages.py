"""The training and judging stages one after another on pairs that can be learnt, without Kubeflow."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from components.common.errors import InputError, KubealignError
from components.common.files import file_hashes, read_json, write_json, write_manifest
from components.config.params import load_config
from components.evaluate import candidates
from components.gate.rejudge import judge_again
from components.gate.rules import GateContext
from tests.conftest import ROOT
from tests.support.stages import SETTINGS, Stages


def test_dpo_on_learnable_pairs_passes_the_gate_and_without_its_update_it_does_not(stages: Stages) -> None:
    on = stages.align("on")
    assert on["verdict"]["passed"], on["verdict"]["sentence"]
    assert on["models"]["policy"]["overall"]["rewards/accuracies"]["value"] > 0.9
    off = stages.align("off", "dpo.learning_rate=1e-30")
    assert off["verdict"]["verdict"] == "no evidence" and not off["verdict"]["passed"]
    # Answers that begin with one of two words are told apart at once, and the diagnosis says so.
    assert "accuracy of 1.0 too early" in findings(on)
    assert findings(off) == {"no learning"}


def test_a_learning_rate_that_drives_the_policy_away_is_a_kl_blow_up(stages: Stages) -> None:
    found = stages.align("far", "dpo.learning_rate=0.3", "dpo.beta=1", "evaluate.generations_per_language=0")
    assert "KL blow-up" in findings(found)


def findings(found: dict[str, Any]) -> set[str]:
    return {finding["name"] for finding in found["findings"]}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that evaluate loads, in order."""
    names: list[str] = []

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **more: Any) -> Any:
            names.append(args[4] if name == "open_tuned" else "base")
            return real(*args, **more)

        return watched

    for name in ("open_model", "open_tuned"):
        monkeypatch.setattr(candidates, name, watch(name, getattr(candidates, name)))
    return names


def test_the_base_and_an_unchanged_incumbent_are_not_run_again(
    stages: Stages, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stages.align("champion")
    assert sorted(opened) == ["base", "policy", "sft"]
    opened.clear()
    assert stages.judge("champion") == first and opened == []
    # A policy folder holds what a registered version holds.
    monkeypatch.setattr(candidates, "download_incumbent", lambda uri: (stages.folder / "champion" / "policy", "s"))
    found = stages.align("challenger", "dpo.seed=9", incumbent="models:/m/1")
    # The SFT model is, for the samples of the new policy.
    assert sorted(opened) == ["policy", "sft"]
    assert found["models"]["incumbent"] == {**first["models"]["policy"]}
    assert found["comparisons"].keys() == {"sft", "incumbent"} and found["models"]["base"] == first["models"]["base"]


def test_an_incumbents_own_reference_is_found_in_its_adapter(
    stages: Stages, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the SFT model of its time is gone, and its base model lies in the registry only."""
    first = stages.align("older")
    made = tmp_path / "artifacts"
    shutil.copytree(stages.folder / "older" / "policy", made)
    shutil.rmtree(made / "model")
    for file, key in (("training.json", "sft_digest"), ("adapter/adapter_config.json", "base_model_name_or_path")):
        write_json(made / file, read_json(made / file) | {key: "sha256:other"})
    write_json(made / "base.json", {"reference": "models:/m-base/1", "files": file_hashes(stages.base)})
    monkeypatch.setattr(candidates, "download_incumbent", lambda uri: (made, "s"))
    monkeypatch.setattr(candidates, "_fetch", lambda uri, what: stages.base)
    opened.clear()
    found = stages.judge("older", incumbent="models:/m/1")
    assert opened == ["incumbent", "incumbent"], "the second time as its own reference"
    mine, theirs = (
        results["models"][name]["policy_metrics"] for results, name in ((first, "policy"), (found, "incumbent"))
    )
    same_within(theirs, mine)
    assert found["models"]["incumbent"]["generation"]["kl"]["value"] == pytest.approx(
        first["models"]["policy"]["generation"]["kl"]["value"], abs=1e-4
    )
    write_json(made / "base.json", {"reference": "models:/m-base/1", "files": {"config.json": "0"}})
    with pytest.raises(InputError, match="the files of its base model models:/m-base/1 changed"):
        stages.judge("older", incumbent="models:/m/1")


def test_the_sft_model_alone_is_judged_against_the_base(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dpo.epochs: 0`: the exported policy is the SFT model, and what bounds preference training does not apply."""
    alone = stages.align("alone", "dpo.epochs=0")
    aligned = stages.align("aligned", "dpo.max_steps=1")
    assert alone["models"].keys() == {"base", "policy"} and alone["comparisons"].keys() == {"base"}
    same_within(alone["models"]["policy"]["overall"], aligned["models"]["sft"]["overall"])
    rules = {rule["name"]: rule["outcome"] for rule in alone["verdict"]["rules"]}
    assert {name for name, outcome in rules.items() if outcome == "not applicable"} == {
        "policy_loss",
        "kl",
        "length_ratio",
    }
    gain = alone["comparisons"]["base"]["improvement"]["value"]
    loss = alone["models"]["policy"]["overall"]["preference_log_loss"]["value"]
    assert gain == pytest.approx(math.log(2) - loss, abs=1e-9) and "base model" in alone["verdict"]["sentence"]
    gate = load_config(ROOT / "params.yaml", SETTINGS).gate
    assert judge_again(cast(Any, alone), GateContext("", 1, True), gate, "x") == alone["verdict"]
    page = (stages.folder / "alone" / "report.html").read_text()
    assert "dpo.epochs is 0" in page and "DPO loss" not in page and "SFT loss" in page

    champion = {"name": "aligned"}
    monkeypatch.setattr(
        candidates, "download_incumbent", lambda uri: (stages.folder / champion["name"] / "policy", "s")
    )
    beaten = stages.judge("alone", "dpo.epochs=0", incumbent="models:/m/1")
    assert beaten["comparisons"].keys() == {"base", "incumbent"}
    # The incumbent's reference is the SFT model, which is the policy here.
    same_within(beaten["models"]["incumbent"]["policy_metrics"], aligned["models"]["policy"]["policy_metrics"])
    champion["name"] = "alone"
    challenger = stages.judge("aligned", "dpo.max_steps=1", incumbent="models:/m/1")
    assert challenger["comparisons"].keys() == {"sft", "incumbent"}
    assert challenger["models"]["incumbent"]["policy_metrics"] is None
    assert challenger["models"]["incumbent"]["generation"]["kl"] == alone["models"]["policy"]["generation"]["kl"]


def same_within(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for metric, estimate in expected.items():
        assert found[metric] == pytest.approx(estimate, abs=1e-4), metric


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


def test_changed_weights_are_refused_before_they_are_loaded(stages: Stages) -> None:
    weights = stages.folder / "sft" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(KubealignError, match="adapter_model.safetensors changed since it was written"):
            stages.align("tampered")
    finally:
        weights.write_bytes(content)
