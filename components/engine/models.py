"""Models for the engine: load, adapters, the packed forward, the check at load, save and merge.

The policy is base + SFT adapter + DPO adapter; its reference is the same without the DPO adapter.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from components.common.cpus import available_cpus
from components.common.errors import InputError
from components.engine.cpu import threads
from components.engine.cpu.memory import configure_malloc
from components.engine.cpu.precision import compute_in_fp32
from components.engine.devices import PACKED, row_layout
from components.engine.fused import patch_norms_and_mlps
from components.engine.hardware import Precision, native_precision
from components.engine.head import token_logps
from components.engine.lora import patch_lora
from components.engine.packing import Example, Pack, pack
from components.engine.processes import processes

SFT_ADAPTER, DPO_ADAPTER = "sft", "dpo"
PACKED_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.5}
"""Largest difference, in nats, between packed and plain log-probs of a token."""
ROUNDING_FACTOR = 3.0
"""How much further packed log-probs may be from plain ones than two plain computations are from one another."""
PACKED_LAYERS = {"full_attention", "sliding_attention"}
ADAPTER_CONFIG = "adapter_config.json"
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
ALL_LINEAR = "all-linear"
SCANNED_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
SCANNED = ["out_proj", "conv1d"]
"""Layers whose weights the scan kernels of state-space models read themselves, past any adapter."""


class PackedModel(nn.Module):
    """A causal LM whose forward takes a pack and returns token log-probabilities.

    For several processes wrap this module, not the LM inside it: nothing outside reads the head's weight.

    Args:
        lm: the transformers model, with or without adapters.
        precision: `bf16` computes matrix products in bf16 under autocast where the hardware supports it; everything
            else is computed in fp32.
        head_precision: of the products with the output embedding; None for `precision`.
        packed: False runs each sequence alone through the model's plain attention: slower, for models that cannot be
            packed.
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
        """Device of the parameters."""
        return next(self.lm.parameters()).device

    def autocast(self) -> torch.autocast:
        """The autocast context of this model: bf16 matrix products for `bf16`, disabled for `fp32`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters included, without peft's wrapper."""
        inner: PreTrainedModel = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        return inner

    @property
    def decoder(self) -> nn.Module:
        """The transformers model without its output layer."""
        lm = self.causal_lm
        # Llama 4's text model names a prefix that does not exist, and transformers then returns the whole model.
        inner: nn.Module = lm.model if lm.base_model is lm else lm.base_model
        return inner

    @property
    def n_lanes(self) -> int:
        """How many packs of a step may be trained at the same time; more than one for LoRA on a CPU only.

        The gradients of full fine-tuning are too large to hold several of.
        """
        plain = self.packed and isinstance(self.lm, PeftModel) and not getattr(self.causal_lm, "is_quantized", False)
        if not plain or self.device.type != "cpu":
            return 1
        return threads.n_lanes(self, self.causal_lm.config.get_text_config().to_dict())

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
            layout=row_layout(batch.segments, self.device),
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

    `bf16` keeps frozen weights in bfloat16 and casts the residual stream to fp32 at the embedding: matrix products run
    under autocast, and sums over layers lose no bits. Without bf16 hardware the products are in fp32; those of weights
    that were shipped in bf16 equal the products of `fp32` to the bit.

    Args:
        full: all parameters train, in fp32 in either precision; otherwise all are frozen.
        quantization: `nf4` keeps the weights of the linear layers in 4 bits (QLoRA, arXiv 2305.14314).

    Raises:
        InputError: the folder is not a causal LM in safetensors with exactly the tensors of its architecture, or
            bitsandbytes is missing.
    """
    configure_malloc()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    if (path / ADAPTER_CONFIG).exists():
        raise InputError(f"{path}: {ADAPTER_CONFIG} beside the model's weights, which transformers would add to them")
    low, computes_low = precision == "bf16" and not full, precision == native_precision() == "bf16"
    dtype = torch.bfloat16 if low else torch.float32
    options: dict[str, Any] = {"device_map": {"": processes().device}} if torch.cuda.is_available() else {}
    if quantization == "nf4":
        options["quantization_config"] = nf4_config(torch.bfloat16 if computes_low else torch.float32)
    if _takes_attention(path):
        options["attn_implementation"] = PACKED
    try:
        model: PreTrainedModel
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a wrong config.json makes the classes of a model raise whatever Python has
        raise InputError(
            f"{path}: cannot be loaded as a causal language model in safetensors: {first_line(error)}"
        ) from error
    check_tensors(loaded, str(path))
    model.requires_grad_(full)
    model.eval()
    for module in model.modules():
        # Otherwise bitsandbytes repacks 4-bit weights on a CPU in eval mode, for kernels without a gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if low:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
        if not computes_low:
            _compute_in_fp32(model)
    patch_norms_and_mlps(model)
    if computes_low:
        _round_norms(model)
    return model


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line, with its kind if that is all there is."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


JITTERS = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}
"""Attributes of layers with experts (Mixtral, MiniMax, PhiMoE, DBRX) that hold the size of a noise in training."""


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout of a model, that of its frozen adapters included, and what routers draw in training.

    DPO compares the policy with a reference that has none: noise on one side alone would be taken for a reward. Source:
    arXiv 2305.18290, whose code does the same.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        own = getattr(module, "config", None)  # which Falcon's and GPT-J's layers read in every pass
        for owner in (module, own) if isinstance(own, PreTrainedConfig) else (module,):
            for name, value in vars(owner).items():
                if isinstance(value, float) and "drop" in name:
                    setattr(owner, name, 0.0)
        for name in JITTERS & vars(module).keys():
            setattr(module, name, 0.0)
        if "router_jitter_noise" in vars(module):  # PhiMoE's routers draw experts; in evaluation they take the best
            module.eval()
            module.train = lambda mode=True, kept=module: kept  # type: ignore[method-assign,misc]


def check_tensors(loaded: Mapping[str, Any], path: str) -> None:
    """Check that a model has every tensor of its architecture and no other; heads that are tied need none of their own.

    transformers would initialise a missing one at random, differently in every process, and say so in a warning.

    Args:
        loaded: the loading information of transformers.
        path: the model's folder, for the message.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape.
    """
    problems = {
        name: sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in loaded.get(f"{name}_keys") or ())
        for name in ("missing", "unexpected", "mismatched")
    }
    for problem, tensors in problems.items():
        if tensors:
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise InputError(
                f"{path}: {problem} tensor {tensors[0]}{more}; expected exactly the tensors of its architecture: the"
                " model is damaged, or its config.json belongs to another one"
            )


@torch.no_grad()
def _compute_in_fp32(model: PreTrainedModel) -> None:
    """Keep the large weights in bf16 and compute in fp32; a model that cannot do both goes to fp32 altogether."""
    compute_in_fp32(model)
    try:
        with plain_attention(model, "eager"):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except RuntimeError:
        # Mamba's layers read weights of other layers directly, and would multiply different dtypes.
        model.float()


def _takes_attention(path: Path) -> bool:
    """Whether the model's attention goes through transformers' AttentionInterface."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, OSError, ValueError):
        return True
    return bool(getattr(kind, "_supports_attention_backend", False))


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
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
    """Make the norms of decoder layers return bf16: cast once, instead of in every product that reads them."""
    for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for norm in (child for layer in layers for child in layer.children() if "Norm" in type(child).__name__):
            norm.rounds = True  # type: ignore[assignment]
            norm.register_forward_hook(lambda module, inputs, output: output.bfloat16())


