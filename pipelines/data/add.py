"""`kubealign data add`: a team's own pairs become a source of the data, shown before anything is written.

Everything is made in a scratch folder that looks like data/: the converted pairs, the lock file that names them, and
what `prepare` makes of it all. That is compared with the data as it is. After the answer the pairs move to data/added,
DVC keeps them, sources.lock names them, and `dvc repro` makes the data. Each of these steps comes out the same when it
is done again, so an interrupted command is finished by giving it again.
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
from components.prepare.sources import ADDED, Sources, added_pairs, read_sources, record_added
from components.prepare.stage import prepare_data
from components.sources.base_model import EMBEDDED
from components.sources.data import DATA_SETS
from components.tracking import store
from components.tracking.run import NoOpRun
from pipelines.data.versions import Place, compare
from pipelines.quiet import QUIET

KNOWN = ("sources.lock", "splits.lock", "statistics.json", "decontaminate.jsonl")
"""What `prepare` reads of the data folder."""
BUSY = re.compile(r"acquire lock|is busy, it is being blocked")
"""What DVC says while another one works on the same repository."""
WAIT_S = 600
ASK_EVERY_S = 2
NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class PairFinding:
    """A check that some of the new pairs fail."""

    check: str
    severity: str
    rows: int
    advice: str


@dataclass(frozen=True)
class Preview:
    """What adding would do: what became of each source's files, and the rows that differ."""

    converted: dict[str, Converted]
    difference: dict[Place, Counter[str]]
    findings: list[PairFinding] | None
    """What the checks of `validate` say of the new pairs; None when they could not be run here."""
    known: bool
    """Whether the lock file names these very pairs already."""


def add(
    root: Path, config: Config, files: list[Path], facts: RowDefaults, agree: Callable[[Preview], bool]
) -> dict[str, Path] | None:
    """Add files to the data.

    Args:
        root: the project's folder; its data is in root/data.
        config: for `prepare`, and for the share of bad rows that is accepted.
        files: of the team.
        facts: for the rows that do not say it themselves; an empty source is taken from each file's name.
        agree: gets the preview, and says whether to write.

    Returns:
        the folder of each added source, or None when nothing was to be written.

    Raises:
        InputError: a file that cannot be used; nothing is written.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """
    data = root / "data"
    scratch = store.home() / "workspace"
    scratch.mkdir(parents=True, exist_ok=True)
    with _stoppable(), tempfile.TemporaryDirectory(prefix="add-", dir=scratch) as temporary:
        staged = Path(temporary) / "data"
        preview = _stage(data, staged, config, files, facts)
        if not agree(preview):
            return None
        return _write(root, staged, list(preview.converted))


def _stage(data: Path, staged: Path, config: Config, files: list[Path], facts: RowDefaults) -> Preview:
    sources = read_sources(data / "sources.lock")
    named = _named(files, facts, sources)
    first = not config.prepare.preferences and sources.added.keys() <= named.keys()
    if not first and not (data / "preferences").is_dir():
        raise InputError(f"{data}/preferences: not found; `make data` (dvc repro) makes it, `dvc pull` fetches it")
    (staged / ADDED).mkdir(parents=True)
    for file in KNOWN:
        if (data / file).exists():
            shutil.copyfile(data / file, staged / file)
    for name, added in sources.added.items():
        if name not in named:
            (staged / ADDED / name).symlink_to(added_pairs(data, name, added).resolve().parent)
    converted = {}
    for name, paths in named.items():
        (staged / ADDED / name).mkdir()
        converted[name], added = convert_files(paths, replace(facts, source=name), staged / ADDED / name, _print)
        _accept(name, converted[name], config.validate_.max_quarantined)
        record_added(staged / "sources.lock", name, added)
    prepare_data(config.prepare, staged)
    known = read_sources(staged / "sources.lock") == sources
    written = set().union(*(found.sources for found in converted.values()))
    return Preview(converted, compare(data, staged), _findings(data, staged, config, written), known)


