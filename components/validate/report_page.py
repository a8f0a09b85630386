"""The validation report: a self-contained page and its Markdown summary. It names lines, never their text."""

from dataclasses import dataclass

from components.dataset.distribution import MEASURES
from components.dataset.validation import (
    BiasSummary,
    CheckResult,
    DataSetSummary,
    ShareSummary,
    Statistic,
    ValidationSummary,
    all_checks,
    data_sets,
)
from components.report.html import Row, Table, render
from components.report.markdown import bold, markdown, table_row
from components.validate.bias import part_name
from components.validate.formats import FORMATS

FORMAT_NAMES = [name.replace("_", " ") for name in FORMATS]
SEVERITIES = ("stop", "error", "warn")
"""In display order."""
SHOWN = 8
"""Rows that the page lists per check; validation.json has more, quarantine.jsonl and warnings.jsonl have all."""


@dataclass(frozen=True)
class Failure:
    """A failing check."""

    count: str
    check: str
    severity: str
    data_set: str
    advice: str
    places: str


@dataclass(frozen=True)
class DataSetView:
    """Row counts of a data set."""

    name: str
    sentence: str
    splits: Table


@dataclass(frozen=True)
class ReportView:
    """The variables of the template validation.html.jinja."""

    passed: bool
    verdict: str
    failures: list[Failure]
    data_sets: list[DataSetView]
    bias: Table
    formats: Table
    drift: str
    drift_measures: Table | None
    decontamination: str
    checks: Table


def html_page(summary: ValidationSummary) -> str:
    """The report as a page."""
    failing = _failing(summary)
    view = ReportView(
        passed=not any(check["severity"] == "stop" for _, check in failing),
        verdict=_verdict(summary),
        failures=[_failure(name, check) for name, check in failing],
        data_sets=[
            DataSetView(name, _rows(data_set), _splits(data_set)) for name, data_set in data_sets(summary).items()
        ],
        bias=_bias(summary["preferences"]["bias"]),
        formats=_formats(summary["preferences"]["bias"]),
        drift=_drift(summary),
        drift_measures=_drift_measures(summary),
        decontamination=_decontamination(summary),
        checks=_checks(summary),
    )
    return render("validation.html.jinja", view)


def markdown_page(summary: ValidationSummary) -> str:
    """The summary as Markdown."""
    lines = ["# Data validation", "", markdown(_verdict(summary)), ""]
    for name, data_set in data_sets(summary).items():
        lines += [f"{bold(name)}: {markdown(_rows(data_set))}", ""]
    lines += ["| data set | check | severity | failing | what to do |", "|---|---|---|---:|---|"]
    lines += [
        table_row(name, check["name"], check["severity"], check["failed"], check["advice"])
        for name, check in _failing(summary)
    ]
    lines += ["", "| pairs | number | longer answer wins, 95 % interval | refusal is rejected |", "|---|---:|---|---|"]
    lines += [
        table_row(_part(part), part["pairs"], _share(part["longer_wins"]), _share(part["refusal_loses"]))
        for part in summary["preferences"]["bias"]
    ]
    lines += [
        "",
        table_row("pairs", *(f"{name} is chosen" for name in FORMAT_NAMES)),
        f"|---|{'---|' * len(FORMAT_NAMES)}",
    ]
    lines += [
        table_row(_part(part), *(_share(share) for share in part["formats"].values()))
        for part in summary["preferences"]["bias"]
    ]
    lines += ["", markdown(_drift(summary)), "", markdown(_decontamination(summary)), ""]
    return "\n".join(lines)


def _failing(summary: ValidationSummary) -> list[tuple[str, CheckResult]]:
    """Data set and check of every failure, most severe first."""
    failing = [(name, check) for name, checks in all_checks(summary).items() for check in checks if check["failed"]]
    return sorted(failing, key=lambda entry: (SEVERITIES.index(entry[1]["severity"]), -entry[1]["failed"]))