def add_lora(
    lm: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    seed: int,
    rslora: bool = False,
) -> PeftModel:
    """Add a LoRA adapter (fp32, trainable, initially zero) to those that the model already has.

    Afterwards all adapters are active, and only the new one trains. Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv
    2312.03732.

    Raises:
        InputError: peft cannot adapt these layers of this model, or they are embeddings or the output layer.
    """
    torch.manual_seed(seed)
    inner: Any = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    ends = {
        module_name: module
        for module_name, module in inner.named_modules()
        if module in (inner.get_output_embeddings(), inner.get_input_embeddings())
    }
    for module_name in ends:
        if isinstance(targets, list) and module_name.rpartition(".")[2] in {t.rpartition(".")[2] for t in targets}:
            raise InputError(
                f"lora_targets={','.join(targets)}: {module_name} is an embedding or the output layer, whose adapter"
                " would not be trained; name linear layers of the decoder, or train all of the model"
                " (model.finetuning=full)"
            )
    excluded = _not_adaptable(inner) if targets == ALL_LINEAR else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        exclude_modules=excluded or None,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        bias="none",
    )
    try:
        if isinstance(lm, PeftModel):
            lm.add_adapter(name, config)
            model = lm
        else:
            model = get_peft_model(lm, config, adapter_name=name)
    except Exception as error:  # peft raises whatever the layer's own class does
        wanted = targets if isinstance(targets, str) else ",".join(targets)
        raise InputError(
            f"lora_targets={wanted}, lora_dropout={dropout:g}: peft cannot adapt {type(inner).__name__} so:"
            f" {first_line(error)}"
        ) from error
    patch_lora(model)
    activate(model, list(model.peft_config), trainable=name)
    return model


