"""`kubealign data add`, `remove` and `rename`: a team's own sources, with a preview before anything is written.

Everything is first staged in a scratch folder with the layout of data/: the converted rows, the lock file that names
them, and the output of `prepare`; this is compared with the current data. After confirmation, and if the data are still
those that were compared, the rows move to data/added, DVC tracks them, sources.lock names them, and `dvc repro`
prepares the data. Every one of these steps is idempotent, so running an interrupted command again completes it.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

from components.common.errors import InputError, InterruptedRunError, KubealignError
from components.common.files import replacing, replacing_folder, sha256_file, write_text
from components.config.params import Config
from components.dataset.records import NO_DATA, SPLITS, iter_lines, write_lines
from components.prepare.convert import QUARANTINE, Converted, RowDefaults, convert_files
from components.prepare.sources import ADDED, ROWS_FILES, Added, Sources, added_rows, read_sources, record_added
from components.prepare.stage import prepare_data
from components.sources.base_model import EMBEDDED
from components.sources.data import DATA_SETS
from components.tracking import store
from components.tracking.run import NoOpRun
from pipelines.data.versions import SliceKey, compare
from pipelines.quiet import QUIET
from pipelines.terminal import terminal

KNOWN = ("sources.lock", "splits.lock", "statistics.json", "decontaminate.jsonl")
"""Files of the data folder that `prepare` reads."""
BUSY = re.compile(r"acquire lock|is busy, it is being blocked")
"""DVC's messages while another DVC process works on the same repository."""
REMEDIES = {
    r"RWLock-file '(.+?)'": r"if no other DVC process works on this project, `rm \1`; ",
    r"output '(.+?)' is already tracked by SCM": r"`git rm -r --cached \1` leaves it to DVC; ",
}
"""Failures of DVC that it does not get out of by itself, and what does."""
WAIT_S = 600
RETRY_EVERY_S = 2
NAME = re.compile(r"\w[\w.-]*")
ENDINGS = re.compile(r"(?:\.(?:jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst|bz2|xz))+$", re.IGNORECASE)
"""Of a file's name, which are no part of the source's name."""
IGNORED = "*\n!.gitignore\n!*.dvc\n"
"""data/added/.gitignore."""


@dataclass(frozen=True)
class PairFinding:
    """A validation check that some of the new pairs fail."""

    check: str
    severity: str
    rows: int
    advice: str


@dataclass(frozen=True)
class Preview:
    """The effect that a change of the sources would have."""

    converted: dict[str, Converted]
    """The converted files of each added source."""
    removed: dict[str, int]
    """Sources that go, and those that are replaced, with their rows."""
    sides: dict[str, int]
    """Preference pairs in each split."""
    difference: dict[SliceKey, Counter[str]]
    findings: list[PairFinding] | None
    """The checks of `validate` that the new rows fail; None if they could not be run here."""
    refusals: list[str]
    """Why a run with these data would stop."""
    known: bool
    """Whether the lock file already names exactly these rows."""


Stage = Callable[[Sources, Path], dict[str, Converted]]
"""Fills a staged data folder; returns what it converted."""


def add(
    root: Path, config: Config, files: list[Path], defaults: RowDefaults, confirm: Callable[[Preview], bool]
) -> dict[str, Path] | None:
    """Add files to the data.

    Args:
        root: the project's folder; its data is in root/data.
        config: the settings of `prepare` and `validate`.
        files: the team's files.
        defaults: values for rows that lack them; an empty source is taken from each file's name.
        confirm: called with the preview; returns whether to write. Called again if the data changed meanwhile.

    Returns:
        the folder of each added source, or None if not confirmed.

    Raises:
        InputError: a file is unusable; nothing is written.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """

    def stage(sources: Sources, staged: Path) -> dict[str, Converted]:
        converted = {}
        for name, paths in _files_by_source(files, defaults, sources).items():
            folder = staged / ADDED / name
            folder.mkdir()
            converted[name], added = convert_files(paths, replace(defaults, source=name), folder, _print)
            _check_quarantined(name, converted[name], config.validate_.max_quarantined)
            record_added(staged / "sources.lock", {name: added})
        return converted

    return _change(root, config, stage, confirm)


def remove(root: Path, config: Config, name: str, confirm: Callable[[Preview], bool]) -> dict[str, Path] | None:
    """Take an added source out of the data, with its rows.

    Raises:
        InputError: there is no such source.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """

    def stage(sources: Sources, staged: Path) -> dict[str, Converted]:
        if name in sources.added or not _is_left(root, name):
            _expect_added(sources, name)
            record_added(staged / "sources.lock", {name: None})
        return {}

    return _change(root, config, stage, confirm)


