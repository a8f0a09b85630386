"""The section `dpo`."""

from collections.abc import Iterable
from itertools import compress
from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.section import Positive
from components.engine.objectives import LOSSES
from components.training.config import BatchSize, LearningRate, OptimizerConfig, Seed


def _names(wanted: Iterable[bool]) -> str:
    """The losses at these positions of the table."""
    return ", ".join(compress(LOSSES, wanted))


class DpoConfig(OptimizerConfig):
    """Direct Preference Optimization against the SFT model."""

    learning_rate: LearningRate = 4.0e-4
    batch_size: BatchSize = 4
    seed: Seed = 2
    beta: Positive = Field(
        default=0.1, description="KL penalty coefficient: higher keeps the policy closer to the reference"
    )
    precompute_ref_log_probs: bool = Field(
        default=True,
        description="whether the reference log-probs are computed once and kept; false computes them in every step"
        " (slower, nothing on disk)",
    )
    loss_type: Literal[tuple(LOSSES)] = Field(  # type: ignore[valid-type]
        default="sigmoid",
        description="preference loss;"
        f" per token: {_names(loss.per_token for loss in LOSSES.values())};"
        f" without a reference: {_names(loss.reference_free for loss in LOSSES.values())}",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="assumed share of swapped labels; for"
        f" {_names('label_smoothing' in loss.options for loss in LOSSES.values())}",
    )
    simpo_gamma: float = Field(default=0.5, ge=0, description="target margin of simpo")
    orpo_lambda: float = Field(default=0.1, ge=0, description="weight of orpo's odds-ratio term (lambda in the paper)")

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing and "label_smoothing" not in LOSSES[self.loss_type].options:
            raise ValueError(f"label_smoothing means nothing to the loss {self.loss_type}; set it to 0, or use robust")
        return self
