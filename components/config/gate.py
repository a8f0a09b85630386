"""The section `gate`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.section import Positive, Probability, Section


class GateConfig(Section):
    """What a model must show before it may become the champion."""

    test: Literal["superiority", "non-inferiority"] = Field(
        default="superiority",
        description="superiority: better than the incumbent by more than margin; non-inferiority: worse by less than"
        " it",
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="chance of any wrong promotion over all decisions on one test set; the k-th of them gets the level"
        " alpha / (k (k + 1))",
    )
    margin: float = Field(default=0.0, ge=0, description="of the test, nats of preference log-loss")
    min_pairs: int = Field(default=50, ge=1, description="held-out pairs below which there is no promotion")
    max_policy_loss: Positive = Field(
        default=0.6931,
        description="nats; DPO loss with the policy's own beta and reference must be below it; a policy that learnt"
        " nothing has ln 2 = 0.6931",
    )
    max_kl: Positive = Field(
        default=50.0, description="nats per answer; KL from the SFT model on the policy's own samples"
    )
    min_length_ratio: float = Field(
        default=0.5, ge=0, description="tokens of the policy's answers over those of the SFT model"
    )
    max_length_ratio: Positive = Field(default=2.0, description="the same, from above")
    max_repetition_increase: Probability = Field(
        default=0.15,
        description="by how much more the policy's greedy answers may repeat themselves than the incumbent's",
    )
    max_language_regression: float = Field(
        default=0.0,
        ge=0,
        description="nats; a language fails the gate on evidence that its log-loss is worse by more than this",
    )
    language_alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="level of those tests together; each language gets an equal share"
    )
    require_committed_data: bool = Field(
        default=True, description="whether the data must be what a commit records (dvc.lock), not edited since"
    )

    def threshold(self) -> float:
        """The improvement, nats, that the primary test must show to be exceeded."""
        return self.margin if self.test == "superiority" else -self.margin

    @model_validator(mode="after")
    def _margin_is_stated(self) -> Self:
        if self.test == "non-inferiority" and self.margin == 0:
            raise ValueError("non-inferiority needs a margin above 0: how much worse is still good enough")
        return self
