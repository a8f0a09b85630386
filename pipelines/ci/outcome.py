"""The output files of `kubealign ci retrain` for a CI system: summary.md, verdict.json, report.html and status.json."""

import os
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from components.common.files import write_json, write_text
from components.common.foreign import one_line
from components.gate.verdict import Rule, VerdictName
from components.register.result import Decision
from components.report.markdown import bold, code, link, markdown, table_row
from pipelines.local.results import NAMES, FinishedRun, estimate_text

MARKER = "<!-- kubealign:verdict -->"
CONTEXT = "kubealign/retrain"
MAX_DESCRIPTION = 140
"""GitHub's limit for the description of a commit status."""
FILES = ("summary.md", "verdict.json", "report.html", "status.json")
NEGATIVE_VERDICTS = ("worse", "refused")
"""Verdicts against the model, as opposed to a lack of evidence for it."""


@dataclass(frozen=True)
class RetrainRequest:
    """The requested retraining: the commit, the key of its data, settings and code, and a link to the run."""

    commit: str
    key: str
    data: str
    link: str = ""


class VerdictFile(TypedDict):
    """verdict.json of a finished run."""

    state: str
    """`verdict`."""
    new: bool
    """Whether this call trained the model; otherwise an earlier run had."""
    passed: bool
    verdict: VerdictName
    sentence: str
    rules: list[Rule]
    decided: Decision
    model_uri: str
    aliases: list[str]
    run_id: str
    data_commit: str
    preferences_digest: str
    commit: str
    key: str
    link: str


class FailureFile(TypedDict):
    """verdict.json of a run that ended without a verdict."""

    state: str
    """`failed`, `canceled` or `unfinished`."""
    error: str
    commit: str
    key: str
    link: str


def clear_outputs(out: Path) -> None:
    """Remove the output files of an earlier call."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def write_verdict(out: Path, request: RetrainRequest, result: FinishedRun, new: bool) -> VerdictFile:
    """Write the files of a finished run.

    Args:
        out: the output folder.
        request: the requested retraining.
        result: the run's result, from `pipelines.local.results.load_result`.
        new: whether this call trained the model; False if an earlier run had.

    Returns:
        the content of verdict.json.
    """
    verdict = result["verdict"]
    facts: VerdictFile = {
        "state": "verdict",
        "new": new,
        "passed": verdict["passed"],
        "verdict": verdict["verdict"],
        "sentence": verdict["sentence"],
        "rules": verdict["rules"],
        "decided": result["decided"],
        "model_uri": result["model_uri"],
        "aliases": result["aliases"],
        "run_id": result["run_id"],
        "data_commit": result["data_commit"],
        "preferences_digest": result["preferences_digest"],
        "commit": request.commit,
        "key": request.key,
        "link": request.link,
    }
    write_json(out / "verdict.json", facts)
    write_text(out / "summary.md", summary(request, result, new))
    write_text(out / "report.html", Path(result["report"]).read_text(encoding="utf-8"))
    state = "failure" if verdict["verdict"] in NEGATIVE_VERDICTS else "success"
    _status(out, request, state, f"{verdict['verdict']}: {state_words(result)}. {verdict['sentence']}")
    return facts


def write_failure(out: Path, request: RetrainRequest, state: str, message: str) -> FailureFile:
    """Write the files of a run that ended without a verdict; `state` is `failed`, `canceled` or `unfinished`."""
    facts: FailureFile = {
        "state": state,
        "error": "\n".join(map(one_line, message.splitlines())),
        "commit": request.commit,
        "key": request.key,
        "link": request.link,
    }
    write_json(out / "verdict.json", facts)
    quoted = [f"> {markdown(line)}" for line in message.splitlines()]
    lines = [MARKER, f"## Retraining: {markdown(state)}", "", *quoted, "", *_facts_lines(request)]
    write_text(out / "summary.md", "\n".join(lines) + "\n")
    shown = {"canceled": "error", "unfinished": "pending"}.get(state, "failure")
    _status(out, request, shown, f"{state}: {message}")
    return facts


def _facts_lines(request: RetrainRequest) -> list[str]:
    facts = {"commit": request.commit, "cache key": request.key, "data": request.data}
    lines = [f"- {markdown(name)}: {code(value)}" for name, value in facts.items() if value]
    return [*lines, f"- {link('the run', request.link)}"] if request.link else lines


def _status(out: Path, request: RetrainRequest, state: str, text: str) -> None:
    """Write status.json, the request body of GitHub's API for commit statuses."""
    line = one_line(text)
    description = line if len(line) <= MAX_DESCRIPTION else f"{line[: MAX_DESCRIPTION - 1]}…"
    server, repository, job = (os.environ.get(f"GITHUB_{name}", "") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"))
    link = request.link or (f"{server}/{repository}/actions/runs/{job}" if job else "")
    status = {"state": state, "description": description, "context": CONTEXT}
    write_json(out / "status.json", status | ({"target_url": link} if link.startswith("http") else {}))


def summary(request: RetrainRequest, result: FinishedRun, new: bool) -> str:
    """The verdict as Markdown: every rule, failed ones first, and the metrics."""
    verdict = result["verdict"]
    lines = [MARKER, f"## Verdict: {markdown(verdict['verdict'])} ({markdown(state_words(result))})", ""]
    lines += [markdown(verdict["sentence"]), ""]
    lines += ["| rule | outcome | found | expected |", "|---|---|---|---|"]
    for rule in sorted(verdict["rules"], key=lambda rule: rule["outcome"] != "fail"):
        outcome = bold(rule["outcome"]) if rule["outcome"] == "fail" else rule["outcome"]
        lines.append(table_row(rule["name"], outcome, _found(rule), rule["expected"]))
    lines += ["", "| model | held-out pairs | log-loss, nats | accuracy | margin, nats |", "|---|---:|---|---|---|"]
    for name, title in NAMES.items():
        if name in result["metrics"]:
            metrics = result["metrics"][name]
            keys = ("preference_log_loss", "rewards/accuracies", "rewards/margins")
            cells = [title, str(metrics["rewards/accuracies"]["n"]), *(estimate_text(metrics[key]) for key in keys)]
            lines.append(table_row(*cells))
    model = f"- model: {code(result['model_uri'])} ({markdown(', '.join(result['aliases']) or 'no alias')})"
    note = [] if new else ["- nothing was trained: this commit's data, settings and code had been evaluated before"]
    return "\n".join([*lines, "", model, *note, *_facts_lines(request)]) + "\n"


def state_words(result: FinishedRun) -> str:
    """The state of the decision in words, such as `gate failed`."""
    return result["decided"]["state"].replace("_", " ")


def _found(rule: Rule) -> str:
    value = rule["found"]
    return "" if value is None else f"{value:.4g}"
