"""The section `sft`."""

from typing import Literal

from pydantic import Field

from components.training.config import OptimiserConfig


class SftConfig(OptimiserConfig):
    """Supervised fine-tuning on instructions."""

    loss_on: Literal["last", "every"] = Field(
        default="last", description="assistant turns of a conversation that are trained: the last one, or every one"
    )
    reference_logps: bool = Field(
        default=True,
        description="whether sft also computes the reference log-probs that dpo needs, which travel with the SFT model",
    )
