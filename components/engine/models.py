"""Models for the engine: load, adapters, the packed forward, the check at load, save and merge.

The policy is base + SFT adapter + DPO adapter; its reference is the same without the DPO adapter.
"""

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from components.common.errors import InputError
from components.common.files import replacing_folder
from components.engine import checkpoints, fused, lora
from components.engine.attention import PACKED, varlen
from components.engine.hardware import Precision, native_precision
from components.engine.head import token_logps
from components.engine.packing import Example, Pack, pack
from components.engine.processes import keep_freed_memory, processes

SFT_ADAPTER, DPO_ADAPTER, SHIPPED_ADAPTER = "sft", "dpo", "policy"
PACKED_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.5}
"""Largest difference, in nats, between packed and plain log-probs of a token."""
PACKED_LAYERS = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class PackedModel(nn.Module):
    """A causal LM whose forward takes a pack and gives token log-probabilities.

    Wrap this module, not the LM inside it, for several processes: nothing outside reads the head's weight.

    Args:
        lm: the transformers model, perhaps with adapters.
        precision: `bf16` computes matrix products in bf16 by autocast where the machine has it in hardware; everything
            else is computed in fp32.
        head_precision: of the products with the output embedding; None for the same.
        packed: False runs every sequence by itself through the model's plain attention: for models that cannot be
            packed, slower.
    """

    def __init__(
        self, lm: nn.Module, precision: Precision, head_precision: Precision | None = None, packed: bool = True
    ) -> None:
        super().__init__()
        self.lm = lm
        self.precision: Precision = "bf16" if precision == native_precision() == "bf16" else "fp32"
        self.head_precision = head_precision or self.precision
        self.packed = packed

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.lm.parameters()).device

    def autocast(self) -> torch.autocast:
        """The context in which this model computes: bf16 matrix products for `bf16`, nothing for `fp32`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, with adapters in place but without peft's wrapper."""
        inner: PreTrainedModel = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        return inner

    @property
    def decoder(self) -> nn.Module:
        """The transformers model without its output layer."""
        lm = self.causal_lm
        # The prefix that Llama 4's text model names does not exist, and transformers then answers with the whole model.
        inner: nn.Module = lm.model if lm.base_model is lm else lm.base_model
        return inner

    @property
    def n_lanes(self) -> int:
        """How many threads may train it side by side: torch's on a CPU, one where that would change the result.

        Chance (dropout, jitter) has one sequence of random numbers, so it would depend on who comes first; and the
        gradients of full fine-tuning are too large to have several of.
        """
        settings = self.causal_lm.config.get_text_config().to_dict()
        chance = [value for name, value in settings.items() if "drop" in name or "jitter" in name]
        chance += [getattr(module, "p", 0.0) for module in self.modules() if "Dropout" in type(module).__name__]
        if any(isinstance(value, float | int) and value > 0 for value in chance):
            return 1
        plain = self.packed and isinstance(self.lm, PeftModel) and not getattr(self.causal_lm, "is_quantized", False)
        return torch.get_num_threads() if plain and self.device.type == "cpu" else 1

    def forward(self, batch: Pack) -> Tensor:
        """Log-probability of each completion token, fp32 [N], nats."""
        model = self.causal_lm
        config = model.config.get_text_config()
        with self.autocast():
            hidden_NE = self._packed_hidden(batch) if self.packed else self._plain_hidden(batch)
            # Cohere multiplies its logits, Granite divides them; the head is linear, so its input may be scaled.
            scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
            hidden_NE = hidden_NE * scale
        return token_logps(
            hidden_NE,
            batch.target_N,
            model.get_output_embeddings(),
            getattr(config, "final_logit_softcapping", None),
            torch.bfloat16 if self.head_precision == "bf16" else torch.float32,
        )

    def _packed_hidden(self, batch: Pack) -> Tensor:
        output = self.decoder(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.positions_T[None],
            segments=batch.segments,
            layout=varlen(batch.segments, self.device) if self.device.type == "cuda" else None,
            use_cache=False,
        )
        hidden_NE: Tensor = output.last_hidden_state[0].index_select(0, batch.predictor_N)
        return hidden_NE

    def _plain_hidden(self, batch: Pack) -> Tensor:
        """The same rows, from one plain forward pass per completion."""
        rows: list[Tensor] = []
        for start, end, branches in batch.segments:
            for first, last in branches:
                ids = torch.cat([batch.input_ids_T[start:end], batch.input_ids_T[first:last]])
                hidden_TE = self.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
                predictor = batch.predictor_N[batch.sequence_N == len(rows)]
                in_prompt = predictor < end
                rows.append(hidden_TE[torch.where(in_prompt, predictor - start, predictor - first + end - start)])
        return torch.cat(rows)


