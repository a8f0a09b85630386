"""MLflow's SQLite file on this machine: its tables are made once, and its paths go with the folder that holds them.

MLflow stores where artifacts are as absolute paths. A home folder that was moved or copied would go on writing into the
old one, and read from there; so whoever opens it first at a new place re-bases them.
"""

import fcntl
import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components.common.errors import InputError
from components.common.foreign import one_line

ARTIFACTS = "mlartifacts"
"""Folder in the home folder with the artifacts of runs and models."""
IN_USE = ".in-use.lock"
"""File in the home folder that is locked while a run lives."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
"""Columns in which MLflow keeps absolute paths that it reads and writes."""


def check_path(database: Path) -> None:
    """Check that MLflow can have a file at this path, which it reads as a URL.

    Raises:
        InputError: it cannot.
    """
    text = str(database)
    found = re.search(r"\?|%[0-9A-Fa-f]{2}|[\x00-\x1f\x7f]|[\ud800-\udfff]", text)
    if found:
        raise InputError(
            f"{text}: MLflow cannot keep its file in a folder whose name holds {found[0]!r}, which it reads as part of"
            " a URL; rename the folder, or set KUBEALIGN_HOME to another one"
        )


def prepare(database: Path, home: Path) -> None:
    """Make MLflow's tables if there are none, and re-base its paths if the home folder was moved or copied.

    Args:
        database: MLflow's SQLite file.
        home: the home folder, whose artifacts it lists.

    Raises:
        InputError: a run is using the home folder at its other place.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    if _is_ready(database) and not _left(database, home):
        return
    with _locked(database.with_name(f"{database.name}.lock")):
        if not _is_ready(database):
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            # MLflow's own choice is a folder in the current one, which it puts into SQL with Python's quotation marks.
            SqlAlchemyStore(f"sqlite:///{database}", (home / ARTIFACTS).as_uri())
        for old in _left(database, home):
            _rebase(database, old, home)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_ready(database: Path) -> bool:
    """Whether MLflow has made its tables; the first experiment is the last thing that it makes."""
    return bool(_locations(database))


def _locations(database: Path) -> list[str]:
    if not database.is_file():
        return []
    try:
        with closing(sqlite3.connect(database)) as connection:
            found = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    except sqlite3.OperationalError:  # no such table
        return []
    return [str(location) for (location,) in found]


def _left(database: Path, home: Path) -> list[Path]:
    """Other home folders that experiments have their artifacts in, and that are this one before it was moved or
    copied.
    """
    found = set()
    for location in _locations(database):
        scheme, _, path, _, _ = urlsplit(location)
        root = re.sub(r"/\d+$", "", path)
        if scheme == "file" and root.endswith(f"/{ARTIFACTS}"):
            found.add(Path(unquote(root)).parent)
    return sorted(old for old in found - {home} if _was(home, old, database))


def _was(home: Path, old: Path, database: Path) -> bool:
    """Whether a home folder was another one before it was moved or copied; several may share a file elsewhere."""
    if database.parent == home:
        return True
    if not old.exists():
        return (home / ARTIFACTS).is_dir()
    beside = database.is_relative_to(home.parent)
    return beside and (old.parent / database.relative_to(home.parent)).is_file()


def _rebase(database: Path, old: Path, home: Path) -> None:
    before, after = (f"{(folder / ARTIFACTS).as_uri()}" for folder in (old, home))
    with _alone(home), closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in LOCATIONS:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608 - names of ours
                f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
            )
    what = "is a copy of" if old.exists() else "was moved from"
    sentence = f"{home} {what} {old}: the artifacts of all its runs and models are now read and written here"
    print(one_line(sentence), file=sys.stderr, flush=True)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the home folder as no run does, which would go on writing to where it began."""
    with (home / IN_USE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{home}: a run is using it under another path; wait for it, and try again") from error
        yield
