"""verdict.json: the gate's decision, its rules and its inputs."""

from typing import Literal

from typing_extensions import TypedDict

Outcome = Literal["pass", "fail", "not applicable"]
VerdictName = Literal["better", "not worse", "no evidence", "worse", "refused"]


class Rule(TypedDict):
    """One rule, with the value it checked and the value it expected."""

    name: str
    outcome: Outcome
    found: float | None
    expected: str
    sentence: str


class VerdictSummary(TypedDict):
    """The part of the verdict that result.json repeats."""

    passed: bool
    verdict: VerdictName
    sentence: str
    incumbent: str
    """The champion to beat as models:/name/version; empty before the first one."""
    decision_index: int
    """Number of this decision among those on the same test set, from 1."""
    alpha_for_decision: float
    """The significance level of this decision."""
    rules: list[Rule]


class Verdict(VerdictSummary):
    """verdict.json."""

    data_clean: bool
    gate: dict[str, str | bool | int | float]
    """The section `gate` of params.yaml that was applied."""
    policy_digest: str
