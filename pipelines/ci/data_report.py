"""`kubealign ci data-report`: what a pull request does to the data, and whether validation takes it; as Markdown.

Refused rows are named by file, line and id, with the checks that they fail; nothing that a row says is repeated.
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
from components.config.params import PARAMS, Config, load_config
from components.tracking import store
from components.tracking.run import KFP_RUN_VARIABLE, PARENT_VARIABLES
from pipelines.ci.plan import data_changed
from pipelines.ci.revisions import Revision, default_base, find_repository, is_own
from pipelines.data.versions import KINDS, diff
from pipelines.git import find_commit
from pipelines.local.runner import with_absolute_paths
from pipelines.quiet import QUIET

MARKER = "<!-- kubealign:data -->"
MAX_ROWS = 50
"""Refused rows that are listed; the others are counted."""
ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Report:
    """The Markdown text, and whether validation takes the data."""

    text: str
    accepted: bool


def data_report(root: Path, base: str, head: str) -> Report:
    """Compare the data of two commits and validate the later one's.

    Args:
        root: the project's folder.
        base: a commit; empty for where the head left the main branch.
        head: a commit.

    Raises:
        InputError: no such commit, or the data is another repository's.
    """
    config = load_config(root / PARAMS)
    repo, folder = find_repository(root)
    last = find_commit(repo, head)
    first = find_commit(repo, base) if base.strip("0") else default_base(repo, last)
    if not is_own(repo, folder, config.data.repo):
        raise InputError(f"data.repo={config.data.repo} is another repository: report on the data there")
    unchanged = not data_changed(Revision(repo, folder, first), Revision(repo, folder, last))
    lines = [MARKER, f"## Data: `{first[:12]}` → `{last[:12]}`", ""]
    if unchanged:
        return Report("\n".join([*lines, "Neither the data nor its settings change.", ""]), accepted=True)
    try:
        lines += _difference(config, root, first, last)
        accepted, found = _validation(root, config, last)
    except InputError as error:
        accepted, found = False, [f"**Refused**: {error}"]
    lines += ["", f"## Validation: {'accepted' if accepted else 'refused'}", "", *found]
    return Report("\n".join(lines) + "\n", accepted)


def _difference(config: Config, root: Path, base: str, head: str) -> list[str]:
    """Markdown lines: rows added, removed and changed, by data set, language and source."""
    data = config.data.model_copy(update={"repo": str(root)})
    found = diff(data, base, head)
    if not found:
        return ["No row of the data changes."]
    lines = ["| data set | language | source | added | removed | changed |", "|---|---|---|---:|---:|---:|"]
    total: Counter[str] = Counter()
    for place, counts in found.items():
        total += counts
        lines.append(f"| {' | '.join([*map(_word, place), *(str(counts[kind]) for kind in KINDS)])} |")
    return [*lines, f"| all | | | {' | '.join(str(total[kind]) for kind in KINDS)} |"]


def _word(text: str) -> str:
    """A word that the data gives, if it is one: a report must not show, nor a table break at, what rows hold."""
    return text if re.fullmatch(r"[\w.-]{1,60}", text) else "(other)"


def _object(line: str) -> JsonObject:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _validation(root: Path, config: Config, commit: str) -> tuple[bool, list[str]]:
    """Fetch and validate the data of a commit, in processes and an MLflow of their own."""
    with TemporaryDirectory(prefix="kubealign-") as temporary:
        folder = Path(temporary)
        sections = with_absolute_paths(config, root).sections()
        sections["data"] |= {"repo": str(root), "revision": commit}
        (folder / PARAMS).write_text(yaml.safe_dump(sections, allow_unicode=True), encoding="utf-8")
        common = ["--params", str(folder / PARAMS)]
        fetched = ["--dataset", str(folder / "dataset"), "--base", str(folder / "base")]
        problem = _step(folder, "fetch", "--out", str(folder), *common)
        if problem:
            return False, [f"**The data cannot be had**: {problem}"]
        problem = _step(folder, "validate", *fetched, "--out", str(folder / "out"), *common)
        lines = [f"**Refused**: {problem}", ""] if problem else []
        lines += _refused(folder)
        report = folder / "out" / "report.md"
        if report.is_file():
            lines += [line for line in report.read_text(encoding="utf-8").splitlines() if not line.startswith("# ")]
        return not problem, lines


def _step(folder: Path, *words: str) -> str:
    """Run a stage; returns its error message, or nothing."""
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", store.HOME_VARIABLE: str(folder / "home")}
    if os.environ.get("MLFLOW_TRACKING_URI"):  # a base model may be in the team's registry; runs are not for it
        own.setdefault("MLFLOW_REGISTRY_URI", os.environ.get("MLFLOW_REGISTRY_URI") or store.tracking_uri())
    unwanted = (*PARENT_VARIABLES, KFP_RUN_VARIABLE)
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "components", *words],
        env=QUIET | inherited | own,
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.returncode:
        return ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else f"{words[0]} ended with code {done.returncode}"
    return store.without_credentials(said).replace(f"{folder}/", "")


def _refused(folder: Path) -> list[str]:
    """A table of the rows that validation set aside: where they stand and why."""
    file = folder / "out" / "clean" / "quarantine.jsonl"
    rows = [_object(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if not rows:
        return []
    counts = Counter(str(reason) for row in rows for reason in row["reasons"])
    lines = [f"{len(rows)} rows set aside: {', '.join(f'{name} {n}' for name, n in counts.most_common())}", ""]
    lines += ["| file | line | row | checks |", "|---|---:|---|---|"]
    rows = [row for row in rows if row["reasons"] != ["too_long"]]
    places = {name: _lines_of(folder / "dataset" / name) for name in {_file(row) for row in rows[:MAX_ROWS]}}
    for row in rows[:MAX_ROWS]:
        name, value = _file(row), row.get("row")
        identity = str(value.get("id")) if isinstance(value, dict) else ""
        line = row.get("line") or places[name].get(json.dumps(value, sort_keys=True), "")
        shown = identity if ID.fullmatch(identity) else "(no id)"
        lines.append(f"| data/{name} | {line} | {shown} | {', '.join(map(str, row['reasons']))} |")
    if len(rows) > MAX_ROWS:
        lines.append(f"\n… and {len(rows) - MAX_ROWS} more")
    return [*lines, ""]


def _file(row: JsonObject) -> str:
    return f"{row['data_set']}/{row['split']}.jsonl"


def _lines_of(path: Path) -> dict[str, int]:
    """The line number of every row of a file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return {json.dumps(_object(line), sort_keys=True): n for n, line in enumerate(lines, start=1) if line.strip()}