def _verdict(summary: ValidationSummary) -> str:
    failing = _failing(summary)
    stops = {check["name"] for _, check in failing if check["severity"] == "stop"}
    rows = sum(data_set["rows"] for data_set in data_sets(summary).values())
    quarantined = sum(data_set["quarantined"] for data_set in data_sets(summary).values())
    counts = f"{rows:,} rows = {rows - quarantined:,} clean + {quarantined:,} quarantined"
    if stops:
        return f"The run stops: {', '.join(sorted(stops))}. {counts}."
    warnings = sum(check["severity"] == "warn" for _, check in failing)
    return f"{counts}; {warnings} warning{'' if warnings == 1 else 's'}."


def _failure(name: str, check: CheckResult) -> Failure:
    places = check["places"]
    more = len(places) > SHOWN or check["failed"] > len(places)
    return Failure(
        count=f"{check['failed']:,}",
        check=check["name"],
        severity=check["severity"],
        data_set=name,
        advice=check["advice"][0].upper() + check["advice"][1:],
        places=", ".join(places[:SHOWN]) + (" …" if more else ""),
    )


def _rows(summary: DataSetSummary) -> str:
    return (
        f"{summary['rows']:,} rows = {summary['clean']:,} clean + {summary['quarantined']:,} quarantined, of which"
        f" {summary['too_long']:,} are only too long."
    )


def _splits(summary: DataSetSummary) -> Table:
    languages = sorted({language for counts in summary["splits"].values() for language in counts})
    rows: list[Row] = [
        [split, *(counts.get(language, 0) for language in languages)] for split, counts in summary["splits"].items()
    ]
    return Table(["clean rows", *languages], rows)


def _bias(parts: list[BiasSummary]) -> Table:
    head = [
        "pairs",
        "number",
        "longer answer wins (95 % interval)",
        "accuracy of length alone",
        "refusal is rejected (95 % interval)",
        "accuracy of refusals alone",
        "refusals chosen",
        "refusals rejected",
    ]
    rows: list[Row] = [
        [
            _part(part),
            part["pairs"],
            _share(part["longer_wins"]),
            round(part["length_accuracy"], 3),
            _share(part["refusal_loses"]),
            round(part["refusal_accuracy"], 3),
            part["refusals_chosen"],
            part["refusals_rejected"],
        ]
        for part in parts
    ]
    return Table(head, rows)


def _formats(parts: list[BiasSummary]) -> Table:
    rows: list[Row] = [[_part(part), *(_share(share) for share in part["formats"].values())] for part in parts]
    return Table(["pairs", *FORMAT_NAMES], rows)


def _part(part: BiasSummary) -> str:
    return part_name(part["lang"], part["source"])


def _share(share: ShareSummary) -> str:
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}] of {share['n']:,}" if share["n"] else "none"


def _drift(summary: ValidationSummary) -> str:
    measured = _drift_statistics(summary)
    if not measured:
        return "Drift was not measured: the data set does not record a previous version."
    worst = max(measured, key=lambda statistic: statistic["value"])
    return (
        f"Compared: {', '.join(measure.replace('_', ' ') for measure in MEASURES)}. The largest change is in"
        f" {worst['part'].replace('_', ' ')}: {worst['value']:.1%} of the pairs would have to move to another bin."
    )


def _drift_measures(summary: ValidationSummary) -> Table | None:
    rows: list[Row] = [
        [statistic["part"].replace("_", " "), round(statistic["value"], 3), statistic["limit"]]
        for statistic in _drift_statistics(summary)
    ]
    return Table(["distribution of", "share that moved", "warns above"], rows) if rows else None


def _drift_statistics(summary: ValidationSummary) -> list[Statistic]:
    return [statistic for statistic in summary["preferences"]["statistics"]["lines"] if statistic["name"] == "drift"]


def _decontamination(summary: ValidationSummary) -> str:
    listed = summary["preferences"]["statistics"]["listed_prompts"]
    if listed is None:
        return "Decontamination was not run: the data set has no list of prompts (validate.decontamination_file)."
    return f"The decontamination list has {listed:,} prompts."


def _checks(summary: ValidationSummary) -> Table:
    """Failing rows of each data set by check; some checks apply to pairs only."""
    failed = {check["name"]: check["failed"] for check in summary["instructions"]["checks"]}
    rows: list[Row] = [
        [check["name"], check["severity"], check["failed"], failed.get(check["name"], "")]
        for check in summary["preferences"]["checks"]
    ]
    return Table(["check", "severity", *data_sets(summary)], rows)
