"""result.json: the decision of register and its reason, with the main numbers of the whole run.

It is logged to the parent run in MLflow, and every command that shows a finished run reads it.
"""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from components.gate.results import Comparison, Metrics
from components.gate.verdict import VerdictSummary

State = Literal["promoted", "already_champion", "gate_failed", "promotion_disabled", "rolled_back", "superseded"]


class Decision(TypedDict):
    """The outcome of promotion, and why."""

    state: State
    sentence: str


class StageSummary(TypedDict):
    """A stage's run in MLflow, and its cost."""

    run_id: str
    cached: bool
    """Whether it belongs to an earlier pipeline run."""
    seconds: float | None
    peak_memory_mib: float | None


class Result(TypedDict):
    """result.json."""

    run_id: str
    model: str
    version: str
    model_uri: str
    aliases: list[str]
    promote: bool
    verdict: VerdictSummary
    decided: Decision
    data_commit: str
    preferences_digest: str
    instructions_digest: str
    data_clean: bool
    test_set: str
    git_commit: str
    project_commit: NotRequired[str]
    """The commit of the project that `kubealign ci retrain` judged; empty for other runs, missing in older results."""
    base_reference: str
    base_digest: str
    config: str
    lineage: str
    incumbent: str
    decision: str
    decision_index: int
    metrics: dict[str, Metrics]
    """Metrics of every model on all test pairs."""
    languages: dict[str, dict[str, Metrics]]
    """Metrics of every model by language."""
    comparisons: dict[str, Comparison]
    policy_metrics: Metrics | None
    """As in evaluation.json."""
    stages: dict[str, StageSummary]
