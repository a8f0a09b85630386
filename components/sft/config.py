"""The section `sft`."""

from typing import Literal

from pydantic import Field

from components.config.section import NonNegative
from components.training.config import OptimizerConfig


class SftConfig(OptimizerConfig):
    """Supervised fine-tuning on instructions."""

    epochs: NonNegative = Field(
        default=1.0, description="passes over the training examples; may be a fraction; 0 aligns the base model itself"
    )
    train_on_turns: Literal["last", "all"] = Field(
        default="last", description="assistant turns of a conversation that are trained: the last one, or all"
    )
    compute_ref_log_probs: bool = Field(
        default=True,
        description="whether sft also computes the reference log-probs that dpo needs, which travel with the SFT model",
    )
