"""evaluation.json: the metrics that evaluate computes, read by the gate, register and the report.

Losses, rewards and divergences are in nats. Every estimate carries its interval at `confidence`, from the same seeded
resamples of prompt groups, so two estimates of one evaluation are paired. A model's `reference` is the model it was
trained from and regularized towards: the base for SFT, its own SFT model for a policy. With `dpo.epochs: 0` the policy
is the SFT model itself: its reference is the base, and it has neither beta nor preference loss.
"""

from typing_extensions import TypedDict

SEAL = "evaluation.seal"
"""File beside evaluation.json: the proof that our evaluate wrote it."""


class Estimate(TypedDict):
    """A mean over `n` pairs, answers or prompts, with its interval."""

    value: float
    low: float
    high: float
    n: int


Metrics = dict[str, Estimate]


class ReliabilityBin(TypedDict):
    """One bin of a reliability plot: mean predicted probability, observed share with its interval, number of pairs."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


class RocCurve(TypedDict):
    """The ROC curve of the margin, from the strictest threshold to the loosest."""

    fpr: list[float]
    tpr: list[float]
    threshold: list[float]


class Generation(TypedDict):
    """Metrics of a model's answers to the fixed prompts; answers.py defines them.

    `greedy` and `sampled` hold tokens, repetition, language_match, refusal, empty and unfinished; the last four are
    shares of the answers.
    """

    prompts: int
    greedy: Metrics
    sampled: Metrics
    length_ratio: Estimate | None
    """Tokens of the greedy answers over those of the SFT model, a ratio of sums; None for the base and without SFT."""
    kl: Estimate | None
    """KL(model || reference) on the model's own samples, nats per answer; None for the base."""


class ModelResults(TypedDict):
    """One of `base`, `sft`, `policy`, `incumbent` on the test pairs; no `sft` where the policy is the SFT model itself.

    A set of metrics holds preference_log_loss, rewards/accuracies, rewards/margins, rewards/chosen, rewards/rejected
    (all against the common base), raw_accuracy and raw_accuracy_per_token (rankings by log-prob), bits_per_byte (of
    the chosen answers), brier, and for a model with a reference chosen_logp_change and divergence (per answer, on the
    held-out answers).
    """

    scale: float
    """Fitted to the validation pairs; the Brier score and the reliability use it, the log-loss uses half of it."""
    overall: Metrics
    languages: dict[str, Metrics]
    sources: dict[str, Metrics]
    lengths: dict[str, Metrics]
    policy_metrics: Metrics | None
    """With rewards as the model's own training defines them, by its own beta and reference (per token for some
    losses): loss, rewards/accuracies, rewards/margins, rewards/chosen, rewards/rejected, brier. None for a model
    without a beta, and for an incumbent whose reference is not known."""
    auc: Estimate
    reliability: dict[str, list[ReliabilityBin]]
    """With the `fitted` scale and, for a model with policy_metrics, `as_trained`: with its own beta and reference."""
    generation: Generation | None
    """None when evaluate.generations_per_language is 0."""


class McNemar(TypedDict):
    """McNemar's exact test on reward accuracy, two-sided; ties of the reward count for neither model."""

    policy_only: int
    rival_only: int
    p_value: float


class Comparison(TypedDict):
    """The policy against a rival on the same pairs: `incumbent`, `sft`, or `base` where the policy is the SFT model."""

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
    """Sentences that say what the evidence supports."""


class Finding(TypedDict):
    """A known pathology of DPO; see diagnosis.py."""

    name: str
    severity: str
    """`warning` or `problem`."""
    evidence: str
    advice: str


class HeldOutPair(TypedDict):
    """A test pair, with the margin of every model by its name."""

    id: str
    group: str
    lang: str
    source: str
    length: int
    """Tokens of the longer answer."""
    margins: dict[str, float]


class CalibrationPair(TypedDict):
    """A validation pair, on which the scales are fitted, with the margin of every model by its name."""

    group: str
    margins: dict[str, float]


class AnsweredPrompt(TypedDict):
    """A fixed prompt, the data's chosen answer to it, and the answers of the models by their names."""

    lang: str
    prompt: str
    chosen: str
    greedy: dict[str, str]
    sampled: dict[str, str]


class PairResults(TypedDict):
    """The part of evaluation.json that follows from the log-probs of the pairs."""

    pairs: dict[str, int]
    """Number of pairs by split, `validation` and `test`."""
    groups: dict[str, int]
    """Number of prompt groups by split; those of the test split are resampled."""
    confidence: float
    bootstrap_resamples: int
    seed: int
    beta: float | None
    loss_type: str
    """The policy's preference loss, such as `sigmoid`; empty, and `beta` None, where the policy is the SFT model."""
    models: dict[str, ModelResults]
    comparisons: dict[str, Comparison]
    roc: RocCurve
    """ROC curve of the policy's margin."""
    held_out: list[HeldOutPair]
    calibration: list[CalibrationPair]


class Judged(TypedDict):
    """What was read to judge the policy: register compares all of it with its own inputs."""

    test_set: str
    """md5 of the test side's pairs, as resolved."""
    test_sha256: str
    """Of the pairs that were scored."""
    validation_sha256: str
    base: str
    """Digest of the base model's files."""
    incumbent: str
    """models:/name/version; empty before the first champion."""
    incumbent_statement: str
    """sha256 of the incumbent's signed statement."""
    decision_index: int
    data_clean: bool
    code: str
    """Digest of the code that judged."""


class Evaluation(PairResults):
    """evaluation.json."""

    judged: Judged

    findings: list[Finding]
    answers: list[AnsweredPrompt]
    policy_digest: str
    facts: dict[str, str]
    """The lineage, for the report."""
