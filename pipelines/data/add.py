"""`kubealign data add`: add a team's own pairs as a source of the data, with a preview before anything is written.

Everything is first staged in a scratch folder with the layout of data/: the converted pairs, the lock file that names
them, and the output of `prepare`; this is compared with the current data. After confirmation the pairs move to
data/added, DVC tracks them, sources.lock names them, and `dvc repro` prepares the data. Every one of these steps is
idempotent, so running an interrupted command again completes it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

from components.common.errors import InputError, InterruptedRunError, KubealignError
from components.common.files import replacing, replacing_folder
from components.config.params import Config
from components.dataset.records import SPLITS
from components.prepare.convert import Converted, RowDefaults, convert_files
from components.prepare.sources import ADDED, Sources, added_rows, read_sources, record_added
from components.prepare.stage import prepare_data
from components.sources.base_model import EMBEDDED
from components.sources.data import DATA_SETS
from components.tracking import store
from components.tracking.run import NoOpRun
from pipelines.data.versions import SliceKey, compare
from pipelines.quiet import QUIET

KNOWN = ("sources.lock", "splits.lock", "statistics.json", "decontaminate.jsonl")
"""Files of the data folder that `prepare` reads."""
BUSY = re.compile(r"acquire lock|is busy, it is being blocked")
"""DVC's messages while another DVC process works on the same repository."""
WAIT_S = 600
RETRY_EVERY_S = 2
NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class PairFinding:
    """A validation check that some of the new pairs fail."""

    check: str
    severity: str
    rows: int
    advice: str


@dataclass(frozen=True)
class Preview:
    """The effect that adding would have: each source's converted files, and the rows that differ."""

    converted: dict[str, Converted]
    difference: dict[SliceKey, Counter[str]]
    findings: list[PairFinding] | None
    """The checks of `validate` that the new pairs fail; None if they could not be run here."""
    known: bool
    """Whether the lock file already names exactly these pairs."""


def add(
    root: Path, config: Config, files: list[Path], defaults: RowDefaults, confirm: Callable[[Preview], bool]
) -> dict[str, Path] | None:
    """Add files to the data.

    Args:
        root: the project's folder; its data is in root/data.
        config: the settings of `prepare`, and the accepted share of bad rows.
        files: the team's files.
        defaults: values for rows that lack them; an empty source is taken from each file's name.
        confirm: called with the preview; returns whether to write.

    Returns:
        the folder of each added source, or None if not confirmed.

    Raises:
        InputError: a file is unusable; nothing is written.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """
    data = root / "data"
    scratch = store.home() / "workspace"
    scratch.mkdir(parents=True, exist_ok=True)
    with _interruptible(), tempfile.TemporaryDirectory(prefix="add-", dir=scratch) as temporary:
        staged = Path(temporary) / "data"
        preview = _stage(data, staged, config, files, defaults)
        if not confirm(preview):
            return None
        return _write(root, staged, list(preview.converted))


def _stage(data: Path, staged: Path, config: Config, files: list[Path], defaults: RowDefaults) -> Preview:
    """Convert and prepare the data with the new files in the folder `staged`."""
    sources = read_sources(data / "sources.lock")
    files_by_source = _files_by_source(files, defaults, sources)
    no_other_source = not config.prepare.preferences and sources.added.keys() <= files_by_source.keys()
    if not no_other_source and not (data / "preferences").is_dir():
        raise InputError(f"{data}/preferences: not found; `make data` (dvc repro) makes it, `dvc pull` fetches it")
    (staged / ADDED).mkdir(parents=True)
    for file in KNOWN:
        if (data / file).exists():
            shutil.copyfile(data / file, staged / file)
    for name, added in sources.added.items():
        if name not in files_by_source:
            (staged / ADDED / name).symlink_to(added_rows(data, name, added).resolve().parent)
    converted = {}
    for name, paths in files_by_source.items():
        (staged / ADDED / name).mkdir()
        converted[name], added = convert_files(paths, replace(defaults, source=name), staged / ADDED / name, _print)
        _check_quarantined(name, converted[name], config.validate_.max_quarantined)
        record_added(staged / "sources.lock", name, added)
    prepare_data(config.prepare, staged)
    known = read_sources(staged / "sources.lock") == sources
    new_sources = set().union(*(result.sources for result in converted.values()))
    return Preview(converted, compare(data, staged), _findings(data, staged, config, new_sources), known)


