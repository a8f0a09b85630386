"""Check both data sets, quarantine bad rows with their reasons, and stop the run when too many rows are bad.

Every row is read twice: once for its features (scan.py), once to be copied to the clean rows or the quarantine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from components.common.documents import JsonObject
from components.common.errors import DataValidationError, InputError, KubealignError
from components.common.files import (
    MANIFEST,
    read_json,
    replacing_folder,
    verify_manifest,
    write_json,
    write_manifest,
    write_text,
)
from components.dataset.distribution import MEASURES, PREVIOUS, Distribution, distance, length_bucket
from components.dataset.records import SPLITS, parse_line, raw_lines, schema_problem
from components.dataset.validation import (
    CheckResult,
    DataSetSummary,
    SourceSummary,
    Statistic,
    Statistics,
    ValidationSummary,
    data_sets,
)
from components.tracking.result import StageResult
from components.tracking.run import StageRun, stage_run
from components.validate.bias import ALL, Bias, Measure, find_bias, measures
from components.validate.checks import KINDS, TOO_LONG, Check, row_checks, statistic_checks, with_severities
from components.validate.config import ValidateConfig
from components.validate.duplicates import (
    DecontaminationList,
    mark_prompts,
    mark_rows,
    read_decontamination_list,
    read_frames,
)
from components.validate.report_page import html_page, markdown_page
from components.validate.scan import RowTable, Scan, join_tables, processes_for, scan_file
from components.validate.suite import Suite

Failed = dict[str, NDArray[np.int64]]
LEAST_BAD = 5
"""Bad rows of a source from which their share can stop a run; rows may name sources of their own, such as URLs."""
MAX_LISTED_ROWS = 20
"""Rows that the report lists per check; quarantine.jsonl has all."""


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
        max_length: tokens of prompt and answer above which a row is quarantined.
        dataset: folder with preferences/ and instructions/, from fetch.
        base_model: model folder, for its tokenizer.
        clean_out: gets the good rows, quarantine.jsonl, warnings.jsonl (file and line of the rows that a check warns
            of, never their text) and validation.json.
        html_out: gets the report as an HTML page.
        markdown_out: gets the report as Markdown.

    Returns:
        the MLflow run, and the counts and shares as metrics.

    Raises:
        DataValidationError: a check with severity `stop` fails, there are too many bad rows, or too few good ones. The
            reports are written first.
        InputError: a file is not JSON Lines.
        KubealignError: the base model is not as its manifest has it.
    """
    params = config.model_dump() | {"max_length": max_length}
    if (base_model / MANIFEST).exists():  # as fetch writes it; a folder of one's own need not have one
        verify_manifest(base_model)
    with stage_run("validate", params) as run:
        overall = with_severities(statistic_checks(), config)
        checked = check_rows(config, max_length, dataset, base_model, run)
        sets, split_codes, checks, failed = checked.sets, checked.split_codes, checked.checks, checked.failed
        bias = find_bias(sets["preferences"], sets["preferences"].columns["schema"] == 0)
        drift = _drift(dataset, sets["preferences"])
        measured = measures(bias, config.max_shortcut_accuracy)
        measured += [Measure("drift", name, value, config.max_drift) for name, value in (drift or {}).items()]
        statistics = _statistics(measured, checked.suite, overall, drift is not None, checked.decontamination)
        warned = {name: _reasons(checks[name], failed[name], ("warn",)) for name in sets}
        by_set = summarize(checked)
        summary: ValidationSummary = {
            "preferences": {
                **by_set["preferences"],
                "bias": [part.summary() for part in bias],
                "statistics": statistics,
            },
            "instructions": by_set["instructions"],
        }
        with replacing_folder(clean_out) as folder:
            _write_rows(dataset, folder, checked.quarantined)
            _write_warnings(folder / "warnings.jsonl", warned, sets, split_codes)
            write_json(folder / "validation.json", summary)
            write_manifest(folder)
        metrics = _metrics(summary, bias)
        run.log_metrics([(0, metrics)])
        for name, counts in data_sets(summary).items():
            run.log(f"{name}: {counts['rows']} rows = {_counts(counts, max_length)}")
        write_text(html_out, html_page(summary))
        write_text(markdown_out, markdown_page(summary))
        for path in (clean_out / "validation.json", html_out):
            run.log_artifact(path)
        for refusal in refusals(config, data_sets(summary), statistics["checks"]):
            raise refusal
        return StageResult(run.run_id, metrics)