def rename(
    root: Path, config: Config, name: str, new: str, confirm: Callable[[Preview], bool]
) -> dict[str, Path] | None:
    """Give an added source another name, also in its rows.

    Raises:
        InputError: there is no such source, or the new name cannot be one or is taken.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """

    def stage(sources: Sources, staged: Path) -> dict[str, Converted]:
        if new in sources.added and name not in sources.added and _is_left(root, name):
            return {}
        entry = _expect_added(sources, name)
        _expect_name(new, f"the source {name}", sources, "choose another name")
        if new in sources.added:
            raise InputError(f"data/sources.lock already has a source named {new}; choose another name")
        rows_file = ROWS_FILES[entry.kind]
        before, folder = added_rows(root / "data", name, entry).parent, staged / ADDED / new
        folder.mkdir()
        write_lines(
            folder / rows_file,
            (row | {"source": new} if row["source"] == name else row for _, row in iter_lines(before / rows_file)),
        )
        if (before / QUARANTINE).exists():
            shutil.copyfile(before / QUARANTINE, folder / QUARANTINE)
        renamed = entry.model_copy(update={"sha256": sha256_file(folder / rows_file)})
        record_added(staged / "sources.lock", {name: None, new: renamed})
        return {new: Converted(entry.kind, rows=entry.rows, sources={new})}

    return _change(root, config, stage, confirm)


def _change(root: Path, config: Config, stage: Stage, confirm: Callable[[Preview], bool]) -> dict[str, Path] | None:
    """Stage, ask, and write if the data are still those that were asked about; else stage and ask again."""
    data = root / "data"
    scratch = store.home() / "workspace"
    scratch.mkdir(parents=True, exist_ok=True)
    with _interruptible():
        while True:
            with tempfile.TemporaryDirectory(prefix="add-", dir=scratch) as temporary:
                staged = Path(temporary) / "data"
                seen = _fingerprint(data)
                preview = _stage(data, staged, config, stage)
                if not confirm(preview):
                    return None
                with _only_writer(root):
                    if _fingerprint(data) == seen:
                        return _write(root, staged, list(preview.converted))
                _print("somebody changed the data meanwhile: they are looked at again")


def _fingerprint(data: Path) -> list[str]:
    """The state of the files that `prepare` reads."""
    return [sha256_file(data / file) if (data / file).exists() else "" for file in KNOWN]


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    """Let one command of a project write at a time."""
    lock = root / ".dvc" / "tmp" / "kubealign-data.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stage(data: Path, staged: Path, config: Config, stage: Stage) -> Preview:
    """Prepare the changed data in the folder `staged`.

    The rows of a source that goes or is replaced are not read: they may be gone, or half replaced.
    """
    sources = read_sources(data / "sources.lock")
    (staged / ADDED).mkdir(parents=True)
    for file in KNOWN:
        if (data / file).exists():
            shutil.copyfile(data / file, staged / file)
    converted = stage(sources, staged)
    changed = read_sources(staged / "sources.lock")
    for name, added in changed.added.items():
        if name not in converted:
            (staged / ADDED / name).symlink_to(added_rows(data, name, added).resolve().parent)
    no_other_source = not config.prepare.preferences and sources.added.keys() <= converted.keys()
    if not no_other_source and not (data / "preferences").is_dir():
        raise InputError(f"{data}/preferences: not found; {NO_DATA}")
    try:
        prepare_data(config.prepare, staged)
    except InputError as error:  # what the user has to mend is not the copy
        raise InputError(str(error).replace(str(staged), str(data))) from error
    sides = {split: _count_lines(staged / "preferences" / f"{split}.jsonl") for split in SPLITS}
    if empty := [split for split, pairs in sides.items() if not pairs]:
        raise InputError(
            f"{', '.join(f'{pairs} pairs in {split}' for split, pairs in sides.items())}: nothing would be left for"
            f" {' and '.join(empty)}; add more pairs at once, or change prepare.split"
        )
    new_sources = set().union(*(result.sources for result in converted.values()))
    removed = {name: entry.rows for name, entry in sources.added.items() if changed.added.get(name) != entry}
    findings, refused = _findings(data, staged, config, new_sources)
    return Preview(converted, removed, sides, compare(data, staged), findings, refused, changed == sources)


def _findings(
    data: Path, staged: Path, config: Config, sources: set[str]
) -> tuple[list[PairFinding] | None, list[str]]:
    """The checks of `validate` that these sources' rows fail, and why it would stop a run.

    The first is None without a tokenizer here or rows in every split.
    """
    from components.validate.stage import check_rows, refusals, summarize

    base = data / "base_model" if config.model.base == EMBEDDED else Path(config.model.base).expanduser()
    split_files = [staged / name / f"{split}.jsonl" for name in DATA_SETS for split in SPLITS]
    if not base.is_dir() or not all(path.stat().st_size for path in split_files):
        return None, []
    checked = check_rows(config.validate_, config.model.max_length, staged, base, NoOpRun("validate"))
    rows: Counter[str] = Counter()
    checks = {}
    for name, table in checked.sets.items():
        is_new = np.isin(
            table.columns["source"], [index for index, source in enumerate(table.names["source"]) if source in sources]
        )
        for check in checked.checks[name]:
            # The chosen answers of the pairs are instructions as well: counted once.
            found = int(is_new[checked.failed[name][check.name]].sum())
            rows[check.name] = max(rows[check.name], found)
            checks[check.name] = check
    findings = [
        PairFinding(name, check.severity, rows[name], check.advice) for name, check in checks.items() if rows[name]
    ]
    return findings, [str(error) for error in refusals(config.validate_, summarize(checked))]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _is_left(root: Path, name: str) -> bool:
    """Whether an interrupted command took a source out of the lock file but not yet its rows."""
    return (root / "data" / ADDED / f"{name}.dvc").exists()