def load_causal_lm(
    path: Path, precision: Precision, full: bool = False, quantization: Literal["none", "nf4"] = "none"
) -> PreTrainedModel:
    """Load the safetensors weights of a local folder, ready for packed rows.

    `bf16` keeps frozen weights in bfloat16 and lifts the residual stream to fp32 at the embedding: the matrix products
    run under autocast, sums over layers do not lose bits. Where the machine has no bf16 in hardware, the products are
    in fp32, and those of weights that were shipped in bf16 the same to the bit as with `fp32`.

    Args:
        full: all parameters train, so they are in fp32 in either precision; otherwise all are frozen.
        quantization: `nf4` keeps the weights of the linear layers in 4 bits (QLoRA, arXiv 2305.14314).

    Raises:
        InputError: the folder is no causal LM in safetensors, or bitsandbytes is missing.
    """
    keep_freed_memory()
    low, computes_low = precision == "bf16" and not full, precision == native_precision() == "bf16"
    dtype = torch.bfloat16 if low else torch.float32
    options: dict[str, Any] = {"device_map": {"": processes().device}} if torch.cuda.is_available() else {}
    if quantization == "nf4":
        options["quantization_config"] = _nf4(torch.bfloat16 if computes_low else torch.float32)
    if _takes_attention(path):
        options["attn_implementation"] = PACKED
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a causal language model in safetensors: {str(error).splitlines()[0]}"
        ) from error
    model.requires_grad_(full)
    model.eval()
    for module in model.modules():
        # Else bitsandbytes repacks 4-bit weights on a CPU in eval mode, for kernels that have no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if low:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
        if not computes_low:
            _compute_in_fp32(model)
    fused.speed_up(model)
    if computes_low:
        _round_norms(model)
    return model


@torch.no_grad()
def _compute_in_fp32(model: PreTrainedModel) -> None:
    """Keep the large weights in bf16 and compute in fp32; a model that cannot do both is kept in fp32."""
    lora.compute_in_fp32(model)
    try:
        with plain_attention(model, "eager"):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except RuntimeError:
        # Mamba's layers read weights of others by themselves, and would multiply different dtypes.
        model.float()


def _takes_attention(path: Path) -> bool:
    """Whether the model's attention goes through transformers' AttentionInterface."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, OSError, ValueError):
        return True
    return bool(getattr(kind, "_supports_attention_backend", False))


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "model.quantization=nf4 needs bitsandbytes, which is not installed; pip install 'kubealign[qlora]', or set"
            " model.quantization=none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _round_norms(model: nn.Module) -> None:
    """Let the norms inside the decoder layers give bf16: once, instead of once in every product that reads them."""
    for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for norm in (child for layer in layers for child in layer.children() if "Norm" in type(child).__name__):
            norm.rounds = True  # type: ignore[assignment]
            norm.register_forward_hook(lambda module, inputs, output: output.bfloat16())


def add_lora(
    lm: nn.Module, name: str, rank: int, alpha: float, dropout: float, targets: str | list[str], seed: int
) -> PeftModel:
    """Add a LoRA adapter (fp32, trainable, zero at the start) beside those that the model already has.

    All adapters are active afterwards, and only the new one trains. Source: LoRA, arXiv 2106.09685.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )
    if isinstance(lm, PeftModel):
        lm.add_adapter(name, config)
        model = lm
    else:
        model = get_peft_model(lm, config, adapter_name=name)
    lora.speed_up(model)
    activate(model, list(model.peft_config), trainable=name)
    return model


def load_adapter(lm: nn.Module, path: Path, name: str) -> PeftModel:
    """Load a saved adapter under `name`, active and frozen."""
    model = PeftModel.from_pretrained(lm, path, adapter_name=name, is_trainable=False, local_files_only=True)
    lora.speed_up(model)
    activate(model, [name], trainable=None)
    return model


