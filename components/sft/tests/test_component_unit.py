"""The function of the sft component."""

from pathlib import Path

import pytest

from components.common.files import read_json, verify_manifest
from components.dataset.records import read_lines
from components.sft.component import sft
from tests.support.component_kit import Chain, assert_refused, call, order


def test_it_writes_an_adapter_its_steps_and_its_losses(chain: Chain, tmp_path: Path) -> None:
    _, made = call(sft, tmp_path, dataset=chain.clean, base=chain.base)
    verify_manifest(tmp_path / "sft_model")
    assert (tmp_path / "sft_model" / "adapter" / "adapter_model.safetensors").is_file()
    assert len(read_lines(tmp_path / "sft_model" / "history.jsonl")) == 1
    assert made["metrics"].metadata == read_json(tmp_path / "metrics")
    assert set(made["metrics"].metadata) == {"validation_loss_before", "validation_loss"}


def test_a_learning_rate_below_zero_is_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"order": order("sft", {"sft": {"learning_rate": -1.0}}), "dataset": chain.clean, "base": chain.base}
    assert_refused("learning_rate: input should be greater than 0, found -1", capsys, sft, tmp_path, **wrong)
