"""The section `prepare`."""

from typing import Self

from pydantic import Field, model_validator

from components.config.section import Probability, Section


class SplitConfig(Section):
    """Shares of the prompt groups; they add up to 1."""

    train: Probability = Field(default=0.45, description="share of the training split")
    validation: Probability = Field(
        default=0.15, description="share of the validation split, which fits scales and monitors training"
    )
    test: Probability = Field(
        default=0.40, description="share of the test split, on which the gate decides; a verdict needs pairs"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"the shares add up to {self.train + self.validation + self.test:g}; expected 1")
        return self


class PrepareConfig(Section):
    """How `dvc repro` prepares the canonical data."""

    preferences: list[str] = Field(
        default=["dpo_en_demo", "dpo_zh_demo"],
        description="packaged preference sources of data/sources.lock; sources added by `kubealign data add` are always"
        " used",
    )
    instructions: list[str] = Field(
        default=[],
        description="additional instruction sources for SFT; the chosen answers of the pairs are always used."
        " alpaca_en_demo and alpaca_zh_demo forbid commercial use (CC BY-NC 4.0)",
    )
    split: SplitConfig = SplitConfig()
    near_duplicate: Probability = Field(
        default=0.8, description="Jaccard similarity of shingles from which prompts belong to one group"
    )
