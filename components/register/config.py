"""The section `register`."""

from typing import Annotated, Literal

from pydantic import Field

from components.config.section import Section


class RegisterConfig(Section):
    """The registered model in MLflow, and the format of its versions."""

    name: str = Field(default="kubealign", pattern=r"^[^/:@\s]+$", description="name of the registered model")
    promote: bool = Field(default=True, description="whether a passed gate makes the model the champion")
    public_keys: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$")]] = Field(
        default=[],
        description="the keys whose signatures on versions, histories and results are trusted, as `kubealign keys`"
        " prints them; empty: that of this machine (on Kubeflow: that of cluster.signing_secret)",
    )
    format: Literal["merged", "adapter"] = Field(
        default="merged",
        description="merged: full weights in fp32; adapter: the LoRA adapter, and the base model by reference and hash",
    )
