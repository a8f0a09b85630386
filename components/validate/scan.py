"""Per-row features for the checks, as numeric columns; row text is not retained.

A million rows take about 200 MB of columns. Files are read in chunks, and large ones by several processes, up to
MAX_PROCESSES.
"""

import hashlib
import multiprocessing
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from components.common.cpus import available_cpus
from components.common.documents import JsonObject
from components.dataset.chat import load_tokenizer, special_names
from components.dataset.language import REFUSAL_SAMPLE, is_refusal
from components.dataset.records import LANGUAGES, Preference, Row, name_of, parse_line, raw_lines
from components.dataset.rendered import has_hints, has_markers
from components.dataset.sketches import Sketches, Turns, join_sketches, normalize_text, prompt_key, sketch_turns
from components.sources.model_folder import check_use
from components.validate.characters import BROKEN, HAS_BROKEN, HAS_GARBLED, HAS_NUMBER, HAS_TOKEN, kinds_of
from components.validate.encoding import is_mojibake
from components.validate.formats import formats_of
from components.validate.language import is_in_another_language
from components.validate.privacy import KINDS, kinds_in
from components.validate.tokens import TokenCounter

CHUNK = 2048
CHUNK_BYTES = 8 << 20
"""Lines that are read at once: so many, or fewer if they have more bytes."""
LARGE = 64 << 20
"""Bytes from which starting worker processes (three seconds each) pays off."""
MAX_PROCESSES = 4
PLACEHOLDERS = frozenset(("nan", "null", "#n/a", "<na>", "[deleted]", "[removed]", "[object object]", "lorem ipsum"))
"""Texts that stand for a missing one, in lower case: what tables and web pages leave in their place."""
ROLES = re.compile(r"(system )?user( assistant user)*")
NON_BLANK = re.compile(r"\S")
SENTENCE_END = tuple(".!?…。！？\"'”’)）]】}`*:：;；>|")
MIN_TRUNCATED = 16
"""Characters below which an answer never counts as truncated: `yes` and `yes, because` are two answers."""

FLAGS = (
    "schema",
    "turns",
    "characters",
    "template_text",
    "special_tokens",
    "placeholder",
    "language",
    "license",
    "same_answer",
    "truncated_answer",
    "same_tokens",
    "other_language",
    *KINDS,
    "refusal_chosen",
    "refusal_rejected",
)
NUMBERS = {
    "line": np.int32,
    "n_tokens": np.int32,
    "prompt_characters": np.int32,
    "chosen_characters": np.int32,
    "rejected_characters": np.int32,
    "format_chosen": np.uint8,
    "format_rejected": np.uint8,
    "id": np.uint64,
    "group": np.uint64,
    "key": np.uint64,
    "content": np.uint64,
    "swapped": np.uint64,
}
NAMES = {"lang": "lang", "source": "source", "terms": "license"}
"""Columns of category codes, and the field of a row that each encodes."""
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RowTable:
    """Rows as columns: `FLAGS` as 0 and 1, `NUMBERS`, `NAMES` as positions in `names`; with the sketch of each prompt.

    `size` is the bytes of the lines.
    """

    columns: Columns
    names: dict[str, list[str]]
    sketches: Sketches
    size: int


@dataclass(frozen=True)
class Scan:
    """Settings for reading rows.

    Args:
        kind: schema of the rows.
        base_model: folder with the tokenizer.
        max_length: most tokens that a row may have.
        language_confidence: probability from which a detected language counts against `lang`.
    """

    kind: type[Row]
    base_model: Path
    max_length: int
    language_confidence: float