def _expect_added(sources: Sources, name: str) -> Added:
    if name not in sources.added:
        known = ", ".join(sources.added) or "none"
        raise InputError(f"data/sources.lock has no added source named {name}; expected one of: {known}")
    return sources.added[name]


def _write(root: Path, staged: Path, names: list[str]) -> dict[str, Path]:
    """Move the staged sources into the data, have DVC track them, drop those that are gone, and prepare the data."""
    data = root / "data"
    written = {name: data / ADDED / name for name in names}
    (data / ADDED).mkdir(exist_ok=True)
    write_text(data / ADDED / ".gitignore", IGNORED)  # the rows themselves are DVC's from the first moment
    for partial_folder in (data / ADDED).glob(".*/"):
        shutil.rmtree(partial_folder)  # of a command that was killed while it wrote
    for name, folder in written.items():
        with replacing_folder(folder) as staging:
            for path in sorted((staged / ADDED / name).iterdir()):
                shutil.move(path, staging / path.name)
    if written:
        _dvc(root, "add", *(folder.relative_to(root).as_posix() for folder in written.values()))
    left = read_sources(staged / "sources.lock").added
    with replacing(data / "sources.lock") as staging:
        shutil.copyfile(staged / "sources.lock", staging)
    _dvc(root, "repro", "prepare")
    for tracked in (data / ADDED).glob("*.dvc"):
        if tracked.stem not in left:
            tracked.unlink()
            shutil.rmtree(data / ADDED / tracked.stem, ignore_errors=True)
    return written


def _files_by_source(files: list[Path], defaults: RowDefaults, sources: Sources) -> dict[str, list[Path]]:
    """The files of each source."""
    by_source: dict[str, list[Path]] = {}
    for path in files:
        name = defaults.source or unicodedata.normalize("NFC", ENDINGS.sub("", path.name))
        _expect_name(name, str(path), sources, "name it with --source")
        if by_source.get(name) and not defaults.source:
            raise InputError(f"{by_source[name][0]} and {path} would both be source {name}; name it with --source")
        by_source.setdefault(name, []).append(path)
    return by_source


def _expect_name(name: str, what: str, sources: Sources, advice: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(
            f"{what}: {name!r} cannot be a source name, which is made of letters, digits and . _ -; {advice}"
        )
    if name in sources.preferences | sources.instructions:
        raise InputError(f"data/sources.lock already has a source named {name}; {advice}")


def _check_quarantined(name: str, converted: Converted, max_quarantined: float) -> None:
    share = converted.quarantined / (converted.rows + converted.quarantined)
    if share > max_quarantined:
        reason, count = converted.reasons.most_common(1)[0]
        what = "pairs" if converted.kind == "preferences" else "instructions"
        raise InputError(
            f"{name}: {converted.quarantined} of {converted.rows + converted.quarantined} rows cannot be converted to"
            f" {what} ({share:.1%}; validate.max_quarantined allows {max_quarantined:.1%}); most common reason ({count}"
            f" rows): {reason}, first at {converted.first[reason]}"
        )


def _print(sentence: str) -> None:
    print(terminal(sentence), flush=True)


def _dvc(root: Path, *args: str) -> None:
    """Run DVC with this environment's programs first on the PATH of its stages.

    Waits while another DVC process, which a killed command may have left, works on this project.
    """
    deadline = time.monotonic() + WAIT_S
    code, output = _run_dvc(root, args)
    while code and BUSY.search(output) and time.monotonic() < deadline:
        print("waiting for another DVC process in this project", flush=True)
        time.sleep(RETRY_EVERY_S)
        code, output = _run_dvc(root, args)
    if code:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        reason = next((line for line in lines if line.lower().startswith("error: ")), " ".join(lines[-3:]))
        reason = re.sub("^error: +", "", reason, flags=re.IGNORECASE)
        remedy = next((match.expand(how) for what, how in REMEDIES.items() if (match := re.search(what, reason))), "")
        raise KubealignError(
            f"`dvc {' '.join(args)}` failed: {reason}; {remedy}once that is mended, run the same command to resume"
        )


def _run_dvc(root: Path, args: tuple[str, ...]) -> tuple[int, str]:
    """Run DVC once; returns its exit code and its whole output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = QUIET | os.environ | {"PATH": path}
    environment[store.HOME_VARIABLE] = str(store.home())
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "dvc", *args],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    return child.returncode, output


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise `InterruptedRunError`, so that scratch files and children are cleaned up."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise InterruptedRunError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
