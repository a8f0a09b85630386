"""The section `model`: the base model, and how it is executed and fine-tuned."""

from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from components.config.section import Section

BF16 = "+bf16"
"""Suffix of hardware with native bf16."""


class ModelSource(Section):
    """Base model and chat template, as names that `resolve` resolves."""

    base: str = Field(
        default="embedded",
        min_length=1,
        description="`embedded` (SmolLM2-135M-Instruct, built by `dvc repro`), a local folder, s3://bucket/prefix,"
        " models:/name/version or models:/name@alias, or a hub id (needs allow_network and revision)",
    )
    revision: str = Field(
        default="",
        pattern=r"^([0-9a-f]{40})?$",
        description="commit of a hub id, 40 hexadecimal digits; empty otherwise",
    )
    chat_template: str = Field(
        default="model",
        min_length=1,
        description="`model` (the model's own chat template), `chatml`, `llama2`, or a Jinja file of the project,"
        " whose text `kubealign` hands to the steps",
    )
    template_date: date = Field(
        default=date(2024, 7, 26),
        description="the day that the chat template renders where it would render today (Llama 3, gpt-oss, Granite); as"
        " shipped the one that Llama 3.1's template has by itself",
    )
    allow_network: bool = Field(
        default=False, description="whether to allow downloading a hub id; nothing else uses the network"
    )


class ExecutionConfig(Section):
    """How a model is executed and fine-tuned: the part of the section `model` that the training steps read."""

    max_length: int = Field(
        default=768, ge=16, description="most tokens of prompt and answer; longer examples are dropped, never truncated"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16: frozen bf16 base, fp32 LoRA and residual stream, matrix products in bf16 if `hardware` has"
        " it, else in fp32; fp32: everything in fp32; auto: bf16 if `hardware` has it, else fp32",
    )
    hardware: Literal["auto", "cpu", "cpu+bf16", "gpu", "gpu+bf16"] = Field(
        default="auto",
        description="hardware of the run; +bf16: with native bf16 matrix products (GPUs since Ampere, CPUs with"
        " AVX512-BF16 or AMX). auto: this machine, or on Kubeflow gpu+bf16 if cluster.train.gpus is above 0, else"
        " cpu. A step fails on a machine that would compute different weights",
    )
    lm_head_precision: Literal["same", "fp32"] = Field(
        default="same",
        description="precision of the LM head: same as `precision`, or fp32, which is more exact and slower",
    )
    finetuning: Literal["lora", "full"] = Field(
        default="lora",
        description="lora: adapters on a frozen base; full: every parameter is trained in fp32, at about 16 bytes each",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: the frozen base in 4 bits (QLoRA); needs bitsandbytes, and saves memory, not time",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, about a third more time",
    )

    def execution_settings(self) -> dict[str, Any]:
        """These fields as plain values, without those of `ModelSource`."""
        return self.model_dump(mode="json", include=set(ExecutionConfig.model_fields))

    def resolved(self, machine: str) -> Self:
        """The section with `precision` and `hardware` resolved; in fp32 the hardware's bf16 support does not matter.

        Args:
            machine: the hardware that `auto` means.
        """
        hardware = machine if self.hardware == "auto" else self.hardware
        native = "bf16" if hardware.endswith(BF16) else "fp32"
        precision = native if self.precision == "auto" else self.precision
        hardware = hardware if precision == "bf16" else hardware.removesuffix(BF16)
        return self.model_copy(update={"precision": precision, "hardware": hardware})

    @field_validator("precision", "lm_head_precision", mode="before")
    @classmethod
    def _no_fp16(cls, precision: Any) -> Any:
        if precision in ("fp16", "float16", "half"):
            raise ValueError(
                "fp16 overflows: activations of LLaMA-2 models exceed 65504 and become NaN (seen with Chinese LLaMA-2);"
                " use bf16 or fp32"
            )
        return precision

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> Self:
        if self.finetuning == "full" and self.quantization != "none":
            raise ValueError("4-bit weights cannot be trained; set model.finetuning=lora or model.quantization=none")
        return self


class ModelConfig(ExecutionConfig, ModelSource):
    """The base model, and how it is executed and fine-tuned."""