def scan_file(scan: Scan, path: Path, pool: ProcessPoolExecutor | None) -> Iterator[RowTable]:
    """Read a file of rows in chunks, in file order.

    Raises:
        InputError: a line is not a JSON object.
    """
    chunks = _chunks(raw_lines(path))
    if pool is None:
        yield from (scan_lines(scan, path, chunk) for chunk in chunks)
        return
    waiting: deque[Future[RowTable]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(scan_lines, scan, path, chunk))
        if len(waiting) > 2 * MAX_PROCESSES:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def _chunks(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    chunk: list[tuple[int, bytes]] = []
    size = 0
    for entry in lines:
        chunk.append(entry)
        size += len(entry[1])
        if len(chunk) == CHUNK or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def processes_for(paths: Iterable[Path]) -> ProcessPoolExecutor | None:
    """A process pool for reading the files; None where one process is faster."""
    cores = min(MAX_PROCESSES, available_cpus())
    if cores < 2 or sum(path.stat().st_size for path in paths if path.is_file()) < LARGE:
        return None
    return ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Exit a pool worker when its parent dies; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join_tables(parts: Sequence[RowTable]) -> RowTable:
    """Concatenate chunks."""
    names: dict[str, list[str]] = {}
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in (*FLAGS, *NUMBERS)}
    for column in NAMES:
        positions = {name: i for i, name in enumerate(sorted({name for part in parts for name in part.names[column]}))}
        names[column] = list(positions)
        codes = [np.array([positions[name] for name in part.names[column]], np.int32) for part in parts]
        columns[column] = np.concatenate([code[part.columns[column]] for code, part in zip(codes, parts, strict=True)])
    sketches = join_sketches([part.sketches for part in parts])
    return RowTable(columns, names, sketches, sum(part.size for part in parts))


_counters: dict[tuple[Path, int], TokenCounter] = {}
"""This process's token counters by base model and maximum length; they are slow to build."""


def scan_lines(scan: Scan, path: Path, lines: list[tuple[int, bytes]]) -> RowTable:
    """The table of some lines of a file.

    Raises:
        InputError: a line is not a JSON object, or the base model does not fit its tokenizer or the longest row.
    """
    key = (scan.base_model, scan.max_length)
    if key not in _counters:
        tokenizer = load_tokenizer(scan.base_model)
        check_use(scan.base_model, tokenizer, scan.max_length)
        _counters[key] = TokenCounter(tokenizer, scan.max_length)
    return _Chunk(scan, _counters[key]).read(path, lines)


