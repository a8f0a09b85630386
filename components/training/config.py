"""Configuration shared by the sections `sft` and `dpo`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from components.config.section import NonNegative, Positive, Probability, Section

LearningRate = Annotated[Positive, Field(description="peak learning rate of AdamW")]
BatchSize = Annotated[int, Field(ge=1, description="examples or pairs per optimizer step")]
Seed = Annotated[int, Field(ge=0, description="random seed of the example order, LoRA initialization and dropout")]

ALL_LINEAR = "all-linear"
LAYER_NAME = re.compile(r"[A-Za-z_][\w.]*")


class OptimizerConfig(Section):
    """Training settings; the same fields for sft and dpo."""

    epochs: NonNegative = Field(
        default=1.0,
        description="passes over the training examples; may be a fraction. sft.epochs=0: dpo aligns the base model"
        " itself; dpo.epochs=0: the SFT model itself is judged",
    )
    max_steps: int = Field(default=0, ge=0, description="stop after this many optimizer steps; 0 for no limit")
    learning_rate: LearningRate = 2.0e-4
    batch_size: BatchSize = 8
    max_tokens_per_microbatch: int = Field(
        default=2048,
        ge=16,
        description="most tokens per forward and backward pass; an optimizer step accumulates gradients over several",
    )
    warmup_ratio: Probability = Field(default=0.1, description="share of the steps in which the learning rate warms up")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="learning rate schedule after the warm-up"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: Positive = Field(default=1.0, description="norm to which gradients are clipped")
    lora_rank: int = Field(default=16, ge=1, description="rank of the LoRA update")
    lora_alpha: Positive = Field(default=32.0, description="LoRA's scale times its rank")
    use_rslora: bool = Field(
        default=False, description="scale the LoRA update by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)"
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the LoRA update")
    lora_targets: str | list[str] = Field(
        default="all-linear", description="`all-linear`, or names of the linear layers to adapt, such as q_proj,v_proj"
    )
    seed: Seed = 1
    checkpoint_every_s: Positive = Field(default=30.0, description="seconds between checkpoints")
    eval_every_steps: int = Field(
        default=15,
        ge=0,
        description="steps between evaluations on the validation split, of which the best is kept; 0 evaluates only"
        " before and after training",
    )
    early_stopping_patience: int = Field(
        default=0,
        ge=0,
        description="evaluations without a better validation loss after which training stops; 0 for never",
    )

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _names(cls, targets: Any) -> Any:
        """Names may come as a list or, from the command line, as a text with commas; peft reads a text as a pattern."""
        if not isinstance(targets, str) or targets.strip() == ALL_LINEAR:
            return targets
        inner = targets.strip().removeprefix("[").removesuffix("]")
        return [name.strip().strip("'\"") for name in inner.split(",")]

    @field_validator("lora_targets")
    @classmethod
    def _are_names(cls, targets: str | list[str]) -> str | list[str]:
        wrong = [name for name in ([] if isinstance(targets, str) else targets) if not LAYER_NAME.fullmatch(name)]
        if wrong or not targets:
            raise ValueError(
                f"{wrong[0] if wrong else targets!r} is no layer's name; expected `{ALL_LINEAR}` or names such as"
                " q_proj,v_proj"
            )
        return targets

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.early_stopping_patience and not self.eval_every_steps:
            raise ValueError("early_stopping_patience counts evaluations; set eval_every_steps above 0")
        return self
