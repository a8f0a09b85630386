"""What evaluate finds: the shape of evaluation.json, which the gate, register and the report read.

Losses, rewards and divergences are in nats. Every estimate carries its interval at `confidence`, from the same seeded
resamples of prompt groups, so that two estimates of one evaluation are paired. `reference` of a model is what it was
trained from and held to: the base for SFT, its own SFT model for a policy.
"""

from typing import Any, TypedDict


class Estimate(TypedDict):
    """A mean over `n` pairs, answers or prompts, with its interval."""

    value: float
    low: float
    high: float
    n: int


Metrics = dict[str, Estimate]


class Generation(TypedDict):
    """What a model writes on the fixed prompts; see answers.py for the measures.

    `greedy` and `sampled` hold tokens, repetition, language_match, refusal, empty and unfinished, the last four as
    shares of the answers.
    """

    prompts: int
    greedy: Metrics
    sampled: Metrics
    length_ratio: Estimate | None
    """Tokens of the greedy answers over those of the SFT model, a ratio of sums; None for the base."""
    kl: Estimate | None
    """KL(model || reference) on the model's own samples, nats per answer; None for the base."""


class ModelResults(TypedDict):
    """One of `base`, `sft`, `policy`, `incumbent` on the test pairs.

    A set of metrics holds preference_log_loss, reward_accuracy, reward_margin, chosen_reward, rejected_reward (all
    against the common base), raw_accuracy and raw_accuracy_per_token (rankings by log-prob), bits_per_byte (of the
    chosen answers), brier, and where there is a reference chosen_logp_change and divergence (per answer, on the
    held-out answers).
    """

    scale: float
    """What fits the validation pairs; Brier score and reliability take it, the log-loss half of it."""
    overall: Metrics
    languages: dict[str, Metrics]
    sources: dict[str, Metrics]
    lengths: dict[str, Metrics]
    own: Metrics | None
    """With its own beta against its own reference, as its training loss defines rewards (per token for some): loss,
    reward_accuracy, reward_margin, chosen_reward, rejected_reward, brier; None for a model without beta, and for an
    incumbent whose reference is not known."""
    auc: Estimate
    reliability: dict[str, list[dict[str, float]]]
    """Bins of the reliability plot (predicted, observed, low, high, n) with the `fitted` scale, and where there is a
    beta with the `own` one."""
    generation: Generation | None
    """None when evaluate.answers is 0."""


class McNemar(TypedDict):
    """McNemar's exact test on reward accuracy, two-sided; ties of the reward belong to neither count."""

    policy_only: int
    rival_only: int
    p_value: float


class Comparison(TypedDict):
    """The policy against a rival, `sft` or `incumbent`, on the same pairs."""

    improvement: Estimate
    """Mean preference log-loss of the rival minus the policy's: the primary difference."""
    threshold: float
    p_value: float
    """One-sided, of "the improvement is at most `threshold`": a share of resamples, at least 1 / (bootstrap + 1); the
    larger of the percentile's and the bootstrap-t's."""
    distribution: list[float]
    """Quantiles 0.001, 0.002 … 0.999 of the resampled improvement."""
    regression_p: dict[str, float]
    """Per language, one-sided, of "the policy is worse by at most gate.max_language_regression"."""
    by_language: Metrics
    by_source: Metrics
    by_length: Metrics
    accuracy: Estimate
    """Reward accuracy of the policy minus the rival's."""
    mcnemar: McNemar
    words: str


class Finding(TypedDict):
    """A known pathology of DPO that the curves show; see diagnosis.py."""

    name: str
    severity: str
    """`warning` or `problem`."""
    evidence: str
    advice: str


class Results(TypedDict):
    """evaluation.json."""

    pairs: dict[str, int]
    """Number of pairs by side, `validation` and `test`."""
    groups: dict[str, int]
    """Number of prompt groups by side; the test's are what is resampled."""
    confidence: float
    bootstrap: int
    seed: int
    beta: float
    loss: str
    """The policy's training loss, such as `sigmoid`."""
    models: dict[str, ModelResults]
    comparisons: dict[str, Comparison]
    own: Metrics
    """models.policy.own."""
    roc: dict[str, list[float]]
    """Of the policy's margin: fpr, tpr, threshold."""
    findings: list[Finding]
    held_out: list[dict[str, Any]]
    """Per test pair: id, group, lang, source, length (tokens of the longer answer), margins of every model."""
    answers: list[dict[str, Any]]
    policy_digest: str
    facts: dict[str, str]