def _not_adaptable(lm: PreTrainedModel) -> list[str]:
    """Names of the linear layers that peft counts among all of them and that no adapter can be put on.

    The scan of state-space models reads some weights itself, and the routers of Llama 4 return more than a product.
    """
    names = set(SCANNED if lm.config.model_type in SCANNED_MODELS else ())
    for name, module in lm.named_modules():
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if own and not type(module).__module__.startswith("bitsandbytes") and not _gives_product(module):
            names.add(name.rpartition(".")[2])
    return sorted(names)


@torch.no_grad()
def _gives_product(layer: nn.Linear) -> bool:
    """Whether a linear layer with a forward pass of its own, such as Falcon's, returns its product and no more."""
    ones = torch.ones(2, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        found = layer(ones)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.allclose(found, nn.functional.linear(ones, layer.weight, layer.bias))


def load_adapter(lm: nn.Module, path: Path, name: str) -> PeftModel:
    """Load a saved adapter under `name`, active and frozen."""
    model = PeftModel.from_pretrained(lm, path, adapter_name=name, is_trainable=False, local_files_only=True)
    patch_lora(model)
    activate(model, [name], trainable=None)
    return model


def adapted_share(model: nn.Module) -> float:
    """Share of a model's weights that adapters change."""
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)
    adapted = {}
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        adapted[id(weight)] = weight.numel()
    return float(sum(adapted.values()) / total)


