"""What training leaves for others: adapters, the whole model and its folder, and proof that a reader gets the policy.

A model folder is written for readers of transformers 4 and 5, and for those built on either. Its tokenizer is the base
model's own, its config.json says the same in both spellings, and generation_config.json has what was trained and what
was judged: the end token of the answers, and no sampling settings.

Shapes: T tokens, E experts of a layer (1 where it has none), R rank, I inputs, O outputs.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import TypedDict

from components.common.errors import TrainingError
from components.common.files import MANIFEST, read_json, replacing_folder, write_json
from components.engine import checkpoints
from components.engine.hardware import Precision
from components.engine.models import (
    ADAPTER_CONFIG,
    DPO_ADAPTER,
    SFT_ADAPTER,
    PackedModel,
    nf4_config,
    plain_logps,
)
from components.engine.packing import Example
from components.engine.processes import processes

EXPORT_ADAPTER = "policy"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OF_THE_MODEL = (CONFIG, GENERATION, TEMPLATE, MANIFEST, *WEIGHTS)
"""Files of a base model's folder that are not its tokenizer's."""
DIALECT = ("backend", "is_local", "local_files_only")
"""Keys that transformers 5 adds to tokenizer_config.json and transformers 4 stumbles over."""
EXPORT_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference, in nats a token, between the trained policy and its export computed in fp32: of any token, or of
the mean over tokens where the policy rounds its products to bf16."""


def save_adapter(model: PeftModel, name: str, out: Path, base_name: str) -> None:
    """Write one adapter as a standard peft folder; `base_name` names the base model in it."""
    with replacing_folder(out) as aside:
        model.save_pretrained(aside, selected_adapters=[name], safe_serialization=True, save_embedding_layers=False)
        for file in (aside / name).iterdir():
            file.replace(aside / file.name)
        (aside / name).rmdir()
        (aside / "README.md").unlink(missing_ok=True)
        config = json.loads((aside / ADAPTER_CONFIG).read_text())
        config["base_model_name_or_path"] = base_name
        # peft keeps them as sets, whose order is another in every process: the same adapter would be another file.
        config |= {name: sorted(value) for name, value in config.items() if isinstance(value, list)}
        (aside / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


@torch.no_grad()
def concatenate_adapters(model: PeftModel) -> None:
    """Concatenate the SFT and DPO adapters by rank into the exported one: exactly their sum, whatever each adapts.

    The first ranks of every layer are the SFT adapter's, zero where it has none, see `keep_first_ranks`. Without a DPO
    adapter they are all.
    """
    parts = {name: model.peft_config[name] for name in (SFT_ADAPTER, DPO_ADAPTER) if name in model.peft_config}
    configs = list(parts.values())
    rank = sum(config.r for config in configs)
    patterns = {pattern for config in configs for pattern in config.rank_pattern or ()}
    ranks = {p: sum((config.rank_pattern or {}).get(p, config.r) for config in configs) for p in sorted(patterns)}
    exported = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted({name for config in configs for name in config.target_modules or ()}),
        target_parameters=sorted({name for config in configs for name in config.target_parameters or ()}) or None,
        exclude_modules=sorted({name for config in configs for name in config.exclude_modules or ()}) or None,
        task_type="CAUSAL_LM",
        bias="none",
    )
    model.add_adapter(EXPORT_ADAPTER, exported)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        if EXPORT_ADAPTER not in layer.lora_A:
            continue
        experts = getattr(layer, "num_experts", 1)
        a_EPI, b_OPE = _by_expert(layer, EXPORT_ADAPTER, experts)
        a_EPI.zero_()
        b_OPE.zero_()
        first = 0
        for name, config in parts.items():
            width = a_EPI.shape[1] * config.r // rank
            if name in layer.lora_A:
                a_ERI, b_ORE = _by_expert(layer, name, experts)
                a_EPI[:, first : first + width] = a_ERI
                b_OPE[:, first : first + width] = b_ORE * layer.scaling[name]
            first += width