@dataclass(frozen=True)
class Checked:
    """The row table of each data set, every row's split as an index into SPLITS, and the rows that fail each check.

    `quarantined` are the rows of each data set that must not be trained on, with their reasons.
    """

    sets: dict[str, RowTable]
    split_codes: dict[str, NDArray[np.uint8]]
    checks: dict[str, list[Check]]
    failed: dict[str, Failed]
    decontamination: DecontaminationList | None
    suite: Suite
    quarantined: dict[str, dict[int, list[str]]]


def check_rows(config: ValidateConfig, max_length: int, dataset: Path, base_model: Path, run: StageRun) -> Checked:
    """Check every row of both data sets; writes nothing.

    Raises:
        InputError: a file is not JSON Lines.
        KubealignError: a check could not be evaluated.
    """
    checks = {name: with_severities(row_checks(kind, max_length), config) for name, kind in KINDS.items()}
    decontamination = _decontamination_list(config, dataset)
    sets, split_codes = _scan(config, max_length, dataset, base_model, run)
    suite = Suite()
    frames = read_frames(dataset / "preferences")
    flags = mark_prompts(sets, split_codes, decontamination, config.near_duplicate, frames)
    failed = {
        name: suite.failing(table.columns | flags[name] | mark_rows(KINDS[name], table), checks[name])
        for name, table in sets.items()
    }
    quarantined = {name: _reasons(checks[name], failed[name], ("stop", "error")) for name in sets}
    return Checked(sets, split_codes, checks, failed, decontamination, suite, quarantined)


def summarize(checked: Checked) -> dict[str, DataSetSummary]:
    """What the checks found in each data set."""
    return {
        name: _summary(
            checked.checks[name], checked.failed[name], checked.quarantined[name], table, checked.split_codes[name]
        )
        for name, table in checked.sets.items()
    }


def refusals(
    config: ValidateConfig, summaries: Mapping[str, DataSetSummary], statistics: Sequence[CheckResult] = ()
) -> Iterator[KubealignError]:
    """Why a run with these data stops, an error a reason: DataValidationError, or InputError for too few rows."""
    for name, data_set in summaries.items():
        for check in (*data_set["checks"], *(statistics if name == "preferences" else ())):
            if check["severity"] == "stop" and check["failed"]:
                yield DataValidationError(
                    f"{name}: {check['failed']} fail `{check['name']}`: {check['advice']}; see the validation report"
                )
    for name, data_set in summaries.items():
        errors = [c for c in data_set["checks"] if c["severity"] == "error" and c["name"] != TOO_LONG]
        worst = max(errors, key=lambda c: c["failed"])
        most = f"most fail `{worst['name']}` ({worst['failed']}): {worst['advice']}; see the validation report"
        bad = data_set["quarantined"] - data_set["too_long"]
        allowed = f"validate.max_quarantined allows {config.max_quarantined:.1%}"
        if bad > config.max_quarantined * data_set["rows"]:
            share = bad / data_set["rows"]
            yield DataValidationError(
                f"{name}: {bad} of {data_set['rows']} rows are bad ({share:.1%}; {allowed}); {most}"
            )
        for source, part in data_set["sources"].items():
            total, share = part["total"], part["bad"] / part["total"]
            if part["bad"] >= LEAST_BAD and share > config.max_quarantined:
                yield DataValidationError(
                    f"{name}: {part['bad']} of {total} rows of source {source} are bad ({share:.1%}; {allowed}); {most}"
                )
        for split, languages in data_set["splits"].items():
            if sum(languages.values()) < config.min_rows:
                yield InputError(
                    f"{name}: {sum(languages.values())} usable rows in {split}; validate.min_rows requires"
                    f" {config.min_rows}; add data or raise model.max_length"
                )