def activate(model: PeftModel, names: Sequence[str], trainable: str | None) -> None:
    """Let exactly these adapters act; of all parameters only those of the adapter `trainable` get a gradient."""
    model.base_model.set_adapter(list(names))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is not None and f".{trainable}." in parameter_name)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, name: str, out: Path, base_name: str) -> None:
    """Write one adapter as an ordinary peft folder that plain peft loads; `base_name` names the base model in it."""
    with replacing_folder(out) as aside:
        model.save_pretrained(aside, selected_adapters=[name], safe_serialization=True, save_embedding_layers=False)
        for file in (aside / name).iterdir():
            file.replace(aside / file.name)
        (aside / name).rmdir()
        (aside / "README.md").unlink(missing_ok=True)
        config = json.loads((aside / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base_name
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def concatenate_adapters(model: PeftModel) -> None:
    """Make the shipped adapter of the SFT and the DPO adapter, concatenated by rank: their sum, exactly."""
    model.add_weighted_adapter(
        [SFT_ADAPTER, DPO_ADAPTER], [1.0, 1.0], adapter_name=SHIPPED_ADAPTER, combination_type="cat"
    )


@torch.no_grad()
def keep_first_ranks(model: nn.Module, name: str, rank: int) -> None:
    """Let only the first ranks of an adapter act: of the shipped one, those that were the SFT adapter's."""
    for parameter_name, parameter in model.named_parameters():
        if f".lora_B.{name}." in parameter_name:
            parameter[:, rank:] = 0.0


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write base + adapter as one plain model folder in fp32, which keeps the logits to rounding."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    merged = PeftModel.from_pretrained(lm, adapter, local_files_only=True).merge_and_unload(safe_merge=True)
    with replacing_folder(out) as aside:
        merged.save_pretrained(aside, safe_serialization=True)


@torch.no_grad()
def fingerprint(lm: nn.Module) -> dict[str, list[float]]:
    """Some logits of a causal LM on fixed tokens, in its own precision, by which a loaded model is known again.

    Returns:
        `tokens` [16], and `logits` [64] after the last of them, at entries spread over the vocabulary.
    """
    vocabulary = lm.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = [(11 + 997 * number) % vocabulary for number in range(16)]
    logits_V = lm(torch.tensor([tokens], device=next(lm.parameters()).device), use_cache=False).logits[0, -1].float()
    picked = torch.linspace(0, len(logits_V) - 1, 64).long()
    return {"tokens": tokens, "logits": logits_V[picked].tolist()}


def load_plain(folder: Path) -> PreTrainedModel:
    """A model folder as anybody loads it, in fp32."""
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


def shard(model: PackedModel) -> None:
    """Share parameters, gradients and optimiser state out over the processes, layer by layer (FSDP2).

    Source: torch.distributed.fsdp.fully_shard. For full fine-tuning by torchrun; call before the optimiser is made.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layers in (module for module in model.causal_lm.modules() if isinstance(module, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    # Otherwise the outermost parameters would stay whole after a forward pass, and be taken for the sharded ones.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def save_model(model: PackedModel, out: Path) -> None:
    """Write a fully fine-tuned model as an ordinary transformers folder in fp32; all processes call, one writes."""
    state = {name: checkpoints.whole(tensor) for name, tensor in model.causal_lm.state_dict().items()}
    if processes().is_main_process:
        with replacing_folder(out) as aside:
            model.causal_lm.save_pretrained(aside, state_dict=state, safe_serialization=True)


def choose_layout(model: PackedModel, longest: int) -> str:
    """Compare packed with plain log-probs, and run the model sequence by sequence where packing is not exact.

    Args:
        model: as loaded.
        longest: tokens of the longest sequence that it will see.

    Returns:
        a sentence on what was found.

    Raises:
        InputError: neither way gives the model's own log-probs.
    """
    name = type(model.causal_lm).__name__
    # 4-bit kernels round to bf16 inside, differently for different numbers of rows.
    tolerance = PACKED_TOLERANCE["bf16" if getattr(model.causal_lm, "is_quantized", False) else model.precision]
    try:
        difference = largest_difference(model)
        reason = f"differ by {difference:.1e} nats"
    except (TypeError, ValueError) as error:
        difference, reason = math.inf, f"cannot be computed ({str(error).splitlines()[0]})"
    if beyond := _beyond_a_short_check(model, longest):
        difference, reason = math.inf, f"are not exact with {beyond}"
    if difference < tolerance:
        return f"packed and plain log-probs differ by at most {difference:.1e} nats on random tokens"
    model.packed = False
    if model.causal_lm.config._attn_implementation == PACKED:
        model.causal_lm.set_attn_implementation("sdpa")
    difference = largest_difference(model)
    if not difference < tolerance:
        raise InputError(
            f"{name} cannot be trained: its log-probs at the answers differ by {difference:.1e} nats from its own"
            " logits; choose a model with an ordinary output layer"
        )
    return f"{name} cannot be packed: its packed log-probs {reason}; it runs one sequence at a time, which is slower"


def _beyond_a_short_check(model: PackedModel, longest: int) -> str:
    """What makes packed log-probs differ on long rows only, or nothing."""
    config = model.causal_lm.config.get_text_config()
    chunked = set(getattr(config, "layer_types", None) or ()) - PACKED_LAYERS
    if chunked:
        return ", ".join(sorted(chunked))
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        original = int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        if kind.get("rope_type") in LENGTH_DEPENDENT_ROPE and longest > original:
            return f"{kind['rope_type']} positions, whose frequencies depend on the longest sequence of a row"
    return ""


@contextmanager
def plain_attention(lm: PreTrainedModel, kind: str) -> Iterator[None]:
    """Let a packed model attend by the implementation `kind` meanwhile, for plain forward passes and generation."""
    was_packed = lm.config._attn_implementation == PACKED
    if was_packed:
        lm.set_attn_implementation(kind)
    try:
        yield
    finally:
        if was_packed:
            lm.set_attn_implementation(PACKED)


@torch.no_grad()
def largest_difference(model: PackedModel) -> float:
    """Largest difference of a token's log-prob between this module and plain forward passes, on random tokens, nats."""
    lm = model.causal_lm
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.get_text_config().vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    examples = [Example(draw(9), [draw(5), draw(7)]), Example(draw(6), [draw(8), draw(3)])]
    ours = model(pack(examples).to(model.device))
    with plain_attention(lm, "eager"):
        plain = torch.cat([_plain_logps(model, p, completion) for p, both, _ in examples for completion in both])
    return float((ours - plain).abs().max())


def _plain_logps(model: PackedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    with model.autocast():
        logits_TV = model.causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logps_T: Tensor = logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return logps_T
