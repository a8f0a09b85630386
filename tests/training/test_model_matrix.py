"""One matrix, walked whole: a tiny model of every architecture goes through validate, sft, dpo, evaluate and export."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from components.common.files import read_json
from components.dataset.chat import load_tokenizer
from components.engine.export import load_plain, plain_logps
from tests.engine.test_architectures import PACKABLE, SIZES, UNPACKABLE
from tests.support.stages import Stages

ARCHITECTURES = PACKABLE | UNPACKABLE
NORMAL = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "mamba", "gemma3", "deepseek_v3")
MATRIX = [pytest.param(name, marks=() if name in NORMAL else (pytest.mark.long,)) for name in ARCHITECTURES]


def make_base(name: str, tokenizer_of: Path, folder: Path) -> Path:
    """A tiny random model of an architecture with the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_of)
    kind, own = ARCHITECTURES[name]
    end = tokenizer.eos_token_id
    ids = {"pad_token_id": end, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    config = getattr(transformers, kind)(**SIZES | own | {"vocab_size": len(tokenizer)} | ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer_of.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.mark.parametrize("name", MATRIX)
def test_an_architecture_goes_through_all_stages_and_is_exported_as_it_was_judged(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base(name, tiny_model, tmp_path / "made")
    stages = Stages(tmp_path / "stages", base)
    found = stages.align("one", "dpo.max_steps=2")
    assert found["held_out"]
    policy = tmp_path / "stages" / "one" / "policy"
    stored = read_json(policy / "fingerprint.json")
    plain = plain_logps(load_plain(policy / "model"), stored["prompt"], stored["completion"])
    assert (plain - torch.tensor(stored["logps"])).abs().max() < 1e-3
