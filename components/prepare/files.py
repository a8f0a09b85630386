"""The rows of somebody else's files: JSON lines, JSON, CSV, TSV, Parquet; plain or packed by gzip, zstd, bzip2 or xz.

What a file is, its first bytes say; its name only tells CSV from TSV. Everything else is refused by name.
"""

import bz2
import codecs
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import orjson

from components.common.documents import JsonObject
from components.common.errors import InputError
from components.dataset.records import MAX_LINE_BYTES, is_too_deep, json_problem, lines_of
from components.dataset.rendered import parse_literal

Located = tuple[str, JsonObject, bytes]
"""Where a row stands, the row, and its own bytes (empty where a file has no such, as Parquet)."""

FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself: `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (or an Excel or Word file): unpack it, or save the table as CSV"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it"),
    (b"%PDF", "a PDF document"),
    (b"ARROW1", "an Arrow file: save it as Parquet or JSON lines"),
    (b"\xff\xff\xff\xff", "an Arrow stream: save it as Parquet or JSON lines"),
    (b"SQLite format 3", "an SQLite database: export the table as JSON lines or CSV"),
    (b"\x93NUMPY", "a NumPy array: save it as JSON lines"),
    (b"Obj\x01", "an Avro file: save it as Parquet or JSON lines"),
    (b"\x89HDF", "an HDF5 file: save it as Parquet or JSON lines"),
    (b"\x80\x02", "a Python pickle, which is never loaded: save it as JSON lines"),
    (b"\x80\x03", "a Python pickle, which is never loaded: save it as JSON lines"),
    (b"\x80\x04", "a Python pickle, which is never loaded: save it as JSON lines"),
    (b"\x80\x05", "a Python pickle, which is never loaded: save it as JSON lines"),
    (codecs.BOM_UTF16_LE, "text in UTF-16: save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (codecs.BOM_UTF16_BE, "text in UTF-16: save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
)
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "records")
"""Names under which one object holds the rows of a whole file."""
HTML = re.compile(rb"\s*<(?:!doctype\s+html|html|head|\?xml)", re.IGNORECASE)
PARQUET = b"PAR1"
ZSTD, BZIP2, XZ, GZIP = b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00", b"\x1f\x8b"
NO_SPACE = re.compile(r"[^ \t\r\n]")
LONGEST_LITERAL = 16
"""Characters at the end of a block that may look wrong because they are cut off, such as `-Infinit`."""
MAX_RATIO = 250
"""Most bytes that one compressed byte may become, on the whole, after `RATIO_FROM` bytes: beyond is a bomb."""
RATIO_FROM = 64 << 20
BATCH = 1024
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError, ValueError)


def read_rows(path: Path) -> Iterator[Located]:
    """The rows of a file, one after another.

    Raises:
        InputError: a file of another kind, damaged, or not rows of JSON objects; names the place, never shows text.
    """
    if not path.exists():
        raise InputError(f"{path}: not found; expected a file of rows")
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not a regular file'}; expected a file of rows")
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(PARQUET):
        yield from _parquet(path)
        return
    with _Unpacked(path, start) as unpacked:
        head = unpacked.peek()
        _refuse_foreign(path, head)
        if _is_table(path):
            yield from _table(path, unpacked, head)
        elif head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _array(path, unpacked)
        else:
            yield from _lines(path, unpacked, head)


def _refuse_foreign(path: Path, head: bytes) -> None:
    for magic, name in FOREIGN:
        if head.startswith(magic):
            raise InputError(f"{path}: this is {name}; expected JSON lines, JSON, CSV or Parquet")
    if HTML.match(head):
        raise InputError(f"{path}: this is an HTML page, perhaps that of a login or an error; download the file again")


class _Unpacked:
    """A file, decompressed as it is read, with the error that names a damaged or a malicious one."""

    def __init__(self, path: Path, start: bytes) -> None:
        self.path = path
        self._raw = path.open("rb")
        self._line = 1
        self._bytes = 0
        self._head = b""
        self.kind = ""
        if start.startswith(GZIP):
            self.kind, self._file = "gzip", cast(IO[bytes], gzip.GzipFile(fileobj=self._raw))
        elif start.startswith(BZIP2):
            self.kind, self._file = "bzip2", cast(IO[bytes], bz2.BZ2File(self._raw))
        elif start.startswith(XZ):
            self.kind, self._file = "xz", cast(IO[bytes], lzma.LZMAFile(self._raw))  # noqa: SIM115
        elif start.startswith(ZSTD):
            import io

            import pyarrow

            self.kind = "zstd"
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, "r"), "zstd")
            self._file = cast(IO[bytes], io.BufferedReader(stream, 1 << 20))
        else:
            self._file = self._raw

    def __enter__(self) -> "_Unpacked":
        return self

    def __exit__(self, *exception: object) -> None:
        self._raw.close()

    def peek(self) -> bytes:
        """The first bytes, which the next read gives again."""
        self._head = self._read(4096)
        return self._head

    def read(self, size: int) -> bytes:
        """Some bytes; none at the end."""
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return self._read(size)

    def readline(self, size: int) -> bytes:
        """A line, or its beginning if it is longer."""
        line = b""
        if self._head:
            end = self._head.find(b"\n") + 1
            line, self._head = (self._head[:end], self._head[end:]) if end else (self._head, b"")
        if not line.endswith(b"\n"):
            line += self._guarded(lambda: self._file.readline(size - len(line)))
        self._line += 1
        return line

    def _read(self, size: int) -> bytes:
        return self._guarded(lambda: self._file.read(size))

    def _guarded(self, read: Any) -> bytes:
        try:
            block: bytes = read()
        except BROKEN as error:
            raise InputError(
                f"{self.path}:{self._line}: the {self.kind or 'file'} stream is damaged or truncated here ({error});"
                " copy the file again"
            ) from error
        self._bytes += len(block)
        if self.kind and self._bytes > RATIO_FROM and self._bytes > MAX_RATIO * max(self._raw.tell(), 1):
            raise InputError(
                f"{self.path}: more than {MAX_RATIO} times as large unpacked as packed; no text is like that, and the"
                " file is not read further"
            )
        return block


def _lines(path: Path, unpacked: _Unpacked, head: bytes) -> Iterator[Located]:
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for number, line in lines_of(path, unpacked.readline):
        try:
            row = _parse(line)
        except ValueError as error:
            if number == 1 and begins.startswith(b"{") and _is_spread(head):
                raise InputError(
                    f"{path}: JSON objects over several lines, or one object that holds the rows; expected one row a"
                    " line, or a JSON array of rows (`jq -c .`, or `jq -c '.NAME[]'` for a list NAME in an object)"
                ) from error
            raise InputError(f"{path}:{number}: {json_problem(line, error)}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        if is_too_deep(row):
            raise InputError(f"{path}:{number}: nested too deep; a row is a flat object")
        nested = next((name for name in WRAPPERS if number == 1 and _is_rows(row.get(name))), None)
        if nested:
            raise InputError(f"{path}:1: one object whose list '{nested}' holds the rows; `jq -c '.{nested}[]'`")
        yield f"{path}:{number}", row, line.strip()


def _is_spread(head: bytes) -> bool:
    """Whether a file that begins with `{` goes on, on the next lines, as an indented object does."""
    lines = head.splitlines()
    return (len(lines) > 1 and lines[0].strip() in (b"{", b"[{")) or re.match(
        rb'\s*\{\s*"[^"]*"\s*:\s*[\[{]?\s*\n', head
    ) is not None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, dict) for entry in value)


def _parse(line: bytes) -> Any:
    """A JSON value; NaN and infinities, which Python writes, become null.

    Raises:
        ValueError: no JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        return json.loads(line, parse_constant=lambda name: None)


def _array(path: Path, unpacked: _Unpacked) -> Iterator[Located]:
    """The entries of a JSON array; no more of it is in memory than one entry and what was read with it."""
    text = _Text(path, unpacked)
    text.next()
    text.position += 1
    number = 0
    while text.next() != "]" or number:
        number += 1
        where = f"{path}: entry {number}"
        entry = text.entry(where)
        if not isinstance(entry, dict) or is_too_deep(entry):
            raise InputError(f"{where}: expected a flat JSON object, found {type(entry).__name__}")
        yield where, entry, b""
        if text.next() == "]":
            break
        if text.next() != ",":
            raise text.wrong("expected , or ]", text.position)
        text.position += 1
    text.position += 1
    if text.next():
        raise text.wrong("text after the array", text.position)


class _Text:
    """A file as text, read block by block."""

    def __init__(self, path: Path, unpacked: _Unpacked) -> None:
        self.position = 0
        self._path = path
        self._unpacked = unpacked
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._lines = self._columns = 0

    def next(self) -> str:
        """Go to the next character that is no white space; empty at the end."""
        while not (found := NO_SPACE.search(self._text, self.position)):
            self.position = len(self._text)
            if not self._more():
                return ""
        self.position = found.start()
        return found[0]

    def entry(self, where: str) -> Any:
        """The JSON value that begins here; the position is then behind it.

        Raises:
            InputError: no JSON, or longer than a line may be.
        """
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self._text, self.position)
                break
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_LITERAL
                if may_go_on and len(self._text) - self.position > MAX_LINE_BYTES:
                    raise InputError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; expected rows") from error
                wrong = self.wrong(error.msg, error.pos)
                if not may_go_on or not self._more():
                    raise wrong from error
            except RecursionError as error:
                raise InputError(f"{where}: nested too deep; a row is a flat object") from error
            except ValueError as error:
                raise self.wrong("an integer of thousands of digits", self.position) from error
        start, self.position = self.position, end
        try:
            return _parse(self._text[start:end].encode())
        except ValueError as error:
            raise self.wrong(getattr(error, "msg", "no JSON"), start + getattr(error, "pos", 0)) from error

    def wrong(self, problem: str, position: int) -> InputError:
        """The error that says where in the file the text is no JSON."""
        lines, columns = self._counted(position)
        line, column = lines + 1, columns + 1
        return InputError(f"{self._path}:{line}: not valid JSON ({problem} at column {column})")

    def _counted(self, position: int) -> tuple[int, int]:
        """The lines before a position, and the characters before it on its own line."""
        last = self._text.rfind("\n", 0, position)
        columns = self._columns + position if last < 0 else position - last - 1
        return self._lines + self._text.count("\n", 0, position), columns

    def _more(self) -> bool:
        """Read as much again as there is; what is behind is forgotten."""
        block = self._unpacked.read(max(1 << 20, len(self._text) - self.position))
        self._lines, self._columns = self._counted(self.position)
        try:
            self._text = self._text[self.position :] + self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: not UTF-8; save the file as UTF-8 ({error.reason})") from error
        self.position = 0
        return bool(block)


def _is_table(path: Path) -> bool:
    names = [suffix.lower() for suffix in path.suffixes]
    return ".csv" in names[-2:] or ".tsv" in names[-2:]


def _delimiter(path: Path, head: bytes) -> str:
    """What separates the fields of a table: a tab in a file named so, else what its first line has most of."""
    if ".tsv" in [suffix.lower() for suffix in path.suffixes]:
        return "\t"
    header = re.sub(rb'"[^"]*"', b"", head.split(b"\n", 1)[0])
    return max(",;\t", key=lambda mark: header.count(mark.encode()))


def _table(path: Path, unpacked: _Unpacked, head: bytes) -> Iterator[Located]:
    """CSV and TSV; every value is text, and a list of messages in it is read as JSON or as Python writes it."""
    import csv
    import io

    class Raw(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            block = unpacked.read(len(buffer))
            buffer[: len(block)] = block
            return len(block)

    delimiter = _delimiter(path, head)
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(io.BufferedReader(Raw(), 1 << 20), encoding="utf-8-sig", newline="")
    try:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: another number of fields than the header has; expected {len(row)}")
            yield where, {name: _cell(value) for name, value in row.items()}, b""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8 ({error.reason})") from error
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + 1}: not valid CSV ({error})") from error


def _cell(value: str) -> Any:
    """A field of a table: a list or an object that was written into it, else the text."""
    start = value.lstrip()[:1]
    if start not in ("[", "{"):
        return value
    found = parse_literal(value)
    is_rows = isinstance(found, list) and found and isinstance(found[0], dict | list)
    return found if isinstance(found, dict) or is_rows else value


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _plain(row), b""
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: the Parquet file is damaged or truncated ({str(error)[:120]}); copy it again"
        ) from error


def _plain(value: Any) -> Any:
    """A value of Parquet as JSON has it: bytes and dates become text, NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
