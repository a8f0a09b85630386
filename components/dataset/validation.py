"""validation.json: the results of validate for both data sets; it travels with the clean rows."""

from typing import Literal

from typing_extensions import TypedDict

Severity = Literal["error", "stop", "warn"]


class CheckResult(TypedDict):
    """The result of a row-level or data-set-level check."""

    name: str
    severity: Severity
    failed: int
    """Number of rows or statistics that fail the check."""
    advice: str
    places: list[str]
    """Locations of the first of them, such as `train.jsonl:17`; never their text."""


class SourceSummary(TypedDict):
    """The rows of a source."""

    license: str
    """All licences of its rows."""
    rows: int
    """Clean rows."""
    bad: int
    """Rows quarantined for more than their length."""
    total: int


class DataSetSummary(TypedDict):
    """A data set."""

    rows: int
    clean: int
    quarantined: int
    too_long: int
    """Rows quarantined only for their length."""
    splits: dict[str, dict[str, int]]
    """Clean rows of each split by language."""
    sources: dict[str, SourceSummary]
    checks: list[CheckResult]


class ShareSummary(TypedDict):
    """A share of `n` pairs with its 95 % interval."""

    share: float
    low: float
    high: float
    n: int


class BiasSummary(TypedDict):
    """How well trivial cues predict the chosen answer in a part of the pairs; see validate's bias.py."""

    lang: str
    source: str
    pairs: int
    longer_wins: ShareSummary
    length_accuracy: float
    refusal_loses: ShareSummary
    refusal_accuracy: float
    refusals_chosen: int
    refusals_rejected: int
    formats: dict[str, ShareSummary]
    """By format, the share of the pairs with exactly one answer of it in which that is the chosen one."""


class Statistic(TypedDict):
    """A statistic of all pairs or a part of them, and the limit of the check of the same name."""

    name: str
    part: str
    value: float
    limit: float
    fails: bool


class Statistics(TypedDict):
    """Data-set-level statistics of the pairs."""

    lines: list[Statistic]
    checks: list[CheckResult]
    drift_known: bool
    """Whether there is an earlier version to measure drift against."""
    listed_prompts: int | None
    """Prompts on the decontamination list; None without a list."""


class PairSummary(DataSetSummary):
    """The preference pairs."""

    bias: list[BiasSummary]
    statistics: Statistics


class ValidationSummary(TypedDict):
    """validation.json."""

    preferences: PairSummary
    instructions: DataSetSummary


def data_sets(summary: ValidationSummary) -> dict[str, DataSetSummary]:
    """Both data sets by name."""
    return {"preferences": summary["preferences"], "instructions": summary["instructions"]}


def all_checks(summary: ValidationSummary) -> dict[str, list[CheckResult]]:
    """The row-level checks of each data set, and the data-set-level checks of the pairs."""
    checks = {name: list(data_set["checks"]) for name, data_set in data_sets(summary).items()}
    checks["preferences"] += summary["preferences"]["statistics"]["checks"]
    return checks