def _findings(data: Path, staged: Path, config: Config, sources: set[str]) -> list[PairFinding] | None:
    """What `validate` will say of the pairs of these sources; it needs a tokenizer here, and rows on every side."""
    from components.validate.stage import check_rows

    base = data / "base_model" if config.model.base == EMBEDDED else Path(config.model.base).expanduser()
    sides = [staged / name / f"{split}.jsonl" for name in DATA_SETS for split in SPLITS]
    if not base.is_dir() or not all(path.stat().st_size for path in sides):
        return None
    checked = check_rows(config.validate_, config.model.max_length, staged, base, NoOpRun("validate"))
    found = checked.sets["preferences"]
    mine = [position for position, name in enumerate(found.names["source"]) if name in sources]
    is_mine = np.isin(found.columns["source"], mine)
    counts = {name: int(is_mine[rows].sum()) for name, rows in checked.failed["preferences"].items()}
    return [
        PairFinding(check.name, check.severity, counts[check.name], check.advice)
        for check in checked.checks["preferences"]
        if counts[check.name]
    ]


def _write(root: Path, staged: Path, names: list[str]) -> dict[str, Path]:
    data = root / "data"
    written = {name: data / ADDED / name for name in names}
    (data / ADDED).mkdir(exist_ok=True)
    for left in (data / ADDED).glob(".*/"):
        shutil.rmtree(left)  # of a command that was killed while it wrote
    for name, folder in written.items():
        with replacing_folder(folder) as aside:
            for path in sorted((staged / ADDED / name).iterdir()):
                shutil.move(path, aside / path.name)
    _dvc(root, "add", *(folder.relative_to(root).as_posix() for folder in written.values()))
    with replacing(data / "sources.lock") as aside:
        shutil.copyfile(staged / "sources.lock", aside)
    _dvc(root, "repro", "prepare")
    return written


def _named(files: list[Path], facts: RowDefaults, sources: Sources) -> dict[str, list[Path]]:
    """The files of each source."""
    named: dict[str, list[Path]] = {}
    for path in files:
        name = facts.source or path.name.partition(".")[0]
        if not NAME.fullmatch(name):
            raise InputError(f"{path}: {name!r} cannot name a source; name it with --source, in letters, digits, . _ -")
        if name in sources.preferences | sources.instructions:
            raise InputError(f"{name} is the name of a source in data/sources.lock; name yours otherwise with --source")
        if named.get(name) and not facts.source:
            raise InputError(f"{named[name][0]} and {path} would both be the source {name}; name it with --source")
        named.setdefault(name, []).append(path)
    return named


def _accept(name: str, converted: Converted, max_quarantined: float) -> None:
    share = converted.quarantined / (converted.pairs + converted.quarantined)
    if share > max_quarantined:
        reason, count = converted.reasons.most_common(1)[0]
        raise InputError(
            f"{name}: {converted.quarantined} rows of {converted.pairs + converted.quarantined} cannot be pairs"
            f" ({share:.1%}; validate.max_quarantined allows {max_quarantined:.1%}); most often ({count}): {reason},"
            f" first at {converted.first[reason]}"
        )


def _print(sentence: str) -> None:
    print(sentence, flush=True)


def _dvc(root: Path, *words: str) -> None:
    """Run DVC; the programs that its stages call are those of this environment.

    While another DVC is at work here (it may be what a killed command has left) it waits for that one.
    """
    deadline = time.monotonic() + WAIT_S
    code, said = _run_dvc(root, words)
    while code and BUSY.search(said) and time.monotonic() < deadline:
        print("waiting for another DVC process in this project", flush=True)
        time.sleep(ASK_EVERY_S)
        code, said = _run_dvc(root, words)
    if code:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        why = next((line for line in lines if line.lower().startswith("error: ")), " ".join(lines[-3:]))
        why = re.sub("^error: ", "", why, flags=re.IGNORECASE)
        raise KubealignError(f"`dvc {' '.join(words)}` failed: {why}; the same command goes on")


def _run_dvc(root: Path, words: tuple[str, ...]) -> tuple[int, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = QUIET | os.environ | {"PATH": path}
    environment[store.HOME_VARIABLE] = str(store.home())
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "dvc", *words],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    return child.returncode, said


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block in order, with its scratch folder and its children."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedRunError(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
