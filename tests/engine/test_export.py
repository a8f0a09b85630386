"""What is exported is what was trained, and readers of transformers 4 and 5 find what they look for."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from components.common.errors import InputError, TrainingError
from components.common.files import read_json, write_json
from components.dpo.stage import check_reference
from components.engine.export import (
    EXPORT_ADAPTER,
    check_export,
    concatenate_adapters,
    finish_folder,
    generation_settings,
    keep_first_ranks,
    load_plain,
    merge,
    readable_config,
    readable_tokenizer,
    save_adapter,
)
from components.engine.loop import completion_logps, sequence_logps
from components.engine.models import (
    DPO_ADAPTER,
    SFT_ADAPTER,
    PackedModel,
    adapted_share,
    add_lora,
    disable_dropout,
    load_causal_lm,
    select_packing,
)
from components.engine.packing import Example
from tests.support.architectures import EXAMPLES, PACKABLE, build

MOE = (
    *("mixtral", "deepseek_v3", "qwen3_moe", "qwen2_moe", "olmoe"),
    *("phimoe", "granitemoe", "glm4_moe", "ernie4_5_moe", "minimax_m2"),
)
EN, ZH = ["q_proj", "v_proj"], ["k_proj", "up_proj"]


def shaken(model: PeftModel, name: str, seed: int) -> None:
    """Give an adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name and ".lora_" in parameter_name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logps(model: PackedModel) -> Tensor:
    return torch.cat([value for pair in completion_logps(model, EXAMPLES) for value in pair])


@pytest.mark.parametrize(
    ("name", "sft", "dpo"),
    [
        ("llama", "all-linear", "all-linear"),
        ("llama", EN, "all-linear"),
        ("llama", EN, ZH),
        *((name, "all-linear", "all-linear") for name in MOE),
    ],
)
def test_the_exported_adapter_is_both_and_its_first_ranks_are_the_reference(
    name: str, sft: Any, dpo: Any, tmp_path: Path
) -> None:
    """For any targets and ranks, experts included; and base + adapter read by plain peft, or merged, is the policy."""
    base = build(PACKABLE[name], tmp_path / "base")
    model = PackedModel(load_causal_lm(base, "fp32"), "fp32")
    plain = logps(model)
    model.lm = add_lora(model.lm, SFT_ADAPTER, 4, 6, 0.0, sft, 1)
    shaken(model.lm, SFT_ADAPTER, 1)
    reference = logps(model)
    assert (reference - plain).abs().max() > 1e-2
    model.lm = add_lora(model.lm, DPO_ADAPTER, 6, 24, 0.0, dpo, 2, rslora=True)
    shaken(model.lm, DPO_ADAPTER, 2)
    policy = logps(model)
    assert (policy - reference).abs().max() > 1e-2
    concatenate_adapters(model.lm)
    save_adapter(model.lm, EXPORT_ADAPTER, tmp_path / "adapter", "sha256:abc")
    stranger = PeftModel.from_pretrained(load_plain(base), tmp_path / "adapter")
    assert check_export(lambda: stranger, EXAMPLES, completion_logps(model, EXAMPLES), "fp32", "x") < 2e-5
    keep_first_ranks(stranger, "default", 4)
    model.lm.base_model.set_adapter([SFT_ADAPTER])
    assert check_export(lambda: stranger, EXAMPLES, completion_logps(model, EXAMPLES), "fp32", "x") < 2e-5
    model.lm.base_model.set_adapter([SFT_ADAPTER, DPO_ADAPTER])
    merge(base, tmp_path / "adapter", tmp_path / "merged", "fp32", "none")
    exported = completion_logps(model, EXAMPLES)
    assert check_export(lambda: load_plain(tmp_path / "merged"), EXAMPLES, exported, "fp32", "x") < 2e-5
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights[min(weights)] *= 1.5
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"x: its log-probs differ by .* nats a token .* at most 0.001"):
        check_export(lambda: load_plain(tmp_path / "merged"), EXAMPLES, exported, "fp32", "x")


