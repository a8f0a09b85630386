"""The section `register`."""

from typing import Literal

from pydantic import Field

from components.config.section import Section


class RegisterConfig(Section):
    """The name in the MLflow registry, and what is stored there."""

    name: str = Field(default="kubealign", pattern=r"^[^/:@\s]+$", description="registered model")
    promote: bool = Field(default=True, description="whether a passed gate makes the model the champion")
    format: Literal["merged", "adapter"] = Field(
        default="merged",
        description="merged: whole weights in fp32; adapter: the LoRA adapter, and the base model by reference and"
        " hash",
    )