def _decontamination_list(config: ValidateConfig, dataset: Path) -> DecontaminationList | None:
    path = dataset / "preferences" / config.decontamination_file
    return read_decontamination_list(path) if config.decontamination_file and path.is_file() else None


def _scan(
    config: ValidateConfig, max_length: int, dataset: Path, base_model: Path, run: StageRun
) -> tuple[dict[str, RowTable], dict[str, NDArray[np.uint8]]]:
    """The row table of each data set, and every row's split as an index into SPLITS."""
    paths = {name: [dataset / name / f"{split}.jsonl" for split in SPLITS] for name in KINDS}
    all_paths = [path for set_paths in paths.values() for path in set_paths]
    total = max(1, sum(path.stat().st_size for path in all_paths if path.is_file()) >> 10)
    pool = processes_for(all_paths)
    done = 0
    sets, split_codes = {}, {}
    try:
        for name, kind in KINDS.items():
            scan = Scan(kind, base_model, max_length, config.language_confidence)
            parts: list[RowTable] = []
            codes = []
            for split_index, path in enumerate(paths[name]):
                before = len(parts)
                for part in scan_file(scan, path, pool):
                    parts.append(part)
                    codes.append(np.full(len(part.columns["line"]), split_index, np.uint8))
                    done += part.size
                    run.progress(min(total, (done >> 10) + 1), total, f"KiB of {name}")
                if len(parts) == before:
                    raise InputError(f"{path}: no rows; expected at least one")
            sets[name], split_codes[name] = join_tables(parts), np.concatenate(codes)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return sets, split_codes


def _drift(dataset: Path, table: RowTable) -> dict[str, float] | None:
    """Distance of each measure from the previous version; None when the data set records no previous version."""
    path = dataset / "preferences" / PREVIOUS
    if not path.is_file():
        return None
    before = Distribution.model_validate(read_json(path))
    columns, names = table.columns, table.names
    counts: dict[str, dict[str, int]] = {}
    for measure, column in zip(MEASURES[:2], ("lang", "source"), strict=True):
        counts[measure] = dict(zip(names[column], np.bincount(columns[column]).tolist(), strict=False))
    for measure, column in zip(
        MEASURES[2:], ("prompt_characters", "chosen_characters", "rejected_characters"), strict=True
    ):
        lengths, rows = np.unique(columns[column], return_counts=True)
        buckets: dict[str, int] = {}
        for length, n in zip(lengths.tolist(), rows.tolist(), strict=True):
            buckets[length_bucket(length)] = buckets.get(length_bucket(length), 0) + n
        counts[measure] = buckets
    now = Distribution.model_validate({"rows": len(columns["line"])} | counts)
    return {measure: distance(now, before, measure) for measure in MEASURES}


def _statistics(
    measured: list[Measure],
    suite: Suite,
    checks: list[Check],
    drift_known: bool,
    decontamination: DecontaminationList | None,
) -> Statistics:
    """The data-set-level measures, and which of them fail their check."""
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
        "listed_prompts": None if decontamination is None else len(decontamination.keys),
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
    """The names of the checks of these severities that each row fails; only rows that fail one."""
    reasons: dict[int, list[str]] = {}
    for check in checks:
        if check.severity in severities:
            for row in failed[check.name].tolist():
                reasons.setdefault(row, []).append(check.name)
    return reasons


def _summary(
    checks: list[Check],
    failed: Failed,
    quarantined: dict[int, list[str]],
    table: RowTable,
    split_code: NDArray[np.uint8],
) -> DataSetSummary:
    rows = len(split_code)
    clean, bad = np.ones(rows, bool), np.zeros(rows, bool)
    clean[list(quarantined)] = False
    bad[[row for row, reasons in quarantined.items() if reasons != [TOO_LONG]]] = True
    langs = table.columns["lang"]
    counts = {
        split: {
            name: int((clean & (split_code == split_index) & (langs == code)).sum())
            for code, name in enumerate(table.names["lang"])
        }
        for split_index, split in enumerate(SPLITS)
    }
    return {
        "rows": rows,
        "clean": rows - len(quarantined),
        "quarantined": len(quarantined),
        "too_long": sum(reasons == [TOO_LONG] for reasons in quarantined.values()),
        "splits": {split: {name: n for name, n in by_lang.items() if n} for split, by_lang in counts.items()},
        "sources": _sources(table, clean, bad),
        "checks": [
            _check_result(
                check,
                len(failed[check.name]),
                [
                    f"{SPLITS[split_code[row]]}.jsonl:{table.columns['line'][row]}"
                    for row in failed[check.name][:MAX_LISTED_ROWS].tolist()
                ],
            )
            for check in checks
        ],
    }