class _Chunk:
    def __init__(self, scan: Scan, counter: TokenCounter) -> None:
        self.scan = scan
        self.counter = counter
        self.special = special_names(counter.tokenizer)
        self.answers = ("chosen", "rejected") if scan.kind is Preference else ("response",)

    def read(self, path: Path, lines: list[tuple[int, bytes]]) -> RowTable:
        n = len(lines)
        self.flags = {name: np.zeros(n, np.uint8) for name in FLAGS}
        self.numbers: Columns = {name: np.zeros(n, kind) for name, kind in NUMBERS.items()}
        values = [parse_line(path, number, line) for number, line in lines]
        self.numbers["line"][:] = [number for number, _ in lines]
        names = {name: [name_of(value.get(field)) for value in values] for name, field in NAMES.items()}
        texts = [self._texts(row, value) for row, value in enumerate(values)]
        prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
        joined = ["\n".join([*[turn["content"] for turn in prompt], *answer]) for prompt, answer in texts]
        kinds = kinds_of(joined).tolist()
        turns = [self._fill_row(row, value, *texts[row], joined[row], kinds[row]) for row, value in enumerate(values)]
        # A row that is not a valid conversation gets no token count; a template may do anything with it.
        countable = np.flatnonzero((self.flags["schema"] | self.flags["turns"]) == 0)
        tokens, same = self.counter.count([prompts[row] for row in countable], [answers[row] for row in countable])
        self.numbers["n_tokens"][countable] = tokens
        self.flags["same_tokens"][countable] = same & (1 - self.flags["same_answer"][countable])
        codes = {name: {value: i for i, value in enumerate(sorted(set(names[name])))} for name in NAMES}
        named = {name: np.array([codes[name][value] for value in names[name]], np.int16) for name in NAMES}
        sketches = sketch_turns(turns)
        size = sum(len(line) for _, line in lines)
        return RowTable(self.flags | self.numbers | named, {name: list(codes[name]) for name in NAMES}, sketches, size)

    def _texts(self, row: int, value: JsonObject) -> tuple[list[dict[str, str]], tuple[str, ...]]:
        """The conversation and the answers; values that are not strings are converted, and fail the schema check."""
        if not fits(self.scan.kind, value):
            self.flags["schema"][row] = 1
            turns = value.get("prompt")
            messages = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
            prompt = [{"role": str(turn.get("role")), "content": str(turn.get("content", ""))} for turn in messages]
            return prompt, tuple([str(value.get(name) or "") for name in self.answers])
        return value["prompt"], tuple([value[name] for name in self.answers])

    def _fill_row(
        self,
        row: int,
        value: JsonObject,
        prompt: list[dict[str, str]],
        answers: tuple[str, ...],
        joined: str,
        kinds: int,
    ) -> Turns:
        """Fill in the row's flags and numbers.

        Args:
            row: its position.
            value: the row.
            prompt: its conversation.
            answers: its answers.
            joined: all of its texts.
            kinds: the bits of what `characters` found in them.

        Returns:
            the prompt's turns, as they are compared.
        """
        flags, numbers = self.flags, self.numbers
        roles = " ".join([turn["role"] for turn in prompt])
        contents = [normalize_text(turn["content"]) for turn in prompt]
        prompt_text = " ".join(filter(None, contents))
        answer_texts = [normalize_text(answer) for answer in answers]
        full_text = "\n".join([prompt_text, *answer_texts])
        lowered = prompt_text.lower()
        openings = [answer[:REFUSAL_SAMPLE].lower() for answer in answer_texts]
        lang = str(value.get("lang"))
        flags["turns"][row] = ROLES.fullmatch(roles) is None
        raw = [turn["content"] for turn in prompt] + list(answers)
        if (kinds & HAS_BROKEN and BROKEN.search(joined)) or (kinds & HAS_GARBLED and any(map(is_mojibake, raw))):
            flags["characters"][row] = 1
        if has_hints(joined) and any(map(has_markers, raw)):
            flags["template_text"][row] = 1
        flags["special_tokens"][row] = self.special.search(joined) is not None
        flags["placeholder"][row] = any(text.strip().lower() in PLACEHOLDERS for text in raw if len(text) < 20)
        flags["language"][row] = lang not in LANGUAGES
        flags["license"][row] = NON_BLANK.search(str(value.get("license") or "")) is None
        for kind in kinds_in(full_text, bool(kinds & HAS_NUMBER), bool(kinds & HAS_TOKEN)):
            flags[kind][row] = 1
        if lang in LANGUAGES:
            texts = [lowered, *openings]
            flags["other_language"][row] = is_in_another_language(lang, texts, self.scan.language_confidence)
        numbers["prompt_characters"][row] = sum([len(turn["content"]) for turn in prompt])
        numbers["id"][row] = _hash(str(value.get("id")))
        numbers["group"][row] = _hash(str(value.get("group")))
        numbers["key"][row] = int(prompt_key(lowered), 16)
        numbers["content"][row] = _hash("\0".join([roles, prompt_text, *answer_texts]))
        # An instruction's one response is in the columns of the chosen answer.
        for index, (text, opening) in enumerate(zip(answers, openings, strict=True)):
            numbers[("chosen_characters", "rejected_characters")[index]][row] = len(text)
            numbers[("format_chosen", "format_rejected")[index]][row] = formats_of(text)
            flags[("refusal_chosen", "refusal_rejected")[index]][row] = is_refusal(opening)
        if len(answer_texts) > 1:
            chosen, rejected = answer_texts
            flags["same_answer"][row] = is_same(chosen, rejected)
            flags["truncated_answer"][row] = chosen != rejected and is_truncated(*sorted(answer_texts, key=len))
            numbers["swapped"][row] = _hash("\0".join([roles, prompt_text, rejected, chosen]))
        lowers = [lowered] if len(contents) == 1 else [content.lower() for content in contents]
        return [(turn["role"], text) for turn, text in zip(prompt, lowers, strict=True) if turn["role"] != "system"]


def fits(kind: type[Row], value: JsonObject) -> bool:
    """Whether a row has the fields and types of its kind."""
    try:
        kind.__pydantic_validator__.validate_python(value)
    except ValidationError:
        return False
    return True


def is_same(first: str, second: str) -> bool:
    """Whether two normalized answers are the same."""
    return first == second


def is_truncated(short: str, long: str) -> bool:
    """Whether the shorter text is a prefix of the longer one and ends mid-sentence."""
    return len(short) >= MIN_TRUNCATED and long.startswith(short) and not short.endswith(SENTENCE_END)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
