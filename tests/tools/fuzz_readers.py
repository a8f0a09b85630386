"""Fuzz the readers of rows with atheris: `python tests/tools/fuzz_readers.py CORPUS -max_total_time=120`."""

import sys
import tempfile
from pathlib import Path

from components.common.errors import InputError
from components.dataset.records import Preference, read_lines, read_rows
from components.prepare.convert import RowDefaults, convert_files
from components.prepare.formats import FORMATS
from components.prepare.sources import ROWS_FILES, SourceKind


def read_everything(content: bytes, folder: Path) -> None:
    """Read bytes with every reader; an error that is not meant for a person goes through."""
    path = folder / "fuzzed.jsonl"
    path.write_bytes(content)
    for read in (read_lines, lambda file: read_rows(file, Preference)):
        try:
            read(path)
        except InputError as error:
            _assert_readable(error)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    kinds: list[tuple[str, SourceKind]] = [("", "preferences"), ("", "instructions")]
    kinds += [(name, entry.kind) for name, entry in FORMATS.items() if entry.kind != "unpaired"]
    for format_name, kind in kinds:
        try:
            done, added = convert_files([path], RowDefaults(format_name, "auto", "MIT", "fuzzed", kind), out, print)
            assert added.rows == done.rows == len(read_lines(out / ROWS_FILES[kind]))
        except InputError as error:
            _assert_readable(error)


def _assert_readable(error: InputError) -> None:
    message = str(error)
    assert "fuzzed.jsonl" in message and "\n" not in message and len(message) < 1000, message[:2000]


def main() -> None:
    """The loop of the fuzzer; it ends the process."""
    import atheris

    with tempfile.TemporaryDirectory(prefix="kubealign-") as folder:
        atheris.instrument_all()
        atheris.Setup(sys.argv, lambda content: read_everything(content, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
