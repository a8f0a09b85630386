"""The function of the dpo component."""

import math
from pathlib import Path

import pytest

from components.common.files import read_json, verify_manifest
from components.dataset.records import read_lines
from components.dpo.component import dpo
from tests.support.component_kit import Chain, assert_refused, call, order


def test_it_starts_at_ln_2_and_writes_the_policy_whole_and_as_an_adapter(chain: Chain, tmp_path: Path) -> None:
    _, made = call(dpo, tmp_path, dataset=chain.clean, base=chain.base, sft_model=chain.sft_model)
    verify_manifest(tmp_path / "policy")
    assert (tmp_path / "policy" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "policy" / "model" / "model.safetensors").is_file()
    (step,) = read_lines(tmp_path / "policy" / "history.jsonl")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert made["metrics"].metadata == read_json(tmp_path / "metrics")


def test_a_loss_that_there_is_not_is_refused(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = order("dpo", {"dpo": {"loss_type": "ppo"}})
    given = {"dataset": chain.clean, "base": chain.base, "sft_model": chain.sft_model}
    assert_refused("dpo: loss_type: input should be 'sigmoid'", capsys, dpo, tmp_path, order=wrong, **given)
