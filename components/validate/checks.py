"""The checks of a data set: one Great Expectations suite, each check with a name, a severity and advice.

Severity `error`: the row is quarantined. Severity `drop`: the row is fine but of no use to this run (too long).
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from pydantic import ValidationError

from components.common.errors import KubealignError
from components.common.records import LANGUAGES, Instruction, Preference, Row, schema_problem

REPLACEMENT = "[\ufffd\x00]"


@dataclass(frozen=True)
class Check:
    """An expectation on a column of the table that `make_table` builds."""

    name: str
    severity: Literal["error", "drop"]
    expectation: str
    arguments: dict[str, Any]
    advice: str


def suite(kind: type[Row], max_length: int) -> list[Check]:
    """The checks for preferences or instructions."""

    def not_null(name: str, column: str, advice: str) -> Check:
        return Check(name, "error", "ExpectColumnValuesToBeNull", {"column": column}, advice)

    answers = ("chosen", "rejected") if kind is Preference else ("response",)
    checks = [
        not_null("schema", "schema_problem", "give the row the fields, types and roles of data/README.md"),
        not_null("turns", "turn_problem", "let turns alternate and end with the user; a system message comes first"),
        not_null("repeated", "repeated", "keep one copy of the row"),
        not_null("split_leak", "leak", "a prompt group stands on two sides of the split; run `dvc repro`"),
        Check(
            "language",
            "error",
            "ExpectColumnValuesToBeInSet",
            {"column": "lang", "value_set": list(LANGUAGES)},
            f"set lang to one of {', '.join(LANGUAGES)}",
        ),
    ]
    checks += [
        Check(
            f"{column}_characters",
            "error",
            "ExpectColumnValuesToNotMatchRegex",
            {"column": column, "regex": REPLACEMENT},
            "the text was decoded with the wrong encoding; take it from its source again",
        )
        for column in ("prompt_text", *answers)
    ]
    if kind is Preference:
        columns = {"column_list": ["chosen_normal", "rejected_normal"], "ignore_row_if": "any_value_is_missing"}
        checks.append(
            Check(
                "same_answer",
                "error",
                "ExpectSelectColumnValuesToBeUniqueWithinRecord",
                columns,
                "chosen and rejected say the same; the pair teaches nothing",
            )
        )
    checks.append(
        Check(
            "too_long",
            "drop",
            "ExpectColumnValuesToBeBetween",
            {"column": "n_tokens", "max_value": max_length},
            "raise model.max_length to use it; nothing is ever cut",
        )
    )
    return checks


def make_table(
    rows: list[dict[str, Any]],
    splits: list[str],
    kind: type[Row],
    n_tokens: list[int | None],
    sides: dict[str, set[str]],
) -> pd.DataFrame:
    """One line per row, in their order, with the columns that the checks look at.

    Args:
        rows: raw objects of the JSON-lines files.
        splits: the side that each row stands on.
        kind: the schema.
        n_tokens: tokens of prompt and longest answer; None where the schema does not hold.
        sides: the sides that each prompt group stands on, in any data set.
    """
    answers = ("chosen", "rejected") if kind is Preference else ("response",)
    seen: set[str] = set()
    lines = []
    for number, (row, split, tokens) in enumerate(zip(rows, splits, n_tokens, strict=True)):
        identity = str(row.get("id"))
        group_sides = sides[str(row.get("group"))]
        line: dict[str, Any] = {
            "number": number,
            "lang": str(row.get("lang")),
            "schema_problem": _schema_problem(row, kind),
            "turn_problem": _turn_problem(row.get("prompt")),
            "repeated": identity if identity in seen else None,
            "leak": ", ".join(sorted(group_sides)) if len(group_sides) > 1 and split != "test" else None,
            "prompt_text": _prompt_text(row.get("prompt")),
            "n_tokens": tokens,
        }
        for column in answers:
            line[column] = str(row.get(column))
            line[f"{column}_normal"] = normal(str(row.get(column)))
        seen.add(identity)
        lines.append(line)
    table = pd.DataFrame(lines)
    # A column without any value would be typed as numbers, which no text check takes.
    text = [column for column in table.columns if column not in ("number", "n_tokens")]
    return table.astype(dict.fromkeys(text, object))


def run_suite(table: pd.DataFrame, checks: list[Check]) -> dict[str, list[int]]:
    """The row numbers that fail each check.

    Raises:
        KubealignError: an expectation could not be evaluated; that is never the data's fault.
    """
    import great_expectations as gx
    import great_expectations.expectations as gxe

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = (
        context.data_sources.add_pandas("pandas")
        .add_dataframe_asset("rows")
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": table})
    )
    expectations = [getattr(gxe, check.expectation)(**check.arguments) for check in checks]
    result_format = {"result_format": "COMPLETE", "unexpected_index_column_names": ["number"]}
    failed: dict[str, list[int]] = {}
    for check, expectation in zip(checks, expectations, strict=True):
        result = batch.validate(expectation, result_format=result_format)
        exceptions = _exceptions(result.exception_info)
        if exceptions:
            raise KubealignError(f"check {check.name} could not be evaluated: {exceptions[0]}")
        failed[check.name] = [entry["number"] for entry in result.result.get("unexpected_index_list") or []]
    return failed


def normal(text: str) -> str:
    """Unicode NFKC with single spaces, so that differences nobody sees do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _exceptions(info: Any) -> list[str]:
    entries = [info] if "raised_exception" in info else list(info.values())
    return [str(entry["exception_message"]) for entry in entries if entry.get("raised_exception")]


def _schema_problem(row: dict[str, Any], kind: type[Row]) -> str | None:
    try:
        kind.model_validate(row)
    except ValidationError as error:
        return schema_problem(error)
    return None


def _turn_problem(prompt: Any) -> str | None:
    if not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        return None  # the schema check says so
    roles = [turn.get("role") for turn in prompt]
    expected = r"(system )?user( assistant user)*"
    return None if re.fullmatch(expected, " ".join(map(str, roles))) else " ".join(map(str, roles))


def _prompt_text(prompt: Any) -> str:
    return "\n".join(str(turn.get("content")) for turn in prompt if isinstance(turn, dict)) if prompt else ""


KINDS: dict[str, type[Row]] = {"preferences": Preference, "instructions": Instruction}
"""The data sets by folder name."""
