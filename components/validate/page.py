"""The validation report: a self-contained page and its Markdown summary. It says where, never what was found there."""

import html

from components.dataset.distribution import MEASURES
from components.report.html import page, table_html
from components.validate.bias import ALL
from components.validate.checks import KINDS, Summary, every_check

ORDER = ("stop", "error", "warn")
SHOWN = 8
"""Places that the page names for a check; validation.json has more, quarantine.jsonl and warnings.jsonl have all."""


def html_page(summaries: Summary) -> str:
    """The report as a page.

    Args:
        summaries: what validation.json holds.
    """
    failing = _failing(summaries)
    passed = not any(check["severity"] == "stop" for _, check in failing)
    body = [f'<p class="verdict{" passed" if passed else ""}">{html.escape(_verdict(summaries))}</p>']
    body.append("<h2>What to do</h2>")
    body.append(_failing_list(failing) if failing else "<p>Nothing: no check fails.</p>")
    for name in KINDS:
        body.append(f"<h2>Rows: {name}</h2><p>{html.escape(_sentence(summaries[name]))}</p>")
        body.append(_splits_table(summaries[name]))
    body += [_bias_section(summaries), _drift_section(summaries), _checks_section(summaries)]
    return page("Data validation", "".join(body))


def markdown_page(summaries: Summary) -> str:
    """The summary as Markdown."""
    lines = ["# Data validation", "", _verdict(summaries), ""]
    for name in KINDS:
        lines += [f"**{name}**: {_sentence(summaries[name])}", ""]
    lines += ["| data set | check | severity | failing | what to do |", "|---|---|---|---:|---|"]
    lines += [
        f"| {name} | {c['name']} | {c['severity']} | {c['failed']} | {c['advice']} |" for name, c in _failing(summaries)
    ]
    lines += ["", "| pairs | number | longer answer wins, 95 % interval | refusal is rejected |", "|---|---:|---|---|"]
    for part in summaries["preferences"]["bias"]:
        lines.append(
            f"| {_part(part)} | {part['pairs']} | {_share(part['longer_wins'])} | {_share(part['refusal_loses'])} |"
        )
    lines += ["", _drift_sentence(summaries), "", _listed_sentence(summaries), ""]
    return "\n".join(lines)


def _failing(summaries: Summary) -> list[tuple[str, Summary]]:
    """Data set and check of all that fail, the most severe first."""
    found = [(name, check) for name in KINDS for check in every_check(summaries[name]) if check["failed"]]
    return sorted(found, key=lambda entry: (ORDER.index(entry[1]["severity"]), -entry[1]["failed"]))


def _verdict(summaries: Summary) -> str:
    failing = _failing(summaries)
    stops = [check["name"] for _, check in failing if check["severity"] == "stop"]
    rows = sum(summaries[name]["rows"] for name in KINDS)
    aside = sum(summaries[name]["quarantined"] for name in KINDS)
    counts = f"{rows:,} rows = {rows - aside:,} clean + {aside:,} quarantined"
    if stops:
        return f"The run stops: {', '.join(sorted(set(stops)))}. {counts}."
    warnings = sum(check["severity"] == "warn" for _, check in failing)
    return f"{counts}; {warnings} warning{'' if warnings == 1 else 's'}."


def _failing_list(failing: list[tuple[str, Summary]]) -> str:
    """A paragraph for each check: a table of sentences would not fit a narrow window."""
    parts = []
    for name, check in failing:
        places = check["places"]
        more = len(places) > SHOWN or check["failed"] > len(places)
        where = ", ".join(places[:SHOWN]) + (" …" if more else "")
        advice = check["advice"][0].upper() + check["advice"][1:]
        parts.append(
            f"<p><b>{check['failed']:,} × {check['name']}</b> ({check['severity']}, {name}). {html.escape(advice)}."
            f'<br><span class="soft">{html.escape(where)}</span></p>'
        )
    return "".join(parts)


def _splits_table(summary: Summary) -> str:
    languages = sorted({language for counts in summary["splits"].values() for language in counts})
    counts = [[split, *(found.get(lang, 0) for lang in languages)] for split, found in summary["splits"].items()]
    return table_html(["clean rows", *languages], counts)


def _bias_section(summaries: Summary) -> str:
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
    lines = [
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
        for part in summaries["preferences"]["bias"]
    ]
    return (
        "<h2>What something trivial tells</h2><p>An answer that can be told by its length, or by opening as a refusal"
        " or an AI disclaimer, teaches just that. An accuracy of 0.5 is chance; pairs of equal length, and pairs with"
        " no or two refusals, are left out of the shares and count as chance in the accuracies.</p>"
        + table_html(head, lines)
    )


def _drift_section(summaries: Summary) -> str:
    lines = [
        [line["part"].replace("_", " "), round(line["value"], 3), line["limit"]]
        for line in summaries["preferences"]["statistics"]["lines"]
        if line["name"] == "drift"
    ]
    table = table_html(["distribution of", "share that moved", "warns above"], lines) if lines else ""
    return f"<h2>Against the version before</h2><p>{html.escape(_drift_sentence(summaries))}</p>{table}"


def _checks_section(summaries: Summary) -> str:
    lines = []
    by_name = {name: {check["name"]: check for check in summaries[name]["checks"]} for name in KINDS}
    for check in by_name["preferences"].values():
        failed = [by_name[name][check["name"]]["failed"] if check["name"] in by_name[name] else "" for name in KINDS]
        lines.append([check["name"], check["severity"], *failed])
    return (
        "<h2>All checks of rows</h2><p>error: the row is quarantined; stop: the run fails as well; warn: it is said"
        f" here. {html.escape(_listed_sentence(summaries))}</p>" + table_html(["check", "severity", *KINDS], lines)
    )


def _drift_sentence(summaries: Summary) -> str:
    if not summaries["preferences"]["statistics"]["drift_known"]:
        return "Drift was not measured: the data set knows of no version before this one."
    worst = max(
        (line for line in summaries["preferences"]["statistics"]["lines"] if line["name"] == "drift"),
        key=lambda x: x["value"],
    )
    return (
        f"Compared were {', '.join(measure.replace('_', ' ') for measure in MEASURES)}; most moved"
        f" {worst['part'].replace('_', ' ')}: {worst['value']:.1%} of the pairs would have to change places."
    )


def _listed_sentence(summaries: Summary) -> str:
    listed = summaries["preferences"]["statistics"]["listed_prompts"]
    if listed is None:
        return "Decontamination was not run: the data set has no list of prompts (validate.decontaminate)."
    return f"The decontamination list has {listed:,} prompts."


def _sentence(summary: Summary) -> str:
    return (
        f"{summary['rows']:,} rows = {summary['clean']:,} clean + {summary['quarantined']:,} quarantined, of which"
        f" {summary['too_long']:,} are only too long."
    )


def _part(part: Summary) -> str:
    return " ".join(word for word in (part["lang"], part["source"]) if word != ALL) or ALL


def _share(share: Summary) -> str:
    return f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}] of {share['n']:,}" if share["n"] else "none"
