"""The checks of a data set: each with a name, a severity and a sentence that tells what to do.

Severity `error`: the row is quarantined. `stop`: the row is quarantined and the run fails. `warn`: the report says so.
The section `validate` of params.yaml can change a check's severity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from components.common.errors import InputError
from components.dataset.records import LANGUAGES, Instruction, Preference, Row
from components.dataset.validation import Severity
from components.validate.config import ValidateConfig

TOO_LONG = "too_long"
KINDS: dict[str, type[Row]] = {"preferences": Preference, "instructions": Instruction}
"""The data sets by folder name."""


@dataclass(frozen=True)
class Check:
    """A Great Expectations expectation on a table of numbers, one line per row or per statistic.

    Args:
        name: of the check, and reason in quarantine.jsonl.
        severity: what a failure means.
        advice: what to do.
        expectation: class of great_expectations.expectations.
        arguments: of the expectation.
    """

    name: str
    severity: Severity
    advice: str
    expectation: str
    arguments: Mapping[str, Any]


def row_checks(kind: type[Row], max_length: int) -> list[Check]:
    """The checks of rows; each looks at one column."""

    def none(name: str, severity: Severity, advice: str) -> Check:
        return Check(name, severity, advice, "ExpectColumnValuesToBeBetween", {"column": name, "max_value": 0})

    pairs = kind is Preference
    checks = [
        none("schema", "error", "give the row the fields and types of data/README.md; no text may be empty"),
        none("turns", "error", "let turns alternate and end with the user; a system message comes first"),
        none("characters", "error", "the text was decoded with the wrong encoding; take it from its source again"),
        none("language", "error", f"set lang to one of {', '.join(LANGUAGES)}"),
        none("license", "error", "say under which terms the row may be used; do not train on what nobody may use"),
        none("repeated", "error", "the row stands there before; keep one copy"),
        none("repeated_id", "error", "two rows have the same id; `dvc repro` gives ids by content"),
        none("split_leak", "stop", "the prompt, or a near-duplicate, is on two sides of the split; run `dvc repro`"),
        none("contaminated", "error", "the prompt is on the decontamination list; leave the row out of its source"),
        none("other_language", "error", "the text is in another language than `lang` says; correct one of them"),
        none("email", "warn", "an e-mail address: replace it by a placeholder unless it is meant to be public"),
        none("phone", "warn", "a telephone number: replace it by a placeholder unless it is meant to be public"),
        none("ip_address", "warn", "an address of the internet: replace it by one for documentation, 192.0.2.1"),
        none("identity_card", "error", "a Chinese identity-card number with a right checksum: take the person out"),
        none("payment_card", "error", "a payment-card number with a right checksum: replace it by a placeholder"),
        none("credential", "error", "a key or token: revoke it where it is valid, then replace it by a placeholder"),
        none("repeated_prompt", "warn", "the prompt stands there before: its rows count several times in training"),
        none("near_duplicate", "warn", "the prompt is nearly the same as another; keep one if they ask the same"),
    ]
    if pairs:
        checks += [
            none("same_answer", "error", "chosen and rejected say the same; the pair teaches nothing"),
            none("same_tokens", "error", "chosen and rejected are the same to the model's tokenizer; check model.base"),
            none("truncated_answer", "error", "one answer is the other, cut off; take it from its source again"),
            none("contradiction", "error", "another pair prefers the other answer; decide which is better, keep one"),
        ]
    longest = {"column": "n_tokens", "max_value": max_length}
    advice = "raise model.max_length to use it; nothing is ever cut"
    return [*checks, Check(TOO_LONG, "error", advice, "ExpectColumnValuesToBeBetween", longest)]


def statistic_checks() -> list[Check]:
    """The checks of a data set as a whole; each looks at the lines with its name in a table of values and limits."""
    within = {"column_A": "limit", "column_B": "value", "or_equal": True}
    expectation = "ExpectColumnPairValuesAToBeGreaterThanB"
    return [
        Check(
            "length_shortcut",
            "warn",
            "length alone tells the chosen answer: the model would learn to write longer or shorter; balance the pairs,"
            " or use a length-normalised dpo.loss_type (sigmoid_norm, simpo)",
            expectation,
            within,
        ),
        Check(
            "refusal_shortcut",
            "warn",
            "refusals and AI disclaimers alone tell the chosen answer: the model would learn when to refuse, not what"
            " is better; look at those pairs",
            expectation,
            within,
        ),
        Check(
            "drift",
            "warn",
            "the data is distributed otherwise than in the version before; if that was not meant, see `kubealign data"
            " diff`",
            expectation,
            within,
        ),
    ]


def with_severities(checks: list[Check], config: ValidateConfig) -> list[Check]:
    """The checks as severe as the configuration wants them.

    Raises:
        InputError: the configuration names a check that does not exist.
    """
    known = {check.name for kind in KINDS.values() for check in row_checks(kind, 1)}
    known |= {check.name for check in statistic_checks()}
    for name in config.severity:
        if name not in known:
            raise InputError(f"validate.severity: {name} is no check; expected one of {', '.join(sorted(known))}")
    return [replace(check, severity=config.severity.get(check.name, check.severity)) for check in checks]
