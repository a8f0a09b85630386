"""A base model's folder, looked at before anything is trained on it: by names, headers and settings, without torch."""

import json
import struct
from pathlib import Path
from typing import Any

from components.common.errors import InputError
from components.common.files import read_json

MAX_HEADER_BYTES = 100 * 2**20
"""The limit of safetensors itself."""
POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight", "position_embedding.weight")
"""Names with which the tensors of learnt positions end."""
INDEX = "model.safetensors.index.json"


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a folder, by its name, from the headers of its safetensors files.

    Raises:
        InputError: a header cannot be read, or a file that the index names is missing or lacks a tensor.
    """
    shapes: dict[str, list[int]] = {}
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in _header(path).items():
            shapes[name], files[name] = shape, path.name
    if (folder / INDEX).exists():
        for name, file in read_json(folder / INDEX).get("weight_map", {}).items():
            if files.get(name) != file:
                there = "which is missing" if not (folder / file).is_file() else "which has no such tensor"
                raise InputError(f"{folder.name}/{INDEX}: {name} is in {file}, {there}: the download is incomplete")
    return shapes


def _header(path: Path) -> dict[str, list[int]]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {8 + length + end}")
        return {name: entry["shape"] for name, entry in entries.items()}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path.name}: no whole safetensors file ({error}); fetch it again") from error


def check_weights(folder: Path, base: str) -> None:
    """Check what can be known of a base model by its settings and headers.

    Args:
        folder: the model's folder.
        base: its name in model.base, for the message.

    Raises:
        InputError: its weights are quantised, incomplete, or its padding token lies outside its vocabulary.
    """
    where = f"model.base={base}"
    config = read_json(folder / "config.json")
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "quantised") if isinstance(quantized, dict) else "quantised"
        raise InputError(
            f"{where}: its weights are quantised ({method}), and what is trained on them is not what could be"
            " registered; take the model in bf16 or fp32 (for training in 4 bits set model.quantization=nf4)"
        )
    tensor_shapes(folder)
    text = text_config(config)
    padding, vocabulary = text.get("pad_token_id"), text.get("vocab_size")
    if isinstance(padding, int) and isinstance(vocabulary, int) and not -vocabulary <= padding < vocabulary:
        raise InputError(
            f"{where}: config.json has pad_token_id {padding}, but a vocabulary of {vocabulary}; correct or remove it"
        )


def check_use(folder: Path, tokenizer: Any, max_length: int) -> None:
    """Check that a base model has a row for every token of its tokenizer, and positions for `model.max_length`.

    Args:
        folder: the model's folder.
        tokenizer: its tokenizer.
        max_length: most tokens of an example.

    Raises:
        InputError: it has not.
    """
    text = text_config(read_json(folder / "config.json"))
    vocabulary, largest = text.get("vocab_size"), max(tokenizer.get_vocab().values())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"the tokenizer has more tokens than the model: {name!r} is number {largest}, and the embedding ends at"
            f" {vocabulary - 1}; add rows for the new tokens to the model (resize_token_embeddings), or take the"
            " tokenizer that came with it"
        )
    learnt = [shape[0] for name, shape in tensor_shapes(folder).items() if name.endswith(POSITIONS)]
    stated = next((text[name] for name in ("max_position_embeddings", "n_positions") if text.get(name)), None)
    if learnt and max_length > (limit := min([*learnt, *([stated] if isinstance(stated, int) else [])])):
        raise InputError(
            f"model.max_length={max_length}: the model has learnt {limit} positions and no others; set at most {limit}"
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about the language model, which multimodal models nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config