def _sources(table: RowTable, clean: NDArray[np.bool_], bad: NDArray[np.bool_]) -> dict[str, SourceSummary]:
    """Licences and numbers of rows of every source; a source with several licences lists them all."""
    licences: dict[str, set[str]] = {}
    pairs = np.unique(np.stack([table.columns["source"], table.columns["terms"]], axis=1), axis=0)
    for source, license_ in pairs.tolist():
        licences.setdefault(table.names["source"][source], set()).add(table.names["terms"][license_])
    names = table.names["source"]
    counts = [
        np.bincount(codes, minlength=len(names)).tolist()
        for codes in (table.columns["source"][clean], table.columns["source"][bad], table.columns["source"])
    ]
    return {
        name: {"license": ", ".join(sorted(licences[name])), "rows": good, "bad": poor, "total": total}
        for name, good, poor, total in zip(names, *counts, strict=True)
    }


def _write_rows(dataset: Path, out: Path, quarantined: dict[str, dict[int, list[str]]]) -> None:
    """Copy every row unchanged to its file, or with its reasons to quarantine.jsonl."""
    with (out / "quarantine.jsonl").open("wb") as quarantine_file:
        for name, kind in KINDS.items():
            (out / name).mkdir()
            row = -1
            for split in SPLITS:
                path = dataset / name / f"{split}.jsonl"
                with (out / name / path.name).open("wb") as clean:
                    for number, line in raw_lines(path):
                        row += 1
                        if row not in quarantined[name]:
                            clean.write(line if line.endswith(b"\n") else line + b"\n")
                            continue
                        value = parse_line(path, number, line)
                        reasons = quarantined[name][row]
                        entry = {"data_set": name, "split": split, "line": number, "reasons": reasons}
                        if "schema" in reasons:
                            entry["detail"] = _schema_problem(kind, value)
                        quarantine_file.write(orjson.dumps(entry | {"row": value}) + b"\n")


def _write_warnings(
    path: Path,
    warned: dict[str, dict[int, list[str]]],
    sets: dict[str, RowTable],
    split_codes: dict[str, NDArray[np.uint8]],
) -> None:
    """Write data set, split and line of every row that a check warns of, as counted in the input."""
    with path.open("wb") as file:
        for name, rows in warned.items():
            for row in sorted(rows):
                location = {"split": SPLITS[split_codes[name][row]], "line": int(sets[name].columns["line"][row])}
                file.write(orjson.dumps({"data_set": name} | location | {"checks": rows[row]}) + b"\n")


def _schema_problem(kind: Any, value: JsonObject) -> str:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return schema_problem(error)
    return ""


def _metrics(summary: ValidationSummary, bias: list[Bias]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, data_set in data_sets(summary).items():
        metrics[f"{name}_rows"] = float(data_set["rows"])
        metrics[f"{name}_clean"] = float(data_set["clean"])
        metrics[f"{name}_quarantined"] = float(data_set["quarantined"])
        metrics[f"{name}_too_long"] = float(data_set["too_long"])
        metrics |= {
            f"{name}_fail_{check['name']}": float(check["failed"]) for check in data_set["checks"] if check["failed"]
        }
    for part in bias:
        if part.source == ALL and part.longer_wins.n:
            metrics[f"longer_wins_{part.lang}"] = part.longer_wins.value
    return metrics


def _counts(summary: DataSetSummary, max_length: int) -> str:
    return (
        f"{summary['clean']} clean + {summary['quarantined']} quarantined"
        f" ({summary['too_long']} of them only because they are longer than {max_length} tokens)"
    )
