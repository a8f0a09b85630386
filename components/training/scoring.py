"""Log-probabilities of examples under a model, kept by content so that nothing is run twice.

The key is a hash of the model's files, of the token ids (hence of data, tokenizer and template), of how the model is
run and of the engine's code with its libraries; the file carries a hash of its values. A damaged file is computed
again.

Shapes: E examples, C completions of each, N completion tokens of all of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from components.common.files import digest, replacing, sha256_file
from components.common.provenance import modules_digest
from components.config.model import ExecutionConfig
from components.engine.loop import completion_logps
from components.engine.models import PackedModel
from components.engine.packing import Example
from components.engine.processes import processes
from components.tracking import store
from components.tracking.run import StageRun, is_main_process

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


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities of the completion tokens of E examples with C completions each, end to end in their order."""

    values_N: NDArray[np.float32]
    """Nats."""
    lengths_EC: NDArray[np.int64]
    """Tokens of each completion, the end of sequence included."""

    def sums(self) -> Scores:
        """Log-probability of each completion, float64 [E, C], nats."""
        return self.sums_of(self.values_N.astype(np.float64))

    def sums_of(self, values_N: Scores) -> Scores:
        """Any values per token, summed over each completion: float64 [E, C]."""
        ends = self.lengths_EC.ravel().cumsum()
        sums: Scores = np.add.reduceat(values_N, np.append(0, ends[:-1])).reshape(self.lengths_EC.shape)
        return sums


def score(
    run: StageRun,
    open_model: Callable[[], PackedModel],
    how: ExecutionConfig,
    model_digest: str,
    examples: Sequence[Example],
    what: str,
    as_trained: bool = False,
    look_in: Path | None = None,
    write_to: Path | None = None,
) -> TokenLogps:
    """Log-probabilities of the completions of each example, from the cache or by running the model.

    Args:
        run: says how far it is.
        open_model: gives the model in the state to score with (the right adapters active); not called when the
            log-probs are known.
        how: the model is run.
        model_digest: hash that names that state.
        examples: all with the same number of completions.
        what: for the progress line, such as `reference`.
        as_trained: the model is ready for training, whose weights are in fp32 under full fine-tuning.
        look_in: a folder that came with the model, looked into before the cache; only read.
        write_to: a folder that will travel with the model, which gets the log-probs too.
    """
    tokens = digest([[list(example.prompt), [list(c) for c in example.completions]] for example in examples])
    # The layout (packed or not) follows from these, the model and the code.
    layout = [how.precision, how.hardware, how.lm_head_precision, how.quantization, how.max_length]
    layout.append(as_trained and how.finetuning == "full")
    key = digest([model_digest, tokens, layout, modules_digest("components.engine.loop")])
    name = f"{key}.safetensors"
    cache = store.home() / "cache" / "logps" / name
    places = ({"the model's folder": look_in / name} if look_in else {}) | {"the cache": cache}
    lengths_EC = np.array([[len(c) for c in example.completions] for example in examples], dtype=np.int64)
    processes()
    # The main process decides for all, which would wait for each other in vain otherwise.
    mine = _find(run, places, lengths_EC, what) if is_main_process() else None
    kept: TokenLogps | None = broadcast_object_list([mine])[0]

    def progress(done: int) -> None:
        run.progress(done, len(examples), f"log-probs of {what}")

    if kept is None:
        found = completion_logps(open_model(), examples, progress)
        kept = TokenLogps(np.concatenate([logps.numpy() for both in found for logps in both]), lengths_EC)
        _keep(cache, kept)
    if write_to:
        _keep(write_to / name, kept)
    return kept


def _find(run: StageRun, places: dict[str, Path], lengths_EC: Any, what: str) -> TokenLogps | None:
    for name, path in places.items():
        found = _load(path, lengths_EC)
        if found is not None:
            run.log(f"log-probs of {what}: {len(lengths_EC)} examples from {name}")
            return found
        if path.exists():
            run.log(f"log-probs of {what}: {path.name} in {name} is damaged and passed over")
    return None


def _keep(path: Path, logps: TokenLogps) -> None:
    if not is_main_process():
        return
    with replacing(path) as staging:
        save_file({"logps": logps.values_N}, staging, metadata={"sha256": _checksum(logps.values_N)})


def _load(path: Path, lengths_EC: Any) -> TokenLogps | None:
    try:
        with safe_open(path, framework="numpy") as file:
            values = file.get_tensor("logps")
            sound = file.metadata().get("sha256") == _checksum(values) and values.shape == (lengths_EC.sum(),)
    except (OSError, SafetensorError, AttributeError):
        return None
    return TokenLogps(values, lengths_EC) if sound else None


def _checksum(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