def _by_expert(layer: LoraLayer, name: str, experts: int) -> tuple[Tensor, Tensor]:
    """Views of an adapter's weights: A [E, R, I] and B [O, R, E], as peft lays them out for experts."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts)


@torch.no_grad()
def keep_first_ranks(model: PeftModel, name: str, rank: int) -> None:
    """Zero all but the first ranks of an adapter; the first of the exported one are the SFT adapter's.

    Args:
        rank: as the adapter's own `r` counts; layers whose rank is a multiple of it keep that multiple.
    """
    whole = model.peft_config[name].r
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        if name in layer.lora_B:
            _, b_ORE = _by_expert(layer, name, getattr(layer, "num_experts", 1))
            b_ORE[:, b_ORE.shape[1] * rank // whole :] = 0.0


def merge(base: Path, adapter: Path, out: Path, precision: Precision, quantization: Literal["none", "nf4"]) -> None:
    """Write base + adapter as one plain model in fp32: the weights that were trained.

    The base is rounded as it was for the training, to bf16 or to 4 bits: the adapter belongs to those weights, and the
    verdict too.
    """
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    if quantization == "nf4":
        lm = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4_config(torch.float32), **options)
        lm = lm.dequantize()
    else:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        lm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    merged = PeftModel.from_pretrained(lm.float(), adapter, local_files_only=True).merge_and_unload(safe_merge=True)
    with replacing_folder(out) as aside:
        merged.save_pretrained(aside, safe_serialization=True)


@torch.no_grad()
def save_model(model: PackedModel, out: Path) -> None:
    """Write a fully fine-tuned model as a transformers folder in fp32; all processes call this, one writes."""
    state = {name: checkpoints.whole(tensor) for name, tensor in model.causal_lm.state_dict().items()}
    if processes().is_main_process:
        with replacing_folder(out) as aside:
            model.causal_lm.save_pretrained(aside, state_dict=state, safe_serialization=True)


def finish_folder(folder: Path, base: Path, end: int, padding: int | None) -> None:
    """Make a folder with saved weights one that readers of today and of yesterday load alike.

    Args:
        folder: as `save_pretrained` wrote it.
        base: the base model's folder with its tokenizer and the chosen chat template, from fetch.
        end: token id with which a trained answer ends.
        padding: token id for padding, if the tokenizer has one.
    """
    saved, own = read_json(folder / CONFIG), read_json(base / CONFIG)
    write_json(folder / CONFIG, readable_config(saved, own))
    given = read_json(base / GENERATION) if (base / GENERATION).exists() else own
    write_json(folder / GENERATION, generation_settings(given, end, padding, saved["transformers_version"]))
    for path in base.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in OF_THE_MODEL):
            shutil.copyfile(path, folder / path.name)
    template = (base / TEMPLATE).read_text(encoding="utf-8")
    shutil.copyfile(base / TEMPLATE, folder / TEMPLATE)
    settings = read_json(base / TOKENIZER) if (base / TOKENIZER).exists() else {}
    write_json(folder / TOKENIZER, readable_tokenizer(settings) | {"chat_template": template})


def readable_config(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """config.json for readers of transformers 4 and 5: the base model's own, in both spellings.

    Args:
        saved: as transformers 5 writes it.
        own: the base model's.
    """
    config = dict(own if saved.get("model_type") == own.get("model_type") else saved)
    for name in ("auto_map", "quantization_config", "_name_or_path"):
        config.pop(name, None)
    config |= {"architectures": saved["architectures"], "transformers_version": saved["transformers_version"]}
    config["tie_word_embeddings"] = saved.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    for part, written in ((config, saved), *_text_parts(config, saved)):
        part |= {"dtype": "float32", "torch_dtype": "float32"}
        part |= {name: value for name, value in _old_rope(written).items() if name not in part}
        if "rope_parameters" in written:
            part["rope_parameters"] = written["rope_parameters"]
    return config


def _text_parts(config: dict[str, Any], saved: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The nested configuration of a multimodal model's text tower, as kept and as saved."""
    if not isinstance(config.get("text_config"), dict) or not isinstance(saved.get("text_config"), dict):
        return []
    config["text_config"] = dict(config["text_config"])
    return [(config["text_config"], saved["text_config"])]