def activate(model: PeftModel, names: Sequence[str], trainable: str | None) -> None:
    """Activate exactly these adapters; only parameters of the adapter `trainable` require a gradient."""
    model.base_model.set_adapter(list(names))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable is not None and f".{trainable}." in parameter_name)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shard(model: PackedModel) -> None:
    """Shard parameters, gradients and optimiser state over the processes, layer by layer (FSDP2).

    For full fine-tuning under torchrun; call before creating the optimiser. Source: torch.distributed.fsdp.fully_shard.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layers in (module for module in model.causal_lm.modules() if isinstance(module, nn.ModuleList)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    # Otherwise the outermost parameters would stay gathered after a forward pass and be mistaken for the shards.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return isinstance(model, FSDPModule)


def select_packing(model: PackedModel, longest: int) -> str:
    """Compare packed with plain log-probs, and run the model one sequence at a time if packing is not exact.

    Args:
        model: as loaded.
        longest: tokens of the longest sequence in the data.

    Returns:
        a sentence with the result.

    Raises:
        InputError: neither way reproduces the model's own log-probs.
    """
    name = type(model.causal_lm).__name__
    # 4-bit kernels round to bf16 inside, differently for different numbers of rows.
    rounds = model.precision == "bf16" or getattr(model.causal_lm, "is_quantized", False)
    tolerance = PACKED_TOLERANCE["bf16" if rounds else "fp32"]
    try:
        difference = max_packing_error(model)
        if rounds and not difference < tolerance:
            difference, tolerance = _beside_rounding(model)
        reason = f"differ by {difference:.1e} nats"
    except (TypeError, ValueError) as error:
        difference, reason = math.inf, f"cannot be computed ({first_line(error)})"
    if beyond := _beyond_a_short_check(model, longest):
        difference, reason = math.inf, f"are not exact with {beyond}"
    if difference < tolerance:
        return f"packed and plain log-probs differ by at most {difference:.1e} nats on random tokens"
    model.packed = False
    if model.causal_lm.config._attn_implementation == PACKED:
        model.causal_lm.set_attn_implementation("sdpa")
    difference = max_packing_error(model)
    if not difference < tolerance:
        raise InputError(
            f"{name} cannot be trained: its log-probs at the answers differ by {difference:.1e} nats from its own"
            " logits; choose a model with an ordinary output layer"
        )
    return f"{name} cannot be packed: its packed log-probs {reason}; it runs one sequence at a time, which is slower"


def _beside_rounding(model: PackedModel) -> tuple[float, float]:
    """Mean difference of packed from plain log-probs, and how large it may be where rounding alone makes differences.

    In bf16 a model with large biases or activations, such as Qwen2.5, has log-probs of random tokens that differ by
    whole nats between two right computations. Two plain ones, with torch's attention and with the model's own, tell by
    how much; a wrong layout is off by far more.
    """
    with plain_attention(model.causal_lm, "sdpa"):
        fused = _all_plain_logps(model)
    with plain_attention(model.causal_lm, "eager"):
        eager = _all_plain_logps(model)
    rounding = float((fused - eager).abs().mean())
    return float((_packed_logps(model) - eager).abs().mean()), max(PACKED_TOLERANCE["bf16"], ROUNDING_FACTOR * rounding)


def _beyond_a_short_check(model: PackedModel, longest: int) -> str:
    """The feature that makes packed log-probs inexact on long rows only, or nothing."""
    config = model.causal_lm.config.get_text_config()
    chunked = set(getattr(config, "layer_types", None) or ()) - PACKED_LAYERS
    return ", ".join(sorted(chunked)) or _length_dependent_positions(model, longest)


def _length_dependent_positions(model: PackedModel, longest: int) -> str:
    """The positions that differ for all of a batch where one row is so long, or nothing."""
    config = model.causal_lm.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            original = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
            if longest > original:
                return f"{parameters['rope_type']} positions, whose frequencies depend on the longest sequence of a row"
    return ""


@contextmanager
def plain_attention(lm: PreTrainedModel, kind: str) -> Iterator[None]:
    """Switch a packed model to the attention implementation `kind`, for plain forward passes and generation.

    A model that refuses `kind` (torch's own attention cannot cap logits, as Gemma 2 does) gets its eager one.
    """
    was_packed = lm.config._attn_implementation == PACKED
    if was_packed:
        try:
            lm.set_attn_implementation(kind)
        except ValueError:
            lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        if was_packed:
            lm.set_attn_implementation(PACKED)


@torch.no_grad()
def max_packing_error(model: PackedModel) -> float:
    """Largest difference of a token's log-prob between packed and plain forward passes, on random tokens, nats."""
    ours = _packed_logps(model)
    with plain_attention(model.causal_lm, "eager"):
        plain = _all_plain_logps(model)
    return float((ours - plain).abs().max())


@torch.no_grad()
def batch_matters(model: PackedModel, padding: int, longest: int) -> bool:
    """Whether a prompt's answer depends on the batch: a state reads the padding or mixes rows, or the longest row
    decides the positions of all.

    Args:
        model: which generates two tokens after a padded prompt and after the same alone.
        padding: token id of the padding.
        longest: tokens of the longest prompt with its answer.
    """
    if _length_dependent_positions(model, longest):
        return True
    (prompt, completions, _), _ = _random_examples(model)
    more = [token for completion in completions for token in completion]
    rows = [[padding] * len(more) + list(prompt), [*prompt, *more]]
    mask = [[0] * len(more) + [1] * len(prompt), [1] * len(rows[1])]
    two = {"min_new_tokens": 2, "max_new_tokens": 2, "pad_token_id": padding}
    settings = GenerationConfig(**two, output_logits=True, return_dict_in_generate=True)
    rounds = model.precision == "bf16" or getattr(model.causal_lm, "is_quantized", False)
    found = []
    with plain_attention(model.causal_lm, "sdpa"), model.autocast():
        for ids, seen in ((rows, mask), ([prompt], [[1] * len(prompt)])):
            batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output: Any = model.causal_lm.generate(**batch, generation_config=settings)
            found.append(torch.stack([logits_BV[0].float().log_softmax(-1) for logits_BV in output.logits]))
    return not bool((found[0] - found[1]).abs().max() < PACKED_TOLERANCE["bf16" if rounds else "fp32"])


def _random_examples(model: PackedModel) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.causal_lm.config.get_text_config().vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    return [Example(draw(9), [draw(5), draw(7)]), Example(draw(6), [draw(8), draw(3)])]


@torch.no_grad()
def _packed_logps(model: PackedModel) -> Tensor:
    logps_N: Tensor = model(pack(_random_examples(model)).to(model.device))
    return logps_N


@torch.no_grad()
def _all_plain_logps(model: PackedModel) -> Tensor:
    examples = _random_examples(model)
    with model.autocast():
        return torch.cat([plain_logps(model.causal_lm, prompt, c) for prompt, both, _ in examples for c in both])


@torch.no_grad()
def plain_logps(lm: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probability of each token of a completion by one plain forward pass, fp32 [T] on the model's device, nats."""
    ids = torch.tensor([[*prompt, *completion]], device=next(lm.parameters()).device)
    logits_TV = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logps_T: Tensor = logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return logps_T
