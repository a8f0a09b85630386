"""Check both data sets, set bad rows aside with their reasons, and stop the run when too much is bad.

Every row is read twice: once for its columns of numbers (scan.py), once to be written to where it belongs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from components.common.errors import DataValidationError, InputError
from components.common.files import read_json, replacing_folder, write_json, write_manifest, write_text
from components.dataset.distribution import MEASURES, PREVIOUS, Distribution, distance, length_bucket
from components.dataset.records import SPLITS, parse_line, raw_lines, schema_problem
from components.tracking.run import StageRun, stage_run
from components.validate.bias import ALL, Bias, find_bias, statistics
from components.validate.checks import (
    KINDS,
    TOO_LONG,
    Check,
    Summary,
    every_check,
    row_checks,
    statistic_checks,
    with_severities,
)
from components.validate.config import ValidateConfig
from components.validate.duplicates import Listed, mark_prompts, mark_rows, read_listed
from components.validate.page import html_page, markdown_page
from components.validate.scan import Found, Scan, join_found, processes_for, scan_file
from components.validate.suite import Suite

Failed = dict[str, NDArray[np.int64]]
SHOWN_PLACES = 20
"""Lines that the report names for a check; quarantine.jsonl has all."""


def run_validate(
    config: ValidateConfig,
    max_length: int,
    dataset: Path,
    base_model: Path,
    clean_out: Path,
    html_out: Path,
    markdown_out: Path,
) -> tuple[str, dict[str, float]]:
    """Validate a data set.

    Args:
        config: the thresholds, and when to stop.
        max_length: tokens of prompt and answer above which a row is set aside.
        dataset: folder with preferences/ and instructions/, from fetch.
        base_model: model folder, for its tokenizer.
        clean_out: gets the good rows, quarantine.jsonl, warnings.jsonl (where rows stand that a check warns of, not
            what they say) and validation.json.
        html_out: gets the report as a page.
        markdown_out: gets it as Markdown.

    Returns:
        id of the MLflow run, and the counts and shares as metrics.

    Raises:
        DataValidationError: a check with severity `stop` fails, there are too many bad rows, or too few good ones. The
            reports are written first.
        InputError: a file that is not JSON lines.
    """
    params = config.model_dump() | {"max_length": max_length}
    with stage_run("validate", params) as run:
        overall = with_severities(statistic_checks(), config)
        checked = check_rows(config, max_length, dataset, base_model, run)
        sets, sides, checks, failed = checked.sets, checked.sides, checked.checks, checked.failed
        bias = find_bias(sets["preferences"], sets["preferences"].columns["schema"] == 0)
        drift = _drift(dataset, sets["preferences"])
        lines = statistics(bias, config.max_shortcut) + [
            {"name": "drift", "part": measure, "value": value, "limit": config.max_drift}
            for measure, value in (drift or {}).items()
        ]
        _mark_failing(lines, checked.suite, overall)
        aside = {name: _reasons(checks[name], failed[name], ("stop", "error")) for name in sets}
        warned = {name: _reasons(checks[name], failed[name], ("warn",)) for name in sets}
        summaries: Summary = {
            name: _summary(checks[name], failed[name], aside[name], sets[name], sides[name]) for name in sets
        }
        summaries["preferences"]["bias"] = [_as_json(part) for part in bias]
        summaries["preferences"]["statistics"] = _statistics_summary(lines, overall, drift, checked.listed)
        with replacing_folder(clean_out) as folder:
            _write_rows(dataset, folder, aside)
            _write_warnings(folder / "warnings.jsonl", warned, sets, sides)
            write_json(folder / "validation.json", summaries)
            write_manifest(folder)
        write_text(html_out, html_page(summaries))
        write_text(markdown_out, markdown_page(summaries))
        metrics = _metrics(summaries, bias)
        run.log_metrics([(0, metrics)])
        for path in (clean_out / "validation.json", html_out):
            run.log_artifact(path)
        for name in KINDS:
            run.log(f"{name}: {summaries[name]['rows']} rows = {_counts(summaries[name], max_length)}")
        _stop_when_bad(config, summaries)
        return run.run_id, metrics


@dataclass(frozen=True)
class Checked:
    """The rows of each data set as columns, the side of each, and the rows that fail each check."""

    sets: dict[str, Found]
    sides: dict[str, NDArray[np.uint8]]
    checks: dict[str, list[Check]]
    failed: dict[str, Failed]
    listed: Listed | None
    suite: Suite


def check_rows(config: ValidateConfig, max_length: int, dataset: Path, base_model: Path, run: StageRun) -> Checked:
    """Look at every row of both data sets, and write nothing.

    Raises:
        InputError: a file that is not JSON lines.
        KubealignError: a check could not be evaluated.
    """
    checks = {name: with_severities(row_checks(kind, max_length), config) for name, kind in KINDS.items()}
    listed = _read_list(config, dataset)
    sets, sides = _scan(config, max_length, dataset, base_model, run)
    suite = Suite()
    flags = mark_prompts(sets, sides, listed, config.near_duplicate)
    failed = {
        name: suite.failing(found.columns | flags[name] | mark_rows(KINDS[name], found), checks[name])
        for name, found in sets.items()
    }
    return Checked(sets, sides, checks, failed, listed, suite)


def _read_list(config: ValidateConfig, dataset: Path) -> Listed | None:
    path = dataset / "preferences" / config.decontaminate
    return read_listed(path) if config.decontaminate and path.is_file() else None


def _scan(
    config: ValidateConfig, max_length: int, dataset: Path, base_model: Path, run: StageRun
) -> tuple[dict[str, Found], dict[str, NDArray[np.uint8]]]:
    """Each data set as columns, and the side of every row as its position in SPLITS."""
    paths = {name: [dataset / name / f"{split}.jsonl" for split in SPLITS] for name in KINDS}
    every = [path for of_set in paths.values() for path in of_set]
    total = max(1, sum(path.stat().st_size for path in every if path.is_file()) >> 10)
    pool = processes_for(every)
    done = 0
    sets, sides = {}, {}
    try:
        for name, kind in KINDS.items():
            scan = Scan(kind, base_model, max_length, config.language_confidence)
            parts: list[Found] = []
            side = []
            for position, path in enumerate(paths[name]):
                before = len(parts)
                for part in scan_file(scan, path, pool):
                    parts.append(part)
                    side.append(np.full(len(part.columns["line"]), position, np.uint8))
                    done += part.size
                    run.progress(min(total, (done >> 10) + 1), total, f"KiB of {name}")
                if len(parts) == before:
                    raise InputError(f"{path}: no rows; expected at least one")
            sets[name], sides[name] = join_found(parts), np.concatenate(side)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return sets, sides


def _drift(dataset: Path, found: Found) -> dict[str, float] | None:
    """Distance of each measure from the version before; None when the data set knows of no version before."""
    path = dataset / "preferences" / PREVIOUS
    if not path.is_file():
        return None
    before = Distribution.model_validate(read_json(path))
    columns, names = found.columns, found.names
    counts: dict[str, dict[str, int]] = {}
    for measure, column in zip(MEASURES[:2], ("lang", "source"), strict=True):
        counts[measure] = dict(zip(names[column], np.bincount(columns[column]).tolist(), strict=False))
    for measure, column in zip(
        MEASURES[2:], ("prompt_characters", "first_characters", "second_characters"), strict=True
    ):
        lengths, numbers = np.unique(columns[column], return_counts=True)
        steps: dict[str, int] = {}
        for length, number in zip(lengths.tolist(), numbers.tolist(), strict=True):
            steps[length_bucket(length)] = steps.get(length_bucket(length), 0) + number
        counts[measure] = steps
    now = Distribution.model_validate({"rows": len(columns["line"])} | counts)
    return {measure: distance(now, before, measure) for measure in MEASURES}


def _mark_failing(lines: list[dict[str, Any]], suite: Suite, checks: list[Check]) -> None:
    """Add to each line whether its check fails."""
    for check in checks:
        own = [line for line in lines if line["name"] == check.name]
        if not own:
            continue
        table = {"value": [line["value"] for line in own], "limit": [line["limit"] for line in own]}
        failing = set(suite.failing(table, [check])[check.name].tolist())
        for number, line in enumerate(own):
            line["fails"] = number in failing


def _reasons(checks: list[Check], failed: Failed, severities: tuple[str, ...]) -> dict[int, list[str]]:
    """For every row that fails a check of such a severity, the names of those checks."""
    reasons: dict[int, list[str]] = {}
    for check in checks:
        if check.severity in severities:
            for row in failed[check.name].tolist():
                reasons.setdefault(row, []).append(check.name)
    return reasons


def _summary(
    checks: list[Check], failed: Failed, aside: dict[int, list[str]], found: Found, side: NDArray[np.uint8]
) -> Summary:
    rows = len(side)
    kept = np.ones(rows, bool)
    kept[list(aside)] = False
    langs = found.columns["lang"]
    counts = {
        split: {
            name: int((kept & (side == position) & (langs == code)).sum())
            for code, name in enumerate(found.names["lang"])
        }
        for position, split in enumerate(SPLITS)
    }
    return {
        "rows": rows,
        "clean": rows - len(aside),
        "quarantined": len(aside),
        "too_long": sum(reasons == [TOO_LONG] for reasons in aside.values()),
        "splits": {split: {name: n for name, n in of.items() if n} for split, of in counts.items()},
        "sources": _sources(found, kept),
        "checks": [
            {
                "name": check.name,
                "severity": check.severity,
                "failed": len(failed[check.name]),
                "advice": check.advice,
                "places": [
                    f"{SPLITS[side[row]]}.jsonl:{found.columns['line'][row]}"
                    for row in failed[check.name][:SHOWN_PLACES].tolist()
                ],
            }
            for check in checks
        ],
    }


def _sources(found: Found, kept: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """Licence and number of the clean rows of every source; several licences of one are all named."""
    pairs = np.stack([found.columns["source"], found.columns["terms"]], axis=1)[kept]
    each, counts = np.unique(pairs, axis=0, return_counts=True)
    sources: dict[str, dict[str, Any]] = {}
    for (source, license_), n in zip(each.tolist(), counts.tolist(), strict=True):
        entry = sources.setdefault(found.names["source"][source], {"license": [], "rows": 0})
        entry["license"].append(found.names["terms"][license_])
        entry["rows"] += n
    return {
        name: {"license": ", ".join(sorted(entry["license"])), "rows": entry["rows"]} for name, entry in sources.items()
    }


def _as_json(part: Bias) -> Summary:
    return vars(part) | {"longer_wins": part.longer_wins.as_json(), "refusal_loses": part.refusal_loses.as_json()}


def _statistics_summary(
    lines: list[dict[str, Any]], checks: list[Check], drift: dict[str, float] | None, listed: Listed | None
) -> Summary:
    return {
        "lines": lines,
        "checks": [
            {
                "name": check.name,
                "severity": check.severity,
                "failed": sum(line["fails"] for line in lines if line["name"] == check.name),
                "advice": check.advice,
                "places": [line["part"] for line in lines if line["name"] == check.name and line["fails"]],
            }
            for check in checks
        ],
        "drift_known": drift is not None,
        "listed_prompts": None if listed is None else len(listed.keys),
    }


def _write_rows(dataset: Path, out: Path, aside: dict[str, dict[int, list[str]]]) -> None:
    """Every row goes as it is to its file, or with its reasons to quarantine.jsonl."""
    with (out / "quarantine.jsonl").open("wb") as quarantine:
        for name, kind in KINDS.items():
            (out / name).mkdir()
            row = -1
            for split in SPLITS:
                path = dataset / name / f"{split}.jsonl"
                with (out / name / path.name).open("wb") as clean:
                    for number, line in raw_lines(path):
                        row += 1
                        if row not in aside[name]:
                            clean.write(line if line.endswith(b"\n") else line + b"\n")
                            continue
                        value = parse_line(path, number, line)
                        reasons = aside[name][row]
                        entry = {"data_set": name, "split": split, "line": number, "reasons": reasons}
                        if "schema" in reasons:
                            entry["detail"] = _schema_problem(kind, value)
                        quarantine.write(orjson.dumps(entry | {"row": value}) + b"\n")


def _write_warnings(
    path: Path, warned: dict[str, dict[int, list[str]]], sets: dict[str, Found], sides: dict[str, NDArray[np.uint8]]
) -> None:
    """Where every row stands that a check warns of, in the data set as it came."""
    with path.open("wb") as file:
        for name, rows in warned.items():
            for row in sorted(rows):
                place = {"split": SPLITS[sides[name][row]], "line": int(sets[name].columns["line"][row])}
                file.write(orjson.dumps({"data_set": name} | place | {"checks": rows[row]}) + b"\n")


def _schema_problem(kind: Any, value: Summary) -> str:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return schema_problem(error)
    return ""


def _metrics(summaries: Summary, bias: list[Bias]) -> dict[str, float]:
    metrics = {
        f"{name}_{what}": float(summaries[name][what])
        for name in KINDS
        for what in ("rows", "clean", "quarantined", "too_long")
    }
    metrics |= {
        f"{name}_fail_{check['name']}": float(check["failed"])
        for name in KINDS
        for check in summaries[name]["checks"]
        if check["failed"]
    }
    for part in bias:
        if part.source == ALL and part.longer_wins.n:
            metrics[f"longer_wins_{part.lang}"] = part.longer_wins.value
    return metrics


def _counts(summary: Summary, max_length: int) -> str:
    return (
        f"{summary['clean']} clean + {summary['quarantined']} quarantined"
        f" ({summary['too_long']} of them only for being longer than {max_length} tokens)"
    )


def _stop_when_bad(config: ValidateConfig, summaries: Summary) -> None:
    for name in KINDS:
        for check in every_check(summaries[name]):
            if check["severity"] == "stop" and check["failed"]:
                raise DataValidationError(
                    f"{name}: {check['failed']} fail `{check['name']}`: {check['advice']}; see the validation report"
                )
    for name in KINDS:
        summary = summaries[name]
        bad = summary["quarantined"] - summary["too_long"]
        share = bad / summary["rows"]
        if share > config.max_quarantined:
            errors = [c for c in summary["checks"] if c["severity"] == "error" and c["name"] != TOO_LONG]
            worst = max(errors, key=lambda c: int(c["failed"]))
            raise DataValidationError(
                f"{name}: {bad} of {summary['rows']} rows are bad ({share:.1%}; validate"
                f".max_quarantined allows {config.max_quarantined:.1%}); most fail `{worst['name']}`"
                f" ({worst['failed']}): {worst['advice']}; see the validation report"
            )
        for split, languages in summary["splits"].items():
            if sum(languages.values()) < config.min_rows:
                raise InputError(
                    f"{name}: {sum(languages.values())} usable rows in {split}, validate.min_rows asks for"
                    f" {config.min_rows}; add data or raise model.max_length"
                )
