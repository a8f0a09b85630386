"""Models for the engine: load, adapters, the packed forward, the check at load, save and merge.

The policy is base + SFT adapter + DPO adapter; its reference is the same without the DPO adapter (DESIGN, decision 5).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.common.errors import InputError
from components.common.files import replacing_folder
from components.training.attention import PACKED
from components.training.head import token_logps
from components.training.packing import Example, Pack, pack

Precision = Literal["bf16", "fp32"]
SFT_ADAPTER, DPO_ADAPTER, SHIPPED_ADAPTER = "sft", "dpo", "policy"
PACKED_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.5}
"""Largest difference, in nats, between packed and plain log-probs of a token."""


class PackedModel(nn.Module):
    """A causal LM whose forward takes a pack and gives token log-probabilities.

    Wrap this module, not the LM inside it, for several processes: nothing outside reads the head's weight.
    """

    def __init__(self, lm: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.lm = lm
        self.precision = precision

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

    def forward(self, batch: Pack) -> Tensor:
        """Log-probability of each completion token, fp32 [N], nats."""
        model = self.causal_lm
        with self.autocast():
            output = model.base_model(
                input_ids=batch.input_ids_T[None],
                position_ids=batch.positions_T[None],
                segments=batch.segments,
                use_cache=False,
            )
            hidden_NE = output.last_hidden_state[0].index_select(0, batch.predictor_N)
            softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            return token_logps(hidden_NE, batch.target_N, model.get_output_embeddings(), softcap)


def load_causal_lm(path: Path, precision: Precision) -> PreTrainedModel:
    """Load the safetensors weights of a local folder, ready for packed rows and with all parameters frozen.

    `bf16` keeps weights in bfloat16 and lifts the residual stream to fp32 at the embedding: the matrix products run
    under autocast, sums over layers do not lose bits.

    Raises:
        InputError: the folder is no causal LM in safetensors.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=PACKED,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be loaded as a causal language model in safetensors: {str(error).splitlines()[0]}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    if precision == "bf16":
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    return model


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
    activate(model, list(model.peft_config), trainable=name)
    return model


def load_adapter(lm: nn.Module, path: Path, name: str) -> PeftModel:
    """Load a saved adapter under `name`, active and frozen."""
    model = PeftModel.from_pretrained(lm, path, adapter_name=name, is_trainable=False, local_files_only=True)
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


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write base + adapter as one plain model folder in fp32, which keeps the logits to rounding."""
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    merged = PeftModel.from_pretrained(lm, adapter, local_files_only=True).merge_and_unload(safe_merge=True)
    with replacing_folder(out) as aside:
        merged.save_pretrained(aside, safe_serialization=True)


@torch.no_grad()
def check_packed(model: PackedModel) -> float:
    """Compare packed log-probs with those of plain forward passes, on random tokens.

    Returns:
        the largest difference of a token, nats.

    Raises:
        InputError: they differ, as with ALiBi, state-space or chunked-attention models, which cannot be packed.
    """
    lm = model.causal_lm
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.config.get_text_config().vocab_size

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    examples = [Example(draw(9), [draw(5), draw(7)]), Example(draw(6), [draw(8), draw(3)])]
    packed = model(pack(examples).to(model.device))
    lm.set_attn_implementation("eager")
    try:
        plain = torch.cat([_plain_logps(model, p, completion) for p, both in examples for completion in both])
    finally:
        lm.set_attn_implementation(PACKED)
    difference = float((packed - plain).abs().max())
    if not difference < PACKED_TOLERANCE[model.precision]:
        raise InputError(
            f"{type(lm).__name__} cannot be trained on packed rows: its log-probs differ by {difference:.1e} nats from"
            " a plain forward pass; choose a model with rotary or learnt positions and ordinary attention"
        )
    return difference


def _plain_logps(model: PackedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    with model.autocast():
        logits_TV = model.causal_lm(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    logps_T: Tensor = logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return logps_T
