"""The section `model`: which base model, and how a model is run and tuned."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from components.config.section import Section

BF16 = "+bf16"
"""End of a name of hardware that multiplies in bf16."""


class ModelSource(Section):
    """Which base model and chat template; names that `resolve` turns into facts."""

    base: str = Field(
        default="embedded",
        min_length=1,
        description="`embedded` (SmolLM2-135M-Instruct, made by `dvc repro`), a local folder, s3://bucket/prefix,"
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
        description="`model` (the model's own chat template), `chatml`, `llama2`, or a Jinja file",
    )
    allow_network: bool = Field(
        default=False, description="whether a hub id may be downloaded; nothing else uses the network"
    )


class ExecutionConfig(Section):
    """How a model is run and tuned, whichever it is: what the training steps read of the section `model`."""

    max_length: int = Field(
        default=768, ge=16, description="tokens of prompt and answer; longer examples are dropped, not cut"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="bf16: frozen bf16 base, fp32 LoRA and residual stream, products in bf16 where `hardware` has it,"
        " else in fp32; fp32: everything in fp32; auto: bf16 where `hardware` has it, else fp32",
    )
    hardware: Literal["auto", "cpu", "cpu+bf16", "gpu", "gpu+bf16"] = Field(
        default="auto",
        description="what the run is for; +bf16: it multiplies in bf16 natively (GPUs since Ampere, CPUs with"
        " AVX512-BF16 or AMX). auto: this machine, or on Kubeflow gpu+bf16 when cluster.train.gpus is above 0, else"
        " cpu. A step refuses a machine that would compute other weights",
    )
    lm_head_precision: Literal["same", "fp32"] = Field(
        default="same",
        description="of the products with the output embedding: as `precision` says, or fp32, more exact and slower",
    )
    finetuning: Literal["lora", "full"] = Field(
        default="lora",
        description="lora: adapters on a frozen base; full: every parameter trains, in fp32, with about 16 bytes each",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: the frozen base in 4 bits (QLoRA); needs bitsandbytes, and saves memory, not time",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute activations again in the backward pass: less memory, about a third more time",
    )

    def execution_settings(self) -> dict[str, Any]:
        """These fields as plain values, without those of `ModelSource`."""
        return self.model_dump(mode="json", include=set(ExecutionConfig.model_fields))

    def resolved(self, machine: str) -> Self:
        """The section with `precision` and `hardware` definite; in fp32 it is all one whether there is bf16 too.

        Args:
            machine: what `hardware: auto` means.
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
                "fp16 overflows: activations of LLaMA-2 models pass 65504 and become NaN (seen with Chinese LLaMA-2);"
                " use bf16 or fp32"
            )
        return precision

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> Self:
        if self.finetuning == "full" and self.quantization != "none":
            raise ValueError("4-bit weights cannot be trained; set model.finetuning=lora or model.quantization=none")
        return self


class ModelConfig(ExecutionConfig, ModelSource):
    """The base model, and how it is run and tuned."""