def test_a_base_that_was_rounded_for_the_training_is_merged_rounded(tmp_path: Path) -> None:
    base = build(PACKABLE["llama"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    model = add_lora(load_causal_lm(base, "fp32"), SFT_ADAPTER, 4, 6, 0.0, EN, 1)
    save_adapter(model, SFT_ADAPTER, tmp_path / "adapter", "sha256:abc")
    for precision in ("fp32", "bf16"):
        merge(base, tmp_path / "adapter", tmp_path / precision, precision, "none")  # type: ignore[arg-type]
    name = "model.layers.0.mlp.up_proj.weight"
    found = {precision: load_file(tmp_path / precision / "model.safetensors")[name] for precision in ("fp32", "bf16")}
    assert torch.equal(found["fp32"], weights[name])
    assert torch.equal(found["bf16"], weights[name].bfloat16().float()) and not torch.equal(*found.values())


def test_a_base_in_4_bits_is_merged_as_it_was_trained_on(tmp_path: Path) -> None:
    """On the full base the same adapter makes another model, which nobody judged."""
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "CI" not in os.environ, "CI installs the qlora extra"
        pytest.skip("pip install 'kubealign[qlora]'")
    name, own = PACKABLE["llama"]
    base = build((name, own | {"hidden_size": 128, "intermediate_size": 256}), tmp_path / "base")
    model = PackedModel(load_causal_lm(base, "fp32", quantization="nf4"), "fp32")
    for adapter in (SFT_ADAPTER, DPO_ADAPTER):
        model.lm = add_lora(model.lm, adapter, 4, 6, 0.0, "all-linear", 1)
        shaken(model.lm, adapter, 1)
    trained = completion_logps(model, EXAMPLES)
    concatenate_adapters(model.lm)
    save_adapter(model.lm, EXPORT_ADAPTER, tmp_path / "adapter", "sha256:abc")
    merge(base, tmp_path / "adapter", tmp_path / "merged", "fp32", "nf4")
    assert check_export(lambda: load_plain(tmp_path / "merged"), EXAMPLES, trained, "fp32", "x") < 1e-4
    merge(base, tmp_path / "adapter", tmp_path / "other", "fp32", "none")
    with pytest.raises(TrainingError, match="its log-probs differ by"):
        check_export(lambda: load_plain(tmp_path / "other"), EXAMPLES, trained, "fp32", "x")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}
OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "theta": {"model_type": "qwen2", "rope_theta": 1e6},
    "scaled": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"},
    "local": {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 8},
    "partial": {"model_type": "phi", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "neox": {"model_type": "gpt_neox", "rotary_emb_base": 20000, "rotary_pct": 0.25},
}


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_config_json_says_the_same_in_both_spellings(name: str, tmp_path: Path) -> None:
    """From a base model in either spelling come the same old keys, and what transformers 5 reads is what it wrote."""
    own = OLD_CONFIGS[name] | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
    (tmp_path / "own").mkdir()
    write_json(tmp_path / "own" / "config.json", own)
    config = AutoConfig.from_pretrained(tmp_path / "own")
    config.save_pretrained(tmp_path / "saved")
    saved = read_json(tmp_path / "saved" / "config.json") | {"architectures": ["X"]}
    hostile = {"auto_map": {"AutoModel": "evil.py"}, "quantization_config": {"quant_method": "fp8"}}
    for base in (own | hostile, saved):
        found = readable_config(saved, base)
        for key, value in OLD_CONFIGS[name].items():
            assert found[key] == value or key in ("torch_dtype", "rope_scaling"), key
        if "rope_scaling" in own:
            assert found["rope_scaling"].items() >= LLAMA3.items()
        assert found["dtype"] == found["torch_dtype"] == "float32"
        assert not {"auto_map", "quantization_config"} & set(found)
        (tmp_path / "again").mkdir(exist_ok=True)
        write_json(tmp_path / "again" / "config.json", found)
        assert AutoConfig.from_pretrained(tmp_path / "again").rope_parameters == config.rope_parameters


def test_generation_ends_as_it_was_trained_and_samples_as_it_was_judged() -> None:
    given = {"eos_token_id": 0, "bos_token_id": 1, "temperature": 0.6, "repetition_penalty": 1.1, "do_sample": True}
    assert generation_settings(given, 2, None, "5") == {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
        "transformers_version": "5",
    }
    assert generation_settings({"eos_token_id": [7, 2]}, 2, 9, "5")["eos_token_id"] == [2, 7]
    assert generation_settings({}, 2, 9, "5")["eos_token_id"] == 2


def test_tokenizer_files_are_the_base_models_own(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "clean_up": False}
    write_json(base / "tokenizer_config.json", settings)
    (base / "vocab.json").write_text("{}")
    folder = Path(shutil.copytree(tiny_model, tmp_path / "policy"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    finish_folder(folder, base, 2, 2)
    for name in ("tokenizer.json", "vocab.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    template = (base / "chat_template.jinja").read_text()
    assert read_json(folder / "tokenizer_config.json") == settings | {"chat_template": template}
    five = {"tokenizer_class": "TokenizersBackend", "is_local": True, "extra_special_tokens": ["<a>"], "eos_token": "x"}
    assert readable_tokenizer(five) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "x",
    }


@pytest.mark.parametrize(
    "kind",
    [
        ("GPT2Config", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
        ("FalconConfig", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
    ],
    ids=lambda kind: kind[0],
)
def test_dropout_of_the_base_and_of_frozen_adapters_is_off(kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """With it, the untrained policy differs from its reference, which the check in training mode sees.

    Falcon's layers read it from the configuration.
    """
    model = PackedModel(load_causal_lm(build(kind, tmp_path / "base"), "fp32"), "fp32")
    select_packing(model, 64)
    model.lm = add_lora(model.lm, SFT_ADAPTER, 4, 6, 0.5, "all-linear", 1)
    shaken(model.lm, SFT_ADAPTER, 1)
    reference = torch.tensor(sequence_logps(model, EXAMPLES)).double().numpy()
    with pytest.raises(TrainingError, match="a loss of ln 2"):
        check_reference(model, EXAMPLES, reference)
    disable_dropout(model)
    check_reference(model, EXAMPLES, reference)
    assert (torch.tensor(sequence_logps(model, EXAMPLES, training=True)) - torch.tensor(reference)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (["q_proj", "lm_head"], "lm_head is an embedding or the output layer, whose adapter would not be trained"),
        (["embed_tokens"], "embed_tokens is an embedding or the output layer"),
        (["query"], "lora_targets=query, lora_dropout=0: peft cannot adapt LlamaForCausalLM so: Target modules"),
    ],
)
def test_targets_that_cannot_be_trained_are_refused(targets: list[str], why: str, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=why):
        add_lora(load_causal_lm(tiny_model, "fp32"), SFT_ADAPTER, 4, 6, 0.0, targets, 1)


def test_the_adapted_share_counts_experts(tmp_path: Path) -> None:
    llama = add_lora(load_causal_lm(build(PACKABLE["llama"], tmp_path / "l"), "fp32"), "sft", 4, 6, 0.0, EN, 1)
    weights = {name: tensor.numel() for name, tensor in load_file(tmp_path / "l" / "model.safetensors").items()}
    named = sum(size for name, size in weights.items() if any(f".{target}." in name for target in EN))
    assert adapted_share(llama) == pytest.approx(named / sum(weights.values()))
    mixtral = add_lora(
        load_causal_lm(build(PACKABLE["mixtral"], tmp_path / "m"), "fp32"), "sft", 4, 6, 0.0, "all-linear", 1
    )
    assert adapted_share(mixtral) > 0.7


def outliers(folder: Path) -> Path:
    """Key biases as large as Qwen2.5 has them, in proportion."""
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("k_proj.bias"):
            weights[name] += 60.0 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_rounding_is_told_from_a_wrong_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine.models.native_precision", lambda: "bf16")
    folder = outliers(build(PACKABLE["qwen2"], tmp_path / "qwen2"))
    model = PackedModel(load_causal_lm(folder, "bf16"), "bf16")
    assert model.precision == "bf16"
    sentence = select_packing(model, 64)
    assert model.packed, sentence

    def all_true(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
        return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)

    monkeypatch.setattr("components.engine.attention.causal_mask", all_true)
    broken = PackedModel(load_causal_lm(folder, "bf16"), "bf16")
    assert "one sequence at a time" in select_packing(broken, 64)


def test_a_norm_with_a_gate_keeps_its_own_forward(tmp_path: Path) -> None:
    """Granite 4 and Mamba 2 call theirs with a second argument."""
    kind = ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8})
    folder = build(kind, tmp_path / "mamba2")
    model = PackedModel(load_causal_lm(folder, "fp32"), "fp32")
    select_packing(model, 64)
    found = torch.cat([v for pair in completion_logps(model, [Example([3, 4, 5], [[6, 7], [8]])]) for v in pair])
    plain: Callable[..., Any] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = plain(input_ids=torch.tensor([[3, 4, 5, 6, 7]])).logits[0].log_softmax(-1)
    assert torch.allclose(found[:2], torch.stack([logits[2, 6], logits[3, 7]]), atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mamba2"
