"""The section `gate`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.section import Positive, Probability, Section


class GateConfig(Section):
    """Requirements for a model to become the champion."""

    test: Literal["superiority", "non-inferiority"] = Field(
        default="superiority",
        description="superiority: better than the incumbent by more than `margin`; non-inferiority: worse by less than"
        " `margin`",
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="chance of any wrong promotion over all decisions on one test set; the k-th is tested at the level"
        " alpha / (k (k + 1))",
    )
    margin: float = Field(default=0.0, ge=0, description="margin of the test, nats of preference log-loss")
    min_pairs: int = Field(default=50, ge=1, description="held-out pairs that a promotion needs")
    max_policy_loss: Positive = Field(
        default=0.6931,
        description="nats; the DPO loss with the policy's own beta and reference must be below this; a policy that has"
        " learnt nothing is at ln 2 = 0.6931",
    )
    max_kl: Positive = Field(
        default=50.0, description="nats per answer; largest KL from the SFT model on the policy's own samples"
    )
    min_length_ratio: float = Field(
        default=0.5, ge=0, description="smallest ratio of the tokens of the policy's answers to those of the SFT model"
    )
    max_length_ratio: Positive = Field(default=2.0, description="largest such ratio")
    max_repetition_increase: Probability = Field(
        default=0.15,
        description="largest increase of repetition (share of repeated 4-grams) in greedy answers over the incumbent",
    )
    max_language_regression: float = Field(
        default=0.0,
        ge=0,
        description="nats; a language fails the gate on evidence that its log-loss is worse by more than this",
    )
    language_alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="significance level of these tests together; each language gets an equal share",
    )
    require_committed_data: bool = Field(
        default=True, description="whether a commit must record exactly the data that was used (dvc.lock)"
    )

    def threshold(self) -> float:
        """The improvement, nats, that the primary test must show the policy to exceed."""
        return self.margin if self.test == "superiority" else -self.margin

    @model_validator(mode="after")
    def _margin_is_stated(self) -> Self:
        if self.test == "non-inferiority" and self.margin == 0:
            raise ValueError("non-inferiority needs a margin above 0: how much worse is still acceptable")
        return self
