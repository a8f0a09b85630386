"""The section `sft`."""

from typing import Literal

from pydantic import Field

from components.training.config import OptimizerConfig


class SftConfig(OptimizerConfig):
    """Supervised fine-tuning on instructions."""

    train_on_turns: Literal["last", "all"] = Field(
        default="last", description="assistant turns of a conversation that are trained: the last one, or all"
    )
    compute_ref_log_probs: bool = Field(
        default=True,
        description="whether sft also computes the reference log-probs that dpo needs, which travel with the SFT model",
    )
