"""Check both data sets, set bad rows aside with their reasons, and stop the run when too much is bad."""

from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from components.common import tracking
from components.common.chat import encode, load_tokenizer
from components.common.config import ModelConfig, ValidateConfig
from components.common.errors import DataStop, InputError
from components.common.files import replacing_folder, write_json, write_manifest, write_text
from components.common.records import SPLITS, Message, Preference, Row, read_lines, write_lines
from components.common.report import page, table_html
from components.validate.checks import KINDS, Check, make_table, run_suite, suite

Summary = dict[str, Any]


def run_validate(
    config: ValidateConfig,
    model: ModelConfig,
    dataset: Path,
    base_model: Path,
    clean_out: Path,
    html_out: Path,
    markdown_out: Path,
) -> tuple[str, dict[str, float]]:
    """Validate a data set.

    Args:
        config: when to stop.
        model: the length limit.
        dataset: folder with preferences/ and instructions/, from fetch.
        base_model: model folder, for its tokenizer.
        clean_out: gets the good rows, quarantine.jsonl, dropped.jsonl and validation.json.
        html_out: gets the report as a page.
        markdown_out: gets it as Markdown.

    Returns:
        id of the MLflow run, and the counts as metrics.

    Raises:
        DataStop: too many bad rows, or too few good ones. The reports are written first.
        InputError: a file that is not JSON lines.
    """
    params = config.model_dump() | {"max_length": model.max_length}
    with tracking.stage_run("validate", params) as run:
        tokenizer = load_tokenizer(base_model)
        summaries: dict[str, Summary] = {}
        aside_rows: dict[str, list[dict[str, Any]]] = {"quarantine": [], "dropped": []}
        sets = {name: _read_set(dataset / name) for name in KINDS}
        sides: dict[str, set[str]] = {}
        for rows, splits in sets.values():
            for row, split in zip(rows, splits, strict=True):
                sides.setdefault(str(row.get("group")), set()).add(split)
        with replacing_folder(clean_out) as folder:
            for name, kind in KINDS.items():
                found = (*sets[name], sides)
                summaries[name] = _validate_set(name, kind, model, found, tokenizer, folder, aside_rows, run)
            write_lines(folder / "quarantine.jsonl", aside_rows["quarantine"])
            write_lines(folder / "dropped.jsonl", aside_rows["dropped"])
            write_json(folder / "validation.json", summaries)
            write_manifest(folder)
        write_text(html_out, _html(summaries))
        write_text(markdown_out, _markdown(summaries))
        metrics = {
            f"{name}_{what}": float(summary[what])
            for name, summary in summaries.items()
            for what in ("rows", "clean", "quarantined", "dropped")
        }
        run.log_metrics([(0, metrics)])
        run.log_artifact(clean_out / "validation.json")
        for name, summary in summaries.items():
            run.say(
                f"{name}: {summary['rows']} rows = {summary['clean']} clean + {summary['quarantined']} quarantined"
                f" + {summary['dropped']} longer than {model.max_length} tokens"
            )
        _stop_when_bad(config, summaries)
        return run.run_id, metrics


