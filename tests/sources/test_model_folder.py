"""What can be known of a base model before anything is trained is said at fetch or validate, in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import InputError
from components.common.files import read_json, write_json
from components.dataset.chat import load_tokenizer
from components.sources.model_folder import check_use, check_weights, tensor_shapes


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def changed(folder: Path, **values: Any) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | values)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_quantised_weights_are_refused(folder: Path, method: str) -> None:
    check_weights(folder, "x")
    changed(folder, quantization_config={"quant_method": method})
    with pytest.raises(InputError, match=rf"model.base=x: its weights are quantised \({method}\)"):
        check_weights(folder, "x")


def test_incomplete_files_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for content, why in (
        (whole[:-7], "it has .* bytes instead of"),
        (whole[:5], "no whole safetensors file"),
        (b"\xff" * 100, "its header is too long"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no whole safetensors file"),
    ):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=why):
            check_weights(folder, "x")


def test_shards_that_the_index_names_are_there(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n].clone() for n in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    files = {n: f"model-0000{1 + names.index(n) % 2}-of-00002.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert set(tensor_shapes(folder)) == set(names)
    check_weights(folder, "x")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors, which is missing"):
        check_weights(folder, "x")


@pytest.mark.parametrize("pad", [99_999, -99_999])
def test_a_padding_token_outside_the_vocabulary_is_refused(folder: Path, pad: int) -> None:
    changed(folder, pad_token_id=pad)
    with pytest.raises(InputError, match=f"pad_token_id {pad}, but a vocabulary of"):
        check_weights(folder, "x")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_use(folder, tokenizer, 512)
    tokenizer.add_tokens(["<|new_turn|>"], special_tokens=True)
    with pytest.raises(InputError, match=r"'<\|new_turn\|>' is number \d+, and the embedding ends at"):
        check_use(folder, tokenizer, 512)


def test_learnt_positions_are_a_limit_and_rotary_ones_are_none(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_use(folder, tokenizer, 100_000)
    tensors = load_file(folder / "model.safetensors") | {"transformer.wpe.weight": torch.zeros(200, 4)}
    save_file(tensors, folder / "model.safetensors")
    check_use(folder, tokenizer, 200)
    with pytest.raises(InputError, match=r"model.max_length=201: the model has learnt 200 positions"):
        check_use(folder, tokenizer, 201)
