"""The section `dpo`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.section import Positive
from components.training.config import BatchSize, LearningRate, OptimiserConfig, Seed


class DpoConfig(OptimiserConfig):
    """Direct Preference Optimization against the SFT model."""

    lr: LearningRate = 4.0e-4
    batch_size: BatchSize = 4
    seed: Seed = 2
    beta: Positive = Field(default=0.1, description="strength of the pull towards the reference")
    reference: Literal["cached", "live"] = Field(
        default="cached",
        description="reference log-probs computed once and kept, or live in every step (slower, nothing on disk)",
    )
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "simpo", "orpo"] = Field(
        default="sigmoid",
        description="preference loss; ipo and sigmoid_norm work per token, simpo and orpo without a reference",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="assumed share of swapped labels; for sigmoid and robust"
    )
    simpo_gamma: float = Field(default=0.5, ge=0, description="target margin of simpo")
    orpo_weight: float = Field(default=0.1, ge=0, description="weight of orpo's odds-ratio term (lambda in the paper)")

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing means nothing to the loss {self.loss}; set it to 0, or use robust")
        return self
