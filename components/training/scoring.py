"""Log-probabilities of examples under a model, in a content-addressed cache.

The key is a hash of the model's files, the token ids (hence of data, tokenizer and template), the execution settings,
and the engine's code with its libraries; the file carries the seal of this pipeline (tracking/keys.py) over key and
values, so that nobody else who can write to a shared volume decides a verdict. What has none is recomputed.

Shapes: E examples, C completions per example, N completion tokens in total.
"""

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
from components.tracking.keys import is_sealed, seal
from components.tracking.run import StageRun, is_main_process

Scores = NDArray[np.float64]


def adapted_digest(base_digest: str, adapter: Path) -> str:
    """Digest of a base model with one adapter, for `score`."""
    return digest([base_digest, sha256_file(adapter / "adapter_model.safetensors")])


def weights_digest(base_digest: str, folder: Path) -> str:
    """Digest of the model that sft or dpo wrote, for `score`: of base and adapter, or of the full weights."""
    if (folder / "adapter").is_dir():
        return adapted_digest(base_digest, folder / "adapter")
    return whole_digest(folder / "model")


def whole_digest(model: Path) -> str:
    """Digest of a model folder with full weights, for `score`."""
    return digest([sha256_file(path) for path in sorted(model.glob("*.safetensors"))])


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities of the completion tokens of E examples with C completions each, concatenated in order."""

    values_N: NDArray[np.float32]
    """Nats."""
    lengths_EC: NDArray[np.int64]
    """Tokens of each completion, including the end of sequence."""

    def sums(self) -> Scores:
        """Log-probability of each completion, float64 [E, C], nats."""
        return self.sums_of(self.values_N.astype(np.float64))

    def sums_of(self, values_N: Scores) -> Scores:
        """Per-token values summed over each completion: float64 [E, C]."""
        ends = self.lengths_EC.ravel().cumsum()
        sums: Scores = np.add.reduceat(values_N, np.append(0, ends[:-1])).reshape(self.lengths_EC.shape)
        return sums


def score(
    run: StageRun,
    open_model: Callable[[], PackedModel],
    config: ExecutionConfig,
    model_digest: str,
    examples: Sequence[Example],
    what: str,
    as_trained: bool = False,
    read_from: Path | None = None,
    also_write_to: Path | None = None,
) -> TokenLogps:
    """Log-probabilities of the completions of each example, from the cache or by running the model.

    Args:
        run: reports progress.
        open_model: returns the model ready to score (with the right adapters active); not called on a cache hit.
        config: execution settings of the model.
        model_digest: hash of the model in that state.
        examples: all with the same number of completions.
        what: subject of the progress line, such as `reference`.
        as_trained: whether the model is prepared for training, whose weights are fp32 under full fine-tuning.
        read_from: a folder shipped with the model that is searched before the cache; never written.
        also_write_to: a folder shipped with the model that gets a copy of the log-probs.
    """
    tokens = digest([[list(example.prompt), [list(c) for c in example.completions]] for example in examples])
    # The layout (packed or not) follows from these, the model and the code.
    layout = [config.precision, config.hardware, config.lm_head_precision, config.quantization, config.max_length]
    layout.append(as_trained and config.finetuning == "full")
    key = digest([model_digest, tokens, layout, modules_digest("components.engine.loop")])
    name = f"{key}.safetensors"
    cache = store.home() / "cache" / "logps" / name
    candidates = ({"the model's folder": read_from / name} if read_from else {}) | {"the cache": cache}
    lengths_EC = np.array([[len(c) for c in example.completions] for example in examples], dtype=np.int64)
    processes()
    # The main process decides for all ranks; differing decisions would deadlock.
    local = _find(run, candidates, lengths_EC, what) if is_main_process() else None
    logps: TokenLogps | None = broadcast_object_list([local])[0]

    def progress(done: int) -> None:
        run.progress(done, len(examples), f"log-probs of {what}")

    if logps is None:
        computed = completion_logps(open_model(), examples, progress)
        values_N = np.concatenate([values.numpy() for completions in computed for values in completions])
        logps = TokenLogps(values_N, lengths_EC)
        _write(cache, logps)
    if also_write_to:
        _write(also_write_to / name, logps)
    return logps


def _find(run: StageRun, candidates: dict[str, Path], lengths_EC: Any, what: str) -> TokenLogps | None:
    for name, path in candidates.items():
        logps = _load(path, lengths_EC)
        if logps is not None:
            run.log(f"log-probs of {what}: {len(lengths_EC)} examples from {name}")
            return logps
        if path.exists():
            run.log(f"log-probs of {what}: {path.name} in {name} is damaged or not ours, and passed over")
    return None


def _write(path: Path, logps: TokenLogps) -> None:
    if not is_main_process():
        return
    with replacing(path) as staging:
        save_file({"logps": logps.values_N}, staging, metadata={"seal": seal(path.name, _bytes(logps.values_N))})


def _load(path: Path, lengths_EC: Any) -> TokenLogps | None:
    try:
        with safe_open(path, framework="numpy") as file:
            values = file.get_tensor("logps")
            ours = is_sealed(path.name, _bytes(values), (file.metadata() or {}).get("seal", ""))
            intact = ours and values.dtype == np.float32 and values.shape == (lengths_EC.sum(),)
    except (OSError, SafetensorError):
        return None
    return TokenLogps(values, lengths_EC) if intact else None


def _bytes(values: Any) -> bytes:
    return np.ascontiguousarray(values).tobytes()
