"""Prepare the canonical data sets and the embedded base model from the pinned sources; DVC runs this.

Run: `dvc repro`, or one part of it with `python -m components prepare`.
"""

import gc
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from components.common.documents import JsonObject
from components.common.errors import InputError, RowError
from components.common.files import folder_digest, replacing, replacing_folder, write_json
from components.common.foreign import one_line
from components.dataset.distribution import PREVIOUS, STATISTICS, Distribution, remember
from components.dataset.records import SPLITS, check_names, content_id, iter_lines, line_of
from components.dataset.similarity import FRAMES, find_frames
from components.dataset.sketches import Sketches, join_sketches, prompt_key, prompt_text, sketch
from components.prepare.config import PrepareConfig
from components.prepare.convert import GROUP
from components.prepare.formats import convert
from components.prepare.sources import Member, Sources, added_rows, read_sources, unpack
from components.prepare.split import Assignment, assign_prompts, read_splits, write_splits
from components.tracking import store

DECONTAMINATE = "decontaminate.jsonl"
"""Prompts that must not appear in the data; the file travels with the rows to `validate`, which checks for them."""
SKETCH_CHUNK = 8192
LOG_EVERY = 100_000


def prepare_data(config: PrepareConfig, data: Path) -> None:
    """Write data/preferences, data/instructions, data/quarantine.jsonl, data/splits.lock and data/statistics.json.

    Args:
        config: sources and split.
        data: the project's data folder, with sources.lock in it.

    Raises:
        InputError: an unknown source, a failed download, a wrong hash, or a file of unexpected structure.
    """
    sources = read_sources(data / "sources.lock")
    packaged = _rows(sources, "preferences", config.preferences) + _rows(sources, "instructions", config.instructions)
    added = [added_rows(data, name, entry) for name, entry in sources.added.items()]
    own_pairs = any(entry.kind == "preferences" for entry in sources.added.values())
    if not any("chosen" in row for row in packaged) and not own_pairs:
        raise InputError(
            "no preference pairs; name some in prepare.preferences, or bring your own: `kubealign data add`"
        )

    def rows() -> Iterator[JsonObject]:
        """All rows; those of added sources are re-read each time to save memory."""
        yield from packaged
        for path in added:
            for number, row in iter_lines(path):
                check_names(row, f"{path}:{number}")
                yield row

    prompts = _sketched(rows())
    known = read_splits(data / "splits.lock")
    frames = find_frames(prompts.sketches)
    shares, threshold = config.split.model_dump(), config.near_duplicate
    assignments, bridges = assign_prompts(
        prompts.unique, prompts.sketches, frames, known, shares, threshold, prompts.named
    )
    keys = prompts.keys
    del prompts
    distribution = Distribution()
    with (
        replacing_folder(data / "preferences") as preferences,
        replacing_folder(data / "instructions") as instructions,
        replacing(data / "quarantine.jsonl") as quarantine,
    ):
        writer = _Writer(preferences, instructions, quarantine)
        with writer:
            for number, (key, row) in enumerate(zip(keys.tolist(), rows(), strict=True), start=1):
                name = f"{key:016x}"
                if name in bridges:
                    writer.quarantine_row(row, bridges[name])
                else:
                    row.pop(GROUP, None)
                    writer.write(row, assignments[name])
                    if "chosen" in row:
                        distribution.add(row)
                _log_progress(number, len(keys), "written")
        listed = data / DECONTAMINATE
        if listed.exists():
            shutil.copyfile(listed, preferences / DECONTAMINATE)
        before = remember(data / STATISTICS, folder_digest(preferences), distribution)
        if before is not None:
            write_json(preferences / PREVIOUS, before.model_dump())
        write_json(preferences / FRAMES, {"shingles": frames.shingles.tolist(), "grams": frames.grams.tolist()})
    write_splits(data / "splits.lock", known | assignments)
    counts = ", ".join(f"{split} {writer.pairs[split]}" for split in SPLITS)
    print(one_line(f"preference pairs: {counts}; quarantined {writer.quarantined}"), flush=True)
    if disputed := len(bridges.keys() & known.keys()):
        print(
            f"splits.lock has {disputed:d} prompts that ask the same as one nearer to the test, which keeps its side;"
            " their rows are in data/quarantine.jsonl",
            flush=True,
        )


@dataclass(frozen=True)
class _Prompts:
    """The key of every row's prompt; the unique keys, with the sketches of their prompts; and the groups that rows
    name, by key."""

    keys: NDArray[np.uint64]
    unique: list[str]
    sketches: Sketches
    named: dict[str, str]