def _findings(data: Path, staged: Path, config: Config, sources: set[str]) -> list[PairFinding] | None:
    """The checks of `validate` that these sources' pairs fail; None without a tokenizer here or rows in every split."""
    from components.validate.stage import check_rows

    base = data / "base_model" if config.model.base == EMBEDDED else Path(config.model.base).expanduser()
    split_files = [staged / name / f"{split}.jsonl" for name in DATA_SETS for split in SPLITS]
    if not base.is_dir() or not all(path.stat().st_size for path in split_files):
        return None
    checked = check_rows(config.validate_, config.model.max_length, staged, base, NoOpRun("validate"))
    preferences = checked.sets["preferences"]
    new_source_indices = [index for index, name in enumerate(preferences.names["source"]) if name in sources]
    is_new = np.isin(preferences.columns["source"], new_source_indices)
    counts = {name: int(is_new[rows].sum()) for name, rows in checked.failed["preferences"].items()}
    return [
        PairFinding(check.name, check.severity, counts[check.name], check.advice)
        for check in checked.checks["preferences"]
        if counts[check.name]
    ]


def _write(root: Path, staged: Path, names: list[str]) -> dict[str, Path]:
    """Move the staged sources into the data, have DVC track them, and prepare the data."""
    data = root / "data"
    written = {name: data / ADDED / name for name in names}
    (data / ADDED).mkdir(exist_ok=True)
    for partial_folder in (data / ADDED).glob(".*/"):
        shutil.rmtree(partial_folder)  # of a command that was killed while it wrote
    for name, folder in written.items():
        with replacing_folder(folder) as staging:
            for path in sorted((staged / ADDED / name).iterdir()):
                shutil.move(path, staging / path.name)
    _dvc(root, "add", *(folder.relative_to(root).as_posix() for folder in written.values()))
    with replacing(data / "sources.lock") as staging:
        shutil.copyfile(staged / "sources.lock", staging)
    _dvc(root, "repro", "prepare")
    return written


def _files_by_source(files: list[Path], defaults: RowDefaults, sources: Sources) -> dict[str, list[Path]]:
    """The files of each source."""
    by_source: dict[str, list[Path]] = {}
    for path in files:
        name = defaults.source or path.name.partition(".")[0]
        if not NAME.fullmatch(name):
            raise InputError(
                f"{path}: {name!r} cannot be a source name; set one with --source, made of letters, digits and . _ -"
            )
        if name in sources.preferences | sources.instructions:
            raise InputError(f"data/sources.lock already has a source named {name}; choose another name with --source")
        if by_source.get(name) and not defaults.source:
            raise InputError(f"{by_source[name][0]} and {path} would both be source {name}; name it with --source")
        by_source.setdefault(name, []).append(path)
    return by_source


def _check_quarantined(name: str, converted: Converted, max_quarantined: float) -> None:
    share = converted.quarantined / (converted.rows + converted.quarantined)
    if share > max_quarantined:
        reason, count = converted.reasons.most_common(1)[0]
        raise InputError(
            f"{name}: {converted.quarantined} of {converted.rows + converted.quarantined} rows cannot be converted to"
            f" {'pairs' if converted.kind == 'preferences' else 'instructions'} ({share:.1%}; validate.max_quarantined allows {max_quarantined:.1%}); most common reason"
            f" ({count} rows): {reason}, first at {converted.first[reason]}"
        )


def _print(sentence: str) -> None:
    print(sentence, flush=True)


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
        reason = re.sub("^error: ", "", reason, flags=re.IGNORECASE)
        raise KubealignError(f"`dvc {' '.join(args)}` failed: {reason}; run the same command to resume")


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
