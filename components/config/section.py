"""What every section of params.yaml shares: it is immutable, refuses unknown keys, and has a default for every field.

A section holds type, bounds, default and meaning of its fields and is the only place that does. It stands in its
stage's folder; those that several stages read stand here. `components.config.params` puts them together.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section of params.yaml: immutable, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
