"""Check both data sets, set bad rows aside with their reasons, and stop the run when too much is bad.

Every row is read twice: once for its columns of numbers (scan.py), once to be written to where it belongs.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from components.common.documents import JsonObject
from components.common.errors import DataValidationError, InputError
from components.common.files import read_json, replacing_folder, write_json, write_manifest, write_text
from components.dataset.distribution import MEASURES, PREVIOUS, Distribution, distance, length_bucket
from components.dataset.records import SPLITS, parse_line, raw_lines, schema_problem
from components.dataset.validation import (
    CheckResult,
    DataSetSummary,
    SourceSummary,
    Statistic,
    Statistics,
    ValidationSummary,
    all_checks,
    data_sets,
)
from components.tracking.result import StageResult
from components.tracking.run import StageRun, stage_run
from components.validate.bias import ALL, Bias, Measure, find_bias, measures
from components.validate.checks import KINDS, TOO_LONG, Check, row_checks, statistic_checks, with_severities
from components.validate.config import ValidateConfig
from components.validate.duplicates import Listed, mark_prompts, mark_rows, read_listed
from components.validate.report_page import html_page, markdown_page
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
) -> StageResult:
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
        the MLflow run, and the counts and shares as metrics.

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
        measured = measures(bias, config.max_shortcut_accuracy)
        measured += [Measure("drift", name, value, config.max_drift) for name, value in (drift or {}).items()]
        statistics = _statistics(measured, checked.suite, overall, drift is not None, checked.listed)
        aside = {name: _reasons(checks[name], failed[name], ("stop", "error")) for name in sets}
        warned = {name: _reasons(checks[name], failed[name], ("warn",)) for name in sets}
        by_set = {name: _summary(checks[name], failed[name], aside[name], sets[name], sides[name]) for name in sets}
        summary: ValidationSummary = {
            "preferences": {
                **by_set["preferences"],
                "bias": [part.summary() for part in bias],
                "statistics": statistics,
            },
            "instructions": by_set["instructions"],
        }
        with replacing_folder(clean_out) as folder:
            _write_rows(dataset, folder, aside)
            _write_warnings(folder / "warnings.jsonl", warned, sets, sides)
            write_json(folder / "validation.json", summary)
            write_manifest(folder)
        metrics = _metrics(summary, bias)
        run.log_metrics([(0, metrics)])
        for name, found in data_sets(summary).items():
            run.log(f"{name}: {found['rows']} rows = {_counts(found, max_length)}")
        write_text(html_out, html_page(summary))
        write_text(markdown_out, markdown_page(summary))
        for path in (clean_out / "validation.json", html_out):
            run.log_artifact(path)
        _stop_when_bad(config, summary)
        return StageResult(run.run_id, metrics)


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
    path = dataset / "preferences" / config.decontamination_file
    return read_listed(path) if config.decontamination_file and path.is_file() else None


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


def _statistics(
    measured: list[Measure], suite: Suite, checks: list[Check], drift_known: bool, listed: Listed | None
) -> Statistics:
    """The measures of the data set as a whole, and which of them fail their check."""
    failing = {measure for check in checks for measure in _failing_measures(measured, suite, check)}
    lines: list[Statistic] = [
        {
            "name": measure.name,
            "part": measure.part,
            "value": measure.value,
            "limit": measure.limit,
            "fails": measure in failing,
        }
        for measure in measured
    ]
    parts = {check.name: [m.part for m in measured if m.name == check.name and m in failing] for check in checks}
    return {
        "lines": lines,
        "checks": [_check_result(check, len(parts[check.name]), parts[check.name]) for check in checks],
        "drift_known": drift_known,
        "listed_prompts": None if listed is None else len(listed.keys),
    }


def _failing_measures(measured: list[Measure], suite: Suite, check: Check) -> list[Measure]:
    checked = [measure for measure in measured if measure.name == check.name]
    if not checked:
        return []
    table = {"value": [measure.value for measure in checked], "limit": [measure.limit for measure in checked]}
    return [checked[index] for index in suite.failing(table, [check])[check.name].tolist()]


def _check_result(check: Check, failed: int, places: list[str]) -> CheckResult:
    return {
        "name": check.name,
        "severity": check.severity,
        "failed": failed,
        "advice": check.advice,
        "places": places,
    }


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
) -> DataSetSummary:
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
            _check_result(
                check,
                len(failed[check.name]),
                [
                    f"{SPLITS[side[row]]}.jsonl:{found.columns['line'][row]}"
                    for row in failed[check.name][:SHOWN_PLACES].tolist()
                ],
            )
            for check in checks
        ],
    }


def _sources(found: Found, kept: NDArray[np.bool_]) -> dict[str, SourceSummary]:
    """Licence and number of the clean rows of every source; several licences of one are all named."""
    pairs = np.stack([found.columns["source"], found.columns["terms"]], axis=1)[kept]
    each, counts = np.unique(pairs, axis=0, return_counts=True)
    licences: dict[str, list[str]] = {}
    rows: Counter[str] = Counter()
    for (source, license_), n in zip(each.tolist(), counts.tolist(), strict=True):
        name = found.names["source"][source]
        licences.setdefault(name, []).append(found.names["terms"][license_])
        rows[name] += n
    return {name: {"license": ", ".join(sorted(terms)), "rows": rows[name]} for name, terms in licences.items()}


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


def _schema_problem(kind: Any, value: JsonObject) -> str:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return schema_problem(error)
    return ""


def _metrics(summary: ValidationSummary, bias: list[Bias]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, found in data_sets(summary).items():
        metrics[f"{name}_rows"] = float(found["rows"])
        metrics[f"{name}_clean"] = float(found["clean"])
        metrics[f"{name}_quarantined"] = float(found["quarantined"])
        metrics[f"{name}_too_long"] = float(found["too_long"])
        metrics |= {
            f"{name}_fail_{check['name']}": float(check["failed"]) for check in found["checks"] if check["failed"]
        }
    for part in bias:
        if part.source == ALL and part.longer_wins.n:
            metrics[f"longer_wins_{part.lang}"] = part.longer_wins.value
    return metrics


def _counts(summary: DataSetSummary, max_length: int) -> str:
    return (
        f"{summary['clean']} clean + {summary['quarantined']} quarantined"
        f" ({summary['too_long']} of them only for being longer than {max_length} tokens)"
    )


def _stop_when_bad(config: ValidateConfig, summary: ValidationSummary) -> None:
    for name, checks in all_checks(summary).items():
        for check in checks:
            if check["severity"] == "stop" and check["failed"]:
                raise DataValidationError(
                    f"{name}: {check['failed']} fail `{check['name']}`: {check['advice']}; see the validation report"
                )
    for name, found in data_sets(summary).items():
        bad = found["quarantined"] - found["too_long"]
        share = bad / found["rows"]
        if share > config.max_quarantined:
            errors = [c for c in found["checks"] if c["severity"] == "error" and c["name"] != TOO_LONG]
            worst = max(errors, key=lambda c: c["failed"])
            raise DataValidationError(
                f"{name}: {bad} of {found['rows']} rows are bad ({share:.1%}; validate"
                f".max_quarantined allows {config.max_quarantined:.1%}); most fail `{worst['name']}`"
                f" ({worst['failed']}): {worst['advice']}; see the validation report"
            )
        for split, languages in found["splits"].items():
            if sum(languages.values()) < config.min_rows:
                raise InputError(
                    f"{name}: {sum(languages.values())} usable rows in {split}, validate.min_rows asks for"
                    f" {config.min_rows}; add data or raise model.max_length"
                )