def _sketched(rows: Iterable[JsonObject]) -> _Prompts:
    """Read all prompts; a second thread computes the sketches: numpy releases the GIL."""
    keys = array("Q")
    unique: dict[int, None] = {}
    named: dict[str, str] = {}
    waiting: list[list[dict[str, str]]] = []
    futures = []
    with ThreadPoolExecutor(1) as thread:
        for number, row in enumerate(rows, start=1):
            text = prompt_text(row["prompt"])
            key = int(prompt_key(text), 16)
            keys.append(key)
            if GROUP in row:
                named[f"{key:016x}"] = row[GROUP]
            if key not in unique:
                unique[key] = None
                waiting.append(row["prompt"])
            if len(waiting) == SKETCH_CHUNK:
                futures.append(thread.submit(sketch, waiting))
                waiting = []
            if number % LOG_EVERY == 0:
                print(f"{number:d} rows read", flush=True)
        parts = [future.result() for future in futures] + ([sketch(waiting)] if waiting else [])
    return _Prompts(np.array(keys, np.uint64), [f"{key:016x}" for key in unique], join_sketches(parts), named)


class _Writer:
    """Writes every row to the file of its prompt's split, in input order."""

    def __init__(self, preferences: Path, instructions: Path, quarantine: Path) -> None:
        self.pairs = dict.fromkeys(SPLITS, 0)
        self.quarantined = 0
        self._files = ExitStack()
        self._seen: set[int] = set()
        self._preferences = {split: self._open(preferences / f"{split}.jsonl") for split in SPLITS}
        self._instructions = {split: self._open(instructions / f"{split}.jsonl") for split in SPLITS}
        self._quarantine = self._open(quarantine)

    def _open(self, path: Path) -> IO[bytes]:
        return self._files.enter_context(path.open("wb", buffering=1 << 20))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def write(self, row: JsonObject, assignment: Assignment) -> None:
        """Write a row, and its instruction unless that was written before."""
        answers = [row[key] for key in ("chosen", "rejected", "response") if key in row]
        if "chosen" in row:
            pair = {"id": content_id(row["prompt"], *answers), "group": assignment.group, **row}
            self._preferences[assignment.split].write(line_of(pair))
            self.pairs[assignment.split] += 1
        response = answers[0]
        identity = content_id(row["prompt"], response)
        number = int(identity, 16)
        if number not in self._seen:
            self._seen.add(number)
            shared = {key: row[key] for key in ("prompt", "lang", "source", "license")}
            line = {"id": identity, "group": assignment.group, **shared, "response": response}
            self._instructions[assignment.split].write(line_of(line))

    def quarantine_row(self, row: JsonObject, reason: str) -> None:
        """Write a row that belongs to no split to the quarantine."""
        self._quarantine.write(line_of({"reason": f"bridge: {reason}", "row": row}))
        self.quarantined += 1


def _log_progress(done: int, total: int, what: str) -> None:
    if done % LOG_EVERY == 0:
        print(one_line(f"{done}/{total} rows {what}"), flush=True)


def _rows(sources: Sources, kind: str, names: list[str]) -> list[JsonObject]:
    available: dict[str, Member] = getattr(sources, kind)
    rows: list[JsonObject] = []
    for name in names:
        if name not in available:
            raise InputError(f"prepare.{kind}: {name} is not in data/sources.lock; expected {', '.join(available)}")
        member = available[name]
        with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
            file = Path(temporary) / "rows.json"
            unpack(sources, member, store.home() / "downloads", file)
            entries = json.loads(file.read_text(encoding="utf-8"))
        parse = _pair if kind == "preferences" else _instruction
        defaults = {"lang": member.lang, "source": name, "license": member.license}
        try:
            rows += [parse(entry) | defaults for entry in entries]
        except (KeyError, TypeError, RowError) as error:
            raise InputError(f"{member.member}: an entry has an unexpected structure: {error!r}") from error
    return rows


def _pair(entry: JsonObject) -> JsonObject:
    example = convert(entry, "sharegpt")[0]
    chosen, rejected = example.answers
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected}


def _instruction(entry: JsonObject) -> JsonObject:
    example = convert(entry, "instruction")[0]
    return {"prompt": example.prompt, "response": example.answers[0]}


def prepare_base_model(data: Path) -> None:
    """Convert the pinned GGUF file once to a plain bf16 safetensors model in data/base_model.

    Raises:
        InputError: a failed download or a wrong hash.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    sources = read_sources(data / "sources.lock")
    with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
        file = Path(temporary) / "model.gguf"
        unpack(sources, sources.model, store.home() / "downloads", file)
        print("converting to safetensors, about 20 s", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=file.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            temporary,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        with replacing_folder(data / "base_model") as folder:
            model.save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
        del model
        gc.collect()