def _read_set(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a data set, and the side that each stands on."""
    rows: list[dict[str, Any]] = []
    splits: list[str] = []
    for split in SPLITS:
        found = read_lines(folder / f"{split}.jsonl")
        rows += found
        splits += [split] * len(found)
    return rows, splits


def _validate_set(
    name: str,
    kind: type[Row],
    model: ModelConfig,
    found: tuple[list[dict[str, Any]], list[str], dict[str, set[str]]],
    tokenizer: Any,
    out: Path,
    aside_rows: dict[str, list[dict[str, Any]]],
    run: tracking.StageRun,
) -> Summary:
    rows, splits, sides = found
    n_tokens = []
    for number, row in enumerate(rows, start=1):
        n_tokens.append(_count_tokens(row, kind, tokenizer))
        run.progress(number, len(rows), counting_tokens_of=name)
    checks = suite(kind, model.max_length)
    failed = run_suite(make_table(rows, splits, kind, n_tokens, sides), checks)
    reasons: dict[int, list[str]] = {}
    for check in checks:
        if check.severity == "error":
            for number in failed[check.name]:
                reasons.setdefault(number, []).append(check.name)
    dropped = {number for number in failed["too_long"] if number not in reasons}
    for number in sorted(reasons):
        entry = {"data_set": name, "split": splits[number], "reasons": reasons[number], "row": rows[number]}
        aside_rows["quarantine"].append(entry)
    for number in sorted(dropped):
        entry = {"data_set": name, "split": splits[number], "reasons": ["too_long"], "id": rows[number]["id"]}
        aside_rows["dropped"].append(entry)
    kept = [number for number in range(len(rows)) if number not in reasons and number not in dropped]
    for split in SPLITS:
        write_lines(out / name / f"{split}.jsonl", (rows[number] for number in kept if splits[number] == split))
    return _summary(rows, splits, kept, reasons, dropped, checks, failed)


def _count_tokens(row: dict[str, Any], kind: type[Row], tokenizer: Any) -> int | None:
    """Tokens of the prompt and its longest answer; None when the row has no such thing."""
    answers = ("chosen", "rejected") if kind is Preference else ("response",)
    try:
        prompt = [Message.model_validate(turn) for turn in row["prompt"]]
        lengths = [sum(map(len, encode(tokenizer, prompt, str(row[answer])))) for answer in answers]
    except (KeyError, TypeError, ValueError, TemplateError):
        return None
    return max(lengths)


def _summary(
    rows: list[dict[str, Any]],
    splits: list[str],
    kept: list[int],
    reasons: dict[int, list[str]],
    dropped: set[int],
    checks: list[Check],
    failed: dict[str, list[int]],
) -> Summary:
    return {
        "rows": len(rows),
        "clean": len(kept),
        "quarantined": len(reasons),
        "dropped": len(dropped),
        "sources": _sources([rows[i] for i in kept]),
        "splits": {split: Counter(str(rows[i].get("lang")) for i in kept if splits[i] == split) for split in SPLITS},
        "checks": [
            {"name": c.name, "severity": c.severity, "failed": len(failed[c.name]), "advice": c.advice} for c in checks
        ],
    }


def _sources(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Licence and number of the clean rows of every source; several licences of one are all named."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["source"], []).append(row["license"])
    return {name: {"license": ", ".join(sorted(set(all_))), "rows": len(all_)} for name, all_ in sorted(found.items())}


def _stop_when_bad(config: ValidateConfig, summaries: dict[str, Summary]) -> None:
    for name, summary in summaries.items():
        share = summary["quarantined"] / summary["rows"]
        if share > config.max_quarantined:
            worst = max((c for c in summary["checks"] if c["severity"] == "error"), key=lambda c: int(c["failed"]))
            raise DataStop(
                f"{name}: {summary['quarantined']} of {summary['rows']} rows are bad ({share:.1%}; validate"
                f".max_quarantined allows {config.max_quarantined:.1%}); most fail `{worst['name']}`"
                f" ({worst['failed']}): {worst['advice']}; see the validation report"
            )
        for split, languages in summary["splits"].items():
            if sum(languages.values()) < config.min_rows:
                raise InputError(
                    f"{name}: {sum(languages.values())} usable rows in {split}, validate.min_rows asks for"
                    f" {config.min_rows}; add data or raise model.max_length"
                )


def _html(summaries: dict[str, Summary]) -> str:
    body = []
    for name, summary in summaries.items():
        body.append(f"<h2>{name}</h2><p>{_sentence(summary)}</p>")
        languages = sorted({language for counts in summary["splits"].values() for language in counts})
        counts = [[split, *(found.get(lang, 0) for lang in languages)] for split, found in summary["splits"].items()]
        body.append(table_html(["clean rows", *languages], counts))
        lines = [[c["name"], c["severity"], c["failed"], c["advice"] if c["failed"] else ""] for c in summary["checks"]]
        body.append(table_html(["check", "severity", "rows failing", "what to do"], lines))
    return page("Data validation", "".join(body))


def _markdown(summaries: dict[str, Summary]) -> str:
    lines = ["# Data validation", ""]
    for name, summary in summaries.items():
        lines += [f"**{name}**: {_sentence(summary)}", "", "| check | severity | rows failing |", "|---|---|---:|"]
        lines += [f"| {c['name']} | {c['severity']} | {c['failed']} |" for c in summary["checks"]]
        lines.append("")
    return "\n".join(lines)


def _sentence(summary: Summary) -> str:
    return (
        f"{summary['rows']} rows: {summary['clean']} clean, {summary['quarantined']} quarantined,"
        f" {summary['dropped']} dropped for their length."
    )