def _old_rope(saved: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers 4 spells them, from transformers 5's `rope_parameters`."""
    rope = saved.get("rope_parameters") or {}
    layers = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    main = dict(layers.get("full_attention") or next(iter(layers.values()), rope))
    if not main:
        return {}
    old = {name: main.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in main}
    if saved.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        old |= {names[name]: value for name, value in old.items()}
    if "sliding_attention" in layers and "full_attention" in layers:
        old["rope_local_base_freq"] = layers["sliding_attention"].get("rope_theta")
    if main.get("rope_type", "default") != "default":
        old["rope_scaling"] = main
    return old


def generation_settings(given: dict[str, Any], end: int, padding: int | None, version: str) -> dict[str, Any]:
    """generation_config.json: ends as they were trained, and no sampling settings, as answers were judged without.

    Args:
        given: the base model's; its further end tokens are kept.
        end: token id with which a trained answer ends.
        padding: token id for padding, if the tokenizer has one.
        version: of transformers.
    """
    ends = given.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    all_ends = [end, *(other for other in ends if other not in (None, end))]
    settings = {"bos_token_id": given.get("bos_token_id"), "eos_token_id": all_ends if len(all_ends) > 1 else end}
    settings["pad_token_id"] = end if padding is None else padding
    return {name: value for name, value in settings.items() if value is not None} | {"transformers_version": version}


def readable_tokenizer(own: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as the base model has it, without what transformers 5 alone can read."""
    settings = {name: value for name, value in own.items() if name not in (*DIALECT, "auto_map")}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        more = settings.pop("extra_special_tokens")
        settings["additional_special_tokens"] = [*settings.get("additional_special_tokens", []), *more]
    return settings


def load_plain(folder: Path) -> PreTrainedModel:
    """Load a model folder with plain transformers, in fp32."""
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


class Fingerprint(TypedDict):
    """fingerprint.json: a text's log-probs under the policy as it was trained, to recognise it in what is loaded."""

    prompt: list[int]
    completion: list[int]
    logps: list[float]
    """Of each token of the completion, nats."""
    precision: Precision
    """Of the policy, or bf16 if its base had 4 bits; it decides how far another computation may differ."""


def logp_error(ours: Sequence[float], theirs: Sequence[float], precision: Precision) -> float:
    """How far two computations of the same log-probs are apart, to compare with `EXPORT_TOLERANCE`, nats a token."""
    differences_T = (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)).abs()
    return float(differences_T.max() if precision == "fp32" else differences_T.mean())


def check_export(
    load: Callable[[], nn.Module],
    examples: Sequence[Example],
    logps: Sequence[Sequence[Tensor]],
    precision: Precision,
    where: str,
) -> float:
    """Check that an exported model, loaded as a stranger loads it, has the policy's log-probs.

    Args:
        load: loads it.
        examples: some pairs.
        logps: log-probs of their completions under the policy in memory, nats.
        precision: of the policy, or bf16 if its base had 4 bits.
        where: what was exported, for the message.

    Returns:
        how far they are apart, nats a token.

    Raises:
        TrainingError: further than `EXPORT_TOLERANCE`.
    """
    lm = load()
    ours = [float(logp) for completions in logps for logps_T in completions for logp in logps_T]
    theirs = [
        logp
        for example in examples
        for completion in example.completions
        for logp in plain_logps(lm, example.prompt, completion).tolist()
    ]
    error, tolerance = logp_error(ours, theirs, precision), EXPORT_TOLERANCE[precision]
    if not error <= tolerance:
        raise TrainingError(
            f"{where}: its log-probs differ by {error:.1e} nats a token from those of the policy that was trained;"
            f" expected at most {tolerance:g}. Nothing is kept of it; report this with the base model's name"
        )
    return error
