"""The section `prepare`."""

from typing import Self

from pydantic import Field, model_validator

from components.config.section import Probability, Section


class SplitConfig(Section):
    """Shares of the prompt groups; they add up to 1."""

    train: Probability = Field(default=0.45, description="share that trains")
    validation: Probability = Field(default=0.15, description="share that fits scales and watches training")
    test: Probability = Field(default=0.40, description="share that judges; a verdict needs pairs")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"the shares add up to {self.train + self.validation + self.test:g}; expected 1")
        return self


class PrepareConfig(Section):
    """How `dvc repro` makes the canonical data."""

    preferences: list[str] = Field(
        default=["dpo_en_demo", "dpo_zh_demo"],
        description="packaged preference sources of data/sources.lock; what `kubealign data add` brought in is always"
        " used",
    )
    instructions: list[str] = Field(
        default=[],
        description="further instruction sources for SFT; the chosen answers of the pairs are always in."
        " alpaca_en_demo and alpaca_zh_demo forbid commercial use (CC BY-NC 4.0)",
    )
    split: SplitConfig = SplitConfig()
    near_duplicate: Probability = Field(
        default=0.8, description="Jaccard similarity of shingles from which prompts are one group"
    )
