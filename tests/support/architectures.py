"""Tiny random models of the supported architectures, and examples for them."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from components.dataset.chat import load_tokenizer
from components.engine.packing import Example

VOCABULARY = 97
WINDOW = 7
"""Shorter than every example, and than most of the completions alone."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
PACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", MIXED | {"use_sliding_window": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        MIXED
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("Gemma3TextConfig", MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOssConfig", MIXED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 8, "num_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 16, "num_experts": 4}),
    "olmoe": ("OlmoeConfig", EXPERTS | {"num_experts": 4}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "Glm4MoeConfig",
        EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", EXPERTS | {"moe_num_experts": 4, "moe_k": 2}),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "cohere2": ("Cohere2Config", MIXED | {"logit_scale": 0.25}),
    "granite": (
        "GraniteConfig",
        {
            "logits_scaling": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "embedding_multiplier": 2.0,
        },
    ),
}
UNPACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {"alibi": True}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32}),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 20,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
}

ARCHITECTURES = PACKABLE | UNPACKABLE
EVERY_TIME = ("llama", "qwen2", "gemma2", "gpt2", "mixtral", "mamba", "gemma3", "deepseek_v3")
"""Those that the normal tier walks through all stages, by LoRA; `make test-models` walks all, also fully fine-tuned."""
SOME_LINEAR = {"mamba": ["in_proj", "x_proj"], "llama4": ["q_proj", "v_proj", "down_proj"]}
"""Where peft cannot adapt all linear layers: Mamba's output and Llama 4's router."""


def draw(number: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def example(number: int, prompt: int, chosen: int, rejected: int) -> Example:
    ids, *answers = draw(number, prompt, chosen, rejected)
    return Example(ids, answers)


EXAMPLES = [example(0, 13, 9, 17), example(1, 8, 14, 3), example(2, 11, 2, 12)]
COMPLETIONS = [(e.prompt, completion) for e in EXAMPLES for completion in e.completions]
WEIGHTS = torch.linspace(-1, 1, sum(len(completion) for _, completion in COMPLETIONS))


def configuration(kind: tuple[str, dict[str, Any]], **more: Any) -> PreTrainedConfig:
    """The configuration of a tiny model, with the fields that those of its architecture have and no others."""
    name, own = kind
    real: type[PreTrainedConfig] = getattr(transformers, name)
    sizes = {field: value for field, value in SIZES.items() if field.endswith("token_id") or hasattr(real(), field)}
    return real(**sizes | own | more)


def make_base(kind: tuple[str, dict[str, Any]], tokenizer_of: Path, folder: Path) -> Path:
    """A tiny random model of an architecture with the tokenizer of another one."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_of)
    end = tokenizer.eos_token_id
    ids = {"pad_token_id": end, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    config = configuration(kind, vocab_size=len(tokenizer), **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in tokenizer_of.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    return folder


def build(kind: tuple[str, dict[str, Any]], folder: Path) -> Path:
    """Save a tiny random model of an architecture, its zero-initialised vectors shaken too."""
    torch.manual_seed(0)
    config = configuration(kind)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
