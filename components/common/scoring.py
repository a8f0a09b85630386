"""Sequence log-probabilities of examples under a model, kept by content so that nothing is run twice.

The key is a hash of the model's files, of the token ids (hence of data, tokenizer and template), of the precision and
of the engine's code with its libraries; the file carries a hash of its values. A damaged file is computed again.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from components.common import tracking
from components.common.files import digest, replacing, sha256_file
from components.common.identity import modules_digest
from components.training.loop import sequence_logps
from components.training.models import PackedModel
from components.training.packing import Example

Scores = NDArray[np.float64]


def adapted_digest(base_digest: str, adapter: Path) -> str:
    """What names a base model with one adapter, to `score`."""
    return digest([base_digest, sha256_file(adapter / "adapter_model.safetensors")])


def score(
    run: tracking.StageRun, model: PackedModel, model_digest: str, examples: Sequence[Example], what: str
) -> Scores:
    """Summed log-probability of each completion of each example, from the cache or by running the model.

    Args:
        run: says how far it is.
        model: in the state to score with (the right adapters active).
        model_digest: hash that names that state.
        examples: all with the same number of completions.
        what: for the progress line, such as `reference`.

    Returns:
        float64 [examples, completions], nats.
    """
    tokens = digest([[list(example.prompt), [list(c) for c in example.completions]] for example in examples])
    key = digest([model_digest, tokens, model.precision, modules_digest("components.training.loop")])
    path = tracking.home() / "cache" / "logps" / f"{key}.safetensors"
    kept = _load(path, len(examples))
    if kept is not None:
        run.say(f"log-probs of {what}: {len(examples)} examples from the cache")
        return kept
    if path.exists():
        run.say(f"log-probs of {what}: {path.name} is damaged and computed again")

    def progress(done: int) -> None:
        run.progress(done, len(examples), scoring=what)

    values = np.asarray(sequence_logps(model, examples, progress), dtype=np.float64)
    with replacing(path) as aside:
        save_file({"logps": values}, aside, metadata={"sha256": _checksum(values)})
    return values


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
