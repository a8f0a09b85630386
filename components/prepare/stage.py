"""Make the canonical data sets and the embedded base model from the pinned sources; DVC runs this.

Run: `dvc repro`, or one part of it by `python -m components prepare`.
"""

import gc
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.common import tracking
from components.common.config import PrepareConfig
from components.common.errors import InputError
from components.common.files import replacing_folder
from components.common.records import SPLITS, content_id, read_lines, write_lines
from components.prepare.formats import RowProblem, convert
from components.prepare.sources import Member, Sources, added_pairs, read_sources, unpack
from components.prepare.split import Place, make_prompt, place_prompts, read_splits, write_splits

RawRow = dict[str, Any]


def prepare_data(config: PrepareConfig, data: Path) -> None:
    """Write data/preferences, data/instructions, data/quarantine.jsonl and data/splits.lock.

    Args:
        config: which sources, how to split.
        data: the project's data folder, with sources.lock in it.

    Raises:
        InputError: an unknown source, a download or a hash that is wrong, a file of another shape.
    """
    sources = read_sources(data / "sources.lock")
    rows = _rows(sources, "preferences", config.preferences) + _rows(sources, "instructions", config.instructions)
    for name, added in sources.added.items():
        rows += read_lines(added_pairs(data, name, added))
    if not any("chosen" in row for row in rows):
        raise InputError(
            "no preference pairs; name some in prepare.preferences, or bring your own: `kubealign data add`"
        )
    prompts = [make_prompt(row["prompt"], row["lang"]) for row in rows]
    known = read_splits(data / "splits.lock")
    places, bridges = place_prompts(prompts, known, config.split.model_dump(), config.near_duplicate)
    sides: dict[str, list[RawRow]] = {side: [] for side in SPLITS}
    quarantine: list[RawRow] = []
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt.key in bridges:
            quarantine.append({"reason": f"bridge: {bridges[prompt.key]}", "row": row})
        else:
            place = places[prompt.key]
            sides[place.side].append(_placed(row, place))
    with replacing_folder(data / "preferences") as folder:
        for side, found in sides.items():
            write_lines(folder / f"{side}.jsonl", (row for row in found if "chosen" in row))
    with replacing_folder(data / "instructions") as folder:
        for side, found in sides.items():
            write_lines(folder / f"{side}.jsonl", _instructions(found))
    write_lines(data / "quarantine.jsonl", quarantine)
    write_splits(data / "splits.lock", known | places)
    counts = ", ".join(f"{side} {sum('chosen' in row for row in found)}" for side, found in sides.items())
    print(f"preference pairs: {counts}; quarantined {len(quarantine)}", flush=True)


def _placed(row: RawRow, place: Place) -> RawRow:
    answers = [row[key] for key in ("chosen", "rejected", "response") if key in row]
    return {"id": content_id(row["prompt"], *answers), "group": place.group, **row}


def _instructions(rows: Iterable[RawRow]) -> list[RawRow]:
    """Each row as a prompt with the answer to learn: of a pair the chosen one; an example that repeats stands once."""
    unique: dict[str, RawRow] = {}
    for row in rows:
        response = row["chosen"] if "chosen" in row else row["response"]
        identity = content_id(row["prompt"], response)
        kept = {key: row[key] for key in ("group", "prompt", "lang", "source", "license")}
        unique.setdefault(identity, {"id": identity, **kept, "response": response})
    return list(unique.values())


def _rows(sources: Sources, kind: str, names: list[str]) -> list[RawRow]:
    available: dict[str, Member] = getattr(sources, kind)
    rows: list[RawRow] = []
    for name in names:
        if name not in available:
            raise InputError(f"prepare.{kind}: {name} is not in data/sources.lock; expected {', '.join(available)}")
        member = available[name]
        with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
            file = Path(temporary) / "rows.json"
            unpack(sources, member, tracking.home() / "downloads", file)
            entries = json.loads(file.read_text(encoding="utf-8"))
        made = _pair if kind == "preferences" else _instruction
        facts = {"lang": member.lang, "source": name, "license": member.license}
        try:
            rows += [made(entry) | facts for entry in entries]
        except (KeyError, TypeError, RowProblem) as error:
            raise InputError(f"{member.member}: an entry has another shape than expected: {error!r}") from error
    return rows


def _pair(entry: RawRow) -> RawRow:
    prompt, chosen, rejected = convert(entry, "sharegpt")[0]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _instruction(entry: RawRow) -> RawRow:
    text = "\n\n".join(part for part in (entry["instruction"], entry["input"]) if part)
    return {"prompt": [{"role": "user", "content": text}], "response": entry["output"]}


def prepare_base_model(data: Path) -> None:
    """Convert the pinned GGUF file once to a plain bf16 safetensors model in data/base_model.

    Raises:
        InputError: a download or a hash that is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    sources = read_sources(data / "sources.lock")
    with tempfile.TemporaryDirectory(prefix="kubealign-") as temporary:
        file = Path(temporary) / "model.gguf"
        unpack(sources, sources.model, tracking.home() / "downloads", file)
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
