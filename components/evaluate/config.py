"""The section `evaluate`."""

from pydantic import Field

from components.config.section import Section


class EvaluateConfig(Section):
    """Settings of the evaluation on held-out pairs."""

    bootstrap_resamples: int = Field(
        default=10000, ge=1000, description="resamples of the prompt groups for every interval and test"
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="confidence level of the intervals, 0.95 for 95 %"
    )
    seed: int = Field(default=3, ge=0, description="random seed of the bootstrap and of the sampled answers")
    generations_per_language: int = Field(
        default=6, ge=0, description="held-out prompts per language that every model answers; 0 for none"
    )
    max_new_tokens: int = Field(default=96, ge=1, description="most tokens of each of these answers")
