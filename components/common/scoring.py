"""Sequence log-probabilities of examples under a model, kept by content so that nothing is run twice.

The key is a hash of the model's files, of the token ids (hence of data, tokenizer and template), of the precision and
of the engine's code with its libraries; the file carries a hash of its values. A damaged file is computed again.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from components.common import tracking
from components.common.files import digest, replacing, sha256_file
from components.common.identity import modules_digest
from components.training.loop import sequence_logps
from components.training.models import PackedModel
from components.training.packing import Example
from components.training.processes import processes

Scores = NDArray[np.float64]


def adapted_digest(base_digest: str, adapter: Path) -> str:
    """What names a base model with one adapter, to `score`."""
    return digest([base_digest, sha256_file(adapter / "adapter_model.safetensors")])


def weights_digest(base_digest: str, folder: Path) -> str:
    """What names the model that sft or dpo wrote, to `score`: base and adapter, or the weights of its own."""
    if (folder / "adapter").is_dir():
        return adapted_digest(base_digest, folder / "adapter")
    return whole_digest(folder / "model")


def whole_digest(model: Path) -> str:
    """What names a model folder with weights of its own, to `score`."""
    return digest([sha256_file(path) for path in sorted(model.glob("*.safetensors"))])


def score(
    run: tracking.StageRun,
    model: PackedModel,
    model_digest: str,
    examples: Sequence[Example],
    what: str,
    look_in: Path | None = None,
    write_to: Path | None = None,
) -> Scores:
    """Summed log-probability of each completion of each example, from the cache or by running the model.

    Args:
        run: says how far it is.
        model: in the state to score with (the right adapters active).
        model_digest: hash that names that state.
        examples: all with the same number of completions.
        what: for the progress line, such as `reference`.
        look_in: a folder that came with the model, looked into before the cache; only read.
        write_to: a folder that will travel with the model, which gets the log-probs too.

    Returns:
        float64 [examples, completions], nats.
    """
    tokens = digest([[list(example.prompt), [list(c) for c in example.completions]] for example in examples])
    how = [model.precision, model.head_precision, model.packed]
    key = digest([model_digest, tokens, how, modules_digest("components.training.loop")])
    name = f"{key}.safetensors"
    cache = tracking.home() / "cache" / "logps" / name
    places = ({"the model's folder": look_in / name} if look_in else {}) | {"the cache": cache}
    processes()
    # The main process decides for all, which would wait for each other in vain otherwise.
    kept = broadcast_object_list([_find(run, places, len(examples), what) if tracking.is_main_process() else None])[0]

    def progress(done: int) -> None:
        run.progress(done, len(examples), scoring=what)

    if kept is None:
        values = np.asarray(sequence_logps(model, examples, progress), dtype=np.float64)
        _keep(cache, values)
    else:
        values = kept
    if write_to:
        _keep(write_to / name, values)
    return values


def _find(run: tracking.StageRun, places: dict[str, Path], n_examples: int, what: str) -> Scores | None:
    for name, path in places.items():
        values = _load(path, n_examples)
        if values is not None:
            run.say(f"log-probs of {what}: {n_examples} examples from {name}")
            return values
        if path.exists():
            run.say(f"log-probs of {what}: {path.name} in {name} is damaged and passed over")
    return None


def _keep(path: Path, values: Scores) -> None:
    if not tracking.is_main_process():
        return
    with replacing(path) as aside:
        save_file({"logps": values}, aside, metadata={"sha256": _checksum(values)})


def _load(path: Path, n_examples: int) -> Scores | None:
    try:
        with safe_open(path, framework="numpy") as file:
            values: Scores = file.get_tensor("logps")
            sound = file.metadata().get("sha256") == _checksum(values) and len(values) == n_examples
    except (OSError, SafetensorError, AttributeError):
        return None
    return values if sound else None


def _checksum(values: Scores) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
