"""Base class of the sections of params.yaml: immutable, no unknown keys, a default for every field.

A section is the only place that defines type, bounds, default and meaning of its fields. It lives in its stage's
folder, or here if several stages read it. `components.config.params` combines them.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A section of params.yaml: immutable, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
