"""The checks of a data set, each with a name, a severity and advice on what to do.

Severity `error`: the row is quarantined. `stop`: the row is quarantined and the run fails. `warn`: the report lists the
row. `validate.severity` in params.yaml can change a check's severity.
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
    """A Great Expectations expectation on a numeric table with one line per row or per statistic.

    Args:
        name: name of the check, and the reason in quarantine.jsonl.
        severity: consequence of a failure.
        advice: what to do about a failure.
        expectation: name of a class in great_expectations.expectations.
        arguments: its keyword arguments.
    """

    name: str
    severity: Severity
    advice: str
    expectation: str
    arguments: Mapping[str, Any]


def row_checks(kind: type[Row], max_length: int) -> list[Check]:
    """The row-level checks; each reads one column."""

    def none(name: str, severity: Severity, advice: str) -> Check:
        return Check(name, severity, advice, "ExpectColumnValuesToBeBetween", {"column": name, "max_value": 0})

    pairs = kind is Preference
    checks = [
        none("schema", "error", "give the row the fields and types of data/README.md; no text may be empty"),
        none("turns", "error", "make the turns alternate and end with the user; a system message comes first"),
        none(
            "characters",
            "error",
            "control characters, or text decoded with the wrong encoding; extract it from its source again",
        ),
        none(
            "template_text",
            "error",
            "a text has the markers of a chat template in it, which the model would learn as text: store messages, not"
            " what a template made of them",
        ),
        none(
            "special_tokens",
            "warn",
            "a text has the name of a special token of the tokenizer in it; it is encoded as text and has no effect",
        ),
        none("placeholder", "error", "a text such as `nan` or `null` stands where one is missing: remove the row"),
        none("language", "error", f"set lang to one of {', '.join(LANGUAGES)}"),
        none("license", "error", "state the licence of the row; do not train on data without one"),
        none("repeated", "error", "duplicate of an earlier row; keep one"),
        none("repeated_id", "error", "an earlier row has the same id; `dvc repro` derives ids from content"),
        none(
            "split_leak",
            "stop",
            "the prompt, or a near-duplicate of it, is in two splits; run `dvc repro`, with prepare.near_duplicate not"
            " above validate.near_duplicate",
        ),
        none("contaminated", "error", "the prompt is on the decontamination list; remove the row from its source"),
        none("other_language", "error", "the text is not in the language that `lang` names; correct one of them"),
        none("email", "warn", "an e-mail address: replace it with a placeholder unless it is meant to be public"),
        none("phone", "warn", "a telephone number: replace it with a placeholder unless it is meant to be public"),
        none("ip_address", "warn", "a public IP address: replace it with a documentation address such as 192.0.2.1"),
        none(
            "identity_card", "error", "a Chinese identity-card number with a valid checksum: remove the person's data"
        ),
        none("payment_card", "error", "a payment-card number with a valid checksum: replace it with a placeholder"),
        none("credential", "error", "a key or token: revoke it where it is valid, then replace it with a placeholder"),
        none("repeated_prompt", "warn", "an earlier row has the same prompt: it counts several times in training"),
        none(
            "near_duplicate", "warn", "the prompt is nearly the same as an earlier one; keep one if they ask the same"
        ),
    ]
    if pairs:
        checks += [
            none("same_answer", "error", "chosen and rejected are the same text; the pair teaches nothing"),
            none(
                "same_tokens",
                "error",
                "chosen and rejected are the same tokens to the model's tokenizer; check model.base",
            ),
            none("truncated_answer", "error", "one answer is the other, truncated; extract it from its source again"),
            none("contradiction", "error", "another pair prefers the other answer; decide which is better, keep one"),
        ]
    longest = {"column": "n_tokens", "max_value": max_length}
    advice = "raise model.max_length to use the row; nothing is ever truncated"
    return [*checks, Check(TOO_LONG, "error", advice, "ExpectColumnValuesToBeBetween", longest)]


def statistic_checks() -> list[Check]:
    """The data-set-level checks; each reads the lines with its name in a table of values and limits."""
    within = {"column_A": "limit", "column_B": "value", "or_equal": True}
    expectation = "ExpectColumnPairValuesAToBeGreaterThanB"
    return [
        Check(
            "length_shortcut",
            "warn",
            "length alone predicts the chosen answer: the model would learn to write longer or shorter; balance the"
            " pairs, or use a length-normalised dpo.loss_type (sigmoid_norm, simpo)",
            expectation,
            within,
        ),
        Check(
            "refusal_shortcut",
            "warn",
            "refusals and AI disclaimers alone predict the chosen answer: the model would learn when to refuse, not"
            " what is better; inspect those pairs",
            expectation,
            within,
        ),
        Check(
            "format_shortcut",
            "warn",
            "a format alone (an opening tag such as <think>, lists, headings, code, bold type) tells the chosen answer:"
            " the model would learn the format; give both answers the same, or mix the pairs",
            expectation,
            within,
        ),
        Check(
            "drift",
            "warn",
            "the data's distribution differs from the previous version's; if that was not intended, see `kubealign data"
            " diff`",
            expectation,
            within,
        ),
    ]


def with_severities(checks: list[Check], config: ValidateConfig) -> list[Check]:
    """The checks with the severities that the configuration sets.

    Raises:
        InputError: the configuration names an unknown check.
    """
    known = {check.name for kind in KINDS.values() for check in row_checks(kind, 1)}
    known |= {check.name for check in statistic_checks()}
    for name in config.severity:
        if name not in known:
            raise InputError(f"validate.severity: {name} is not a check; expected one of {', '.join(sorted(known))}")
    return [replace(check, severity=config.severity.get(check.name, check.severity)) for check in checks]
