"""`kubealign ci data-report`: a Markdown report of what a pull request changes in the data and whether validation
accepts it.

Quarantined rows are listed by file, line and id, with the checks that they fail; their text is never quoted.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from components.common.documents import JsonObject
from components.common.errors import InputError
from components.common.secrets import without_credentials
from components.config.params import PARAMS, Config, load_config
from components.report.markdown import code, markdown, table_row
from components.tracking import store
from components.tracking.run import PARENT_VARIABLES
from components.tracking.store import KFP_RUN_VARIABLE
from pipelines.ci.plan import data_changed
from pipelines.ci.revisions import Revision, default_base, find_repository, is_own
from pipelines.data.versions import KINDS, diff
from pipelines.git import find_commit
from pipelines.local.runner import with_absolute_paths
from pipelines.quiet import QUIET
from pipelines.terminal import document

MARKER = "<!-- kubealign:data -->"
MAX_ROWS = 50
"""Quarantined rows to list; the rest are only counted."""
ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Report:
    """The Markdown text, and whether validation accepts the data."""

    text: str
    accepted: bool


def data_report(root: Path, base: str, head: str) -> Report:
    """Compare the data of two commits and validate the later one's.

    Args:
        root: the project's folder.
        base: a commit; empty for the point where the head branched off the main branch.
        head: a commit.

    Raises:
        InputError: no such commit, or the data is in another repository.
    """
    config = load_config(root / PARAMS)
    repo, folder = find_repository(root)
    head_commit = find_commit(repo, head)
    base_commit = find_commit(repo, base) if base.strip("0") else default_base(repo, head_commit)
    if not is_own(repo, folder, config.data.repo):
        raise InputError(f"data.repo={config.data.repo} is another repository; run the report in that one")
    old, new = Revision(repo, folder, base_commit), Revision(repo, folder, head_commit)
    lines = [MARKER, f"## Data: {code(base_commit[:12])} → {code(head_commit[:12])}", ""]
    unreadable = _unreadable(old)
    if not unreadable and not data_changed(old, new):
        return Report("\n".join([*lines, "Neither the data nor its settings changed.", ""]), accepted=True)
    try:
        if unreadable:
            lines.append(f"The rows cannot be compared: {markdown(unreadable)}")
        else:
            lines += _difference(config, root, base_commit, head_commit)
        accepted, findings = _validation(root, config, head_commit)
    except InputError as error:
        accepted, findings = False, [f"**Rejected**: {markdown(error)}"]
    lines += ["", f"## Validation: {'accepted' if accepted else 'rejected'}", "", *findings]
    return Report("\n".join(lines) + "\n", accepted)


def _unreadable(base: Revision) -> str:
    """Why a commit, such as one with conflict markers in dvc.lock, cannot be compared with; empty if it can."""
    try:
        data_changed(base, base)
    except InputError as error:
        return str(error)
    return ""


def _difference(config: Config, root: Path, base: str, head: str) -> list[str]:
    """Markdown lines: rows added, removed and changed, by data set, language and source."""
    data = config.data.model_copy(update={"repo": str(root)})
    difference = diff(data, base, head)
    if not difference:
        return ["No rows changed."]
    lines = ["| data set | language | source | added | removed | changed |", "|---|---|---|---:|---:|---:|"]
    total: Counter[str] = Counter()
    for key, counts in difference.items():
        total += counts
        lines.append(table_row(*key, *(counts[kind] for kind in KINDS)))
    return [*lines, table_row("all", "", "", *(total[kind] for kind in KINDS))]


def _object(line: str) -> JsonObject:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _validation(root: Path, config: Config, commit: str) -> tuple[bool, list[str]]:
    """Fetch and validate the data of a commit, in separate processes with a temporary MLflow store."""
    with TemporaryDirectory(prefix="kubealign-") as temporary:
        folder = Path(temporary)
        sections = with_absolute_paths(config, root).sections()
        sections["data"] |= {"repo": str(root), "revision": commit}
        (folder / PARAMS).write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8")
        common = ["--params", str(folder / PARAMS)]
        inputs = ["--dataset", str(folder / "dataset"), "--base", str(folder / "base")]
        problem = _step(folder, "fetch", "--out", str(folder), *common)
        if problem:
            return False, [f"**The data cannot be fetched**: {markdown(problem)}"]
        problem = _step(folder, "validate", *inputs, "--out", str(folder / "out"), *common)
        lines = [f"**Rejected**: {markdown(problem)}", ""] if problem else []
        lines += _quarantine_lines(folder)
        report = folder / "out" / "report.md"
        if report.is_file():
            lines += [
                document(line) for line in report.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")
            ]
        return not problem, lines


def _step(folder: Path, *args: str) -> str:
    """Run a stage; returns its error message, or an empty string."""
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", store.HOME_VARIABLE: str(folder / "home")}
    if os.environ.get("MLFLOW_TRACKING_URI"):  # the base model may be in the team's registry
        own.setdefault("MLFLOW_REGISTRY_URI", os.environ.get("MLFLOW_REGISTRY_URI") or store.tracking_uri())
    not_inherited = (*PARENT_VARIABLES, KFP_RUN_VARIABLE)
    inherited = {name: value for name, value in os.environ.items() if name not in not_inherited}
    process = subprocess.run(
        [sys.executable, "-P", "-m", "components", *args],
        env=QUIET | inherited | own,
        capture_output=True,
        text=True,
        check=False,
    )
    if not process.returncode:
        return ""
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    message = errors[-1].removeprefix("error: ") if errors else f"{args[0]} exited with code {process.returncode}"
    return without_credentials(message).replace(f"{folder}/", "")


def _quarantine_lines(folder: Path) -> list[str]:
    """A Markdown table of the rows that validation quarantined: file, line, id and failed checks."""
    file = folder / "out" / "clean" / "quarantine.jsonl"
    rows = [_object(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not rows:
        return []
    counts = Counter(str(reason) for row in rows for reason in row["reasons"])
    checks = ", ".join(f"{name} {n}" for name, n in counts.most_common())
    lines = [f"{len(rows)} rows quarantined: {markdown(checks)}", ""]
    lines += ["| file | line | row | checks |", "|---|---:|---|---|"]
    rows = [row for row in rows if row["reasons"] != ["too_long"]]
    line_numbers = {name: _line_numbers(folder / "dataset" / name) for name in {_file(row) for row in rows[:MAX_ROWS]}}
    for row in rows[:MAX_ROWS]:
        name, value = _file(row), row.get("row")
        identity = str(value.get("id")) if isinstance(value, dict) else ""
        line = row.get("line") or line_numbers[name].get(json.dumps(value, sort_keys=True), "")
        shown = identity if ID.fullmatch(identity) else "(no id)"
        lines.append(table_row(f"data/{name}", line, shown, ", ".join(map(str, row["reasons"]))))
    if len(rows) > MAX_ROWS:
        lines.append(f"\n… and {len(rows) - MAX_ROWS:d} more")
    return [*lines, ""]


def _file(row: JsonObject) -> str:
    return f"{row['data_set']}/{row['split']}.jsonl"


def _line_numbers(path: Path) -> dict[str, int]:
    """The line number of every row of a file, by the row as JSON with sorted keys."""
    texts = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return {json.dumps(_object(text), sort_keys=True): n for n, text in enumerate(texts, start=1) if text.strip()}
