"""A base model is a closed list of files with every tensor present and none besides; nothing of it is guessed."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import InputError, KubealignError
from components.common.files import folder_digest, verify_manifest
from components.config.data import DataConfig
from components.engine import models
from components.engine.models import load_causal_lm
from components.fetch import stage as fetch_stage
from components.fetch.stage import run_fetch
from components.sft.config import SftConfig
from components.sft.stage import run_sft
from tests.conftest import ROOT
from tests.support.hostile import data_repository

pytestmark = pytest.mark.integration

LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder to do harm to."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, change: object) -> None:
    """Change the tensors of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


HARM = {
    "missing": lambda tensors: tensors.pop(LAYER),
    "missing norm": lambda tensors: tensors.pop("model.norm.weight"),
    "missing embedding": lambda tensors: tensors.pop("model.embed_tokens.weight"),
    "unexpected": lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": torch.ones(2, 2)}),
    "unexpected bias": lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.ones(32)}),
    "unexpected adapter": lambda tensors: tensors.update({f"base_model.{LAYER}.lora_A.weight": torch.ones(2, 2)}),
    "of another shape": lambda tensors: tensors.update({LAYER: torch.ones(2, 2)}),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_model_with_other_tensors_than_its_architecture_is_refused(folder: Path, harm: str) -> None:
    rewrite(folder, HARM[harm])
    with pytest.raises(InputError, match=rf"{folder}.*(tensor|cannot be loaded)"):
        load_causal_lm(folder, "fp32")


def test_without_the_check_a_missing_tensor_is_random_and_another_one_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(folder, HARM["missing"])
    monkeypatch.setattr(models, "check_tensors", lambda *arguments: None)
    first, second = (load_causal_lm(folder, "fp32").get_parameter(LAYER) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_tied_head_needs_no_tensor_of_its_own(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_causal_lm(folder, "fp32")


def test_an_untied_head_must_be_there(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(InputError, match=r"missing tensor lm_head\.weight"):
        load_causal_lm(folder, "fp32")


def test_an_adapter_beside_the_weights_is_refused_where_the_model_is_loaded(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "."}')
    with pytest.raises(InputError, match="adapter_config"):
        load_causal_lm(folder, "fp32")


def fetch(base: Path, tmp_path: Path) -> Path:
    """Fetch a base model from a folder, with data from a plain repository."""
    from components.sources.data import data_folders, resolve_data

    repo = data_repository(tmp_path / "repo")
    version = resolve_data(str(repo), "HEAD", data_folders("data"))
    data = DataConfig(repo=str(repo), revision=version.commit)
    out = tmp_path / "out"
    template = ("model", date(2024, 7, 26))
    run_fetch(data, version.digests, *template, str(base), folder_digest(base), out / "dataset", out / "base")
    return out / "base"


EXTRA = (
    "pytorch_model.bin",
    "modeling_evil.py",
    "consolidated.safetensors",
    "model-extra.safetensors",
    "extra.json",
    "onnx/model.onnx",
)


def test_of_a_model_folder_only_the_listed_files_are_taken(folder: Path, tmp_path: Path) -> None:
    for name in EXTRA:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = {path.relative_to(tmp_path / "out" / "base").as_posix() for path in fetch(folder, tmp_path).rglob("*")}
    assert found == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("name", fetch_stage.ADAPTER_FILES)
def test_an_adapter_is_no_base_model(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=name):
        fetch(folder, tmp_path)
    assert not (tmp_path / "out" / "base").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_a_base_model_that_changed_since_it_was_fetched_is_not_loaded(folder: Path, tmp_path: Path, name: str) -> None:
    from components.config.params import load_config

    base = fetch(folder, tmp_path)
    verify_manifest(base)
    with (base / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(KubealignError, match=f"{name} changed"):
        run_sft(
            SftConfig(), load_config(ROOT / "params.yaml").model, tmp_path / "out" / "dataset", base, tmp_path / "sft"
        )
