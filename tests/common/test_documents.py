"""Documents between steps are read whole or refused with the file and the field, and 0.1's where they outlive it."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.documents import read_document
from components.common.errors import InputError
from components.engine.history import StepRecord, read_history, write_history
from components.gate.verdict import Verdict
from components.training.documents import read_dpo_training

RULE = {"name": "min_pairs", "outcome": "fail", "found": 23.0, "expected": "at least 50", "sentence": "23 pairs"}
VERDICT: dict[str, Any] = {
    "passed": False,
    "verdict": "no evidence",
    "sentence": "There is no evidence.",
    "incumbent": "",
    "decision_index": 1,
    "alpha_for_decision": 0.025,
    "data_clean": True,
    "gate": {"alpha": 0.05, "test": "superiority", "min_pairs": 50, "require_committed_data": True},
    "policy_digest": "p",
    "rules": [RULE],
}
TRAINING = {
    "beta": 0.1,
    "loss": "sigmoid",
    "precision": "fp32",
    "base_digest": "b",
    "sft_digest": "s",
    "reference_rank": 16,
    "libraries": {"torch": "2.13.0"},
}
RECORD = StepRecord(1, 2, 0.7, 1e-4, 0.5, 99, 0.25, 512.0, {"kl": 0.1}, {"loss": 0.6})


def written(folder: Path, value: Any) -> Path:
    path = folder / "verdict.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_a_whole_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_document(written(tmp_path, VERDICT), Verdict) == VERDICT


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"alpha_for_decision": None}, "alpha_for_decision"),
        ({"alpha_for_decision": "secret"}, "alpha_for_decision"),
        ({"decision_index": 1.5}, "decision_index"),
        ({"verdict": "secret"}, "verdict"),
        ({"rules": [RULE, RULE | {"found": "secret"}]}, "rules.1.found"),
        ({"own": {}}, "own: unknown"),
    ],
)
def test_a_field_that_is_not_as_declared_is_refused_by_file_and_name_without_its_value(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    path = written(tmp_path, VERDICT | change)
    with pytest.raises(InputError, match="written by another version of kubealign") as refused:
        read_document(path, Verdict)
    assert str(refused.value).startswith(f"{path}: {field}") and "secret" not in str(refused.value)


def test_a_missing_field_a_missing_file_and_a_torn_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {name: value for name, value in VERDICT.items() if name != "rules"})
    with pytest.raises(InputError, match="verdict.json: rules: missing; the document is damaged or"):
        read_document(path, Verdict)
    path.write_bytes(json.dumps(VERDICT).encode()[:40])
    with pytest.raises(InputError, match="verdict.json: Invalid JSON"):
        read_document(path, Verdict)
    path.unlink()
    with pytest.raises(InputError, match="verdict.json: not found; run the step that writes it"):
        read_document(path, Verdict)


def test_the_training_of_a_model_that_version_0_1_registered_is_read(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"validation_loss": 0.7, "validation_kl": 0.2} | TRAINING))
    assert read_dpo_training(tmp_path) == TRAINING
    path.write_text(json.dumps({name: value for name, value in TRAINING.items() if name != "sft_digest"}))
    with pytest.raises(InputError, match="training.json: sft_digest: missing"):
        read_dpo_training(tmp_path)


def test_a_damaged_line_of_a_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_history(path, [RECORD, RECORD])
    assert read_history(path) == [RECORD, RECORD]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"tokens": 99', '"tokens": "many"')]))
    with pytest.raises(InputError, match="history.jsonl:2: tokens: "):
        read_history(path)
    path.write_text("")
    with pytest.raises(InputError, match="history.jsonl: no steps"):
        read_history(path)
