"""The models to evaluate: how to open each, what identifies its weights, and what it was trained from.

An incumbent is loaded from the registry as it was registered. Its reference, the SFT model it was trained from, is the
first ranks of its adapter (the exported adapter is SFT's and DPO's, concatenated by rank), so it needs no file of its
own; after full fine-tuning the reference is known only as long as the SFT model is unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.common.documents import read_document
from components.common.errors import InputError, single_line
from components.common.files import digest, read_json, sha256_file, verify_manifest
from components.config.model import ExecutionConfig
from components.dataset.chat import load_tokenizer
from components.engine.export import keep_first_ranks
from components.engine.models import PackedModel
from components.registry.base import BaseReference
from components.registry.evidence import check_version
from components.tracking import store
from components.tracking.run import StageRun
from components.training.documents import read_dpo_training
from components.training.run import open_model, open_tuned
from components.training.scoring import adapted_digest, weights_digest, whole_digest

INCUMBENT_REFERENCE = "incumbent's reference"


@dataclass(frozen=True)
class Inputs:
    """Inputs of evaluate: folders of earlier steps, the incumbent's URI (empty before the first champion), and the
    other inputs of the gate.
    """

    dataset: Path
    base_model: Path
    sft_model: Path
    policy: Path
    incumbent: str
    decision_index: int
    """Number of this decision among those on the same test set, from 1."""
    data_clean: bool
    """Whether a commit records exactly this data."""
    test_set: str
    """md5 of the test side's pairs."""


@dataclass(frozen=True)
class Candidate:
    """A model to score.

    Args:
        name: `base`, `sft`, `policy`, `incumbent`, or the incumbent's reference.
        content: hash of its weights.
        tokenizer: its tokenizer.
        open: loads the model.
        reference: name of the candidate that it was trained from; empty if there is none or it is not known.
        beta: beta of its preference training; None without one.
        loss: loss of its preference training; empty without one.
    """

    name: str
    content: str
    tokenizer: Any
    open: Callable[[], PackedModel]
    reference: str = ""
    beta: float | None = None
    loss: str = ""


def find_candidates(run: StageRun, model: ExecutionConfig, inputs: Inputs) -> tuple[list[Candidate], str]:
    """All candidates, each before its reference, so a model's samples exist when its reference is opened; and the
    sha256 of the incumbent's statement, empty without one. There is no `sft` where the policy is the SFT model.

    Raises:
        InputError: a file changed since it was written, or the incumbent cannot be loaded.
    """
    base_digest = verify_manifest(inputs.base_model)
    sft_digest, _ = verify_manifest(inputs.sft_model), verify_manifest(inputs.policy)
    tokenizer = load_tokenizer(inputs.base_model)

    def tuned(name: str, folder: Path, **trained: Any) -> Candidate:
        opens = partial(open_tuned, run, inputs.base_model, folder, model, name)
        return Candidate(name, weights_digest(base_digest, folder), tokenizer, opens, **trained)

    training = read_dpo_training(inputs.policy)
    opens = partial(open_model, run, inputs.base_model, model, trains=False)
    base = Candidate("base", base_digest, tokenizer, opens)
    if training["beta"] is None:
        ours, sft = [tuned("policy", inputs.policy, reference="base"), base], "policy"
    else:
        policy = tuned("policy", inputs.policy, reference="sft", beta=training["beta"], loss=training["loss"])
        ours, sft = [policy, tuned("sft", inputs.sft_model, reference="base"), base], "sft"
    if not inputs.incumbent:
        return ours, ""
    folder, statement = download_incumbent(inputs.incumbent)
    known = {sft_digest: sft}
    return [*_incumbent(run, model, inputs, folder, base_digest, known), *ours], statement


def _incumbent(
    run: StageRun, model: ExecutionConfig, inputs: Inputs, folder: Path, base_digest: str, sft: dict[str, str]
) -> list[Candidate]:
    """The incumbent, and its reference if that is none of the candidates.

    Args:
        sft: the candidate that is this run's SFT model, by that model's digest.
    """
    training = read_dpo_training(folder)
    beta, loss = training["beta"], training["loss"]
    known = sft.get(training["sft_digest"], "") if beta is not None else "base"
    known = known if training["base_digest"] == base_digest else ""
    trained_base = _base_of(folder / "adapter").removeprefix("sha256:")
    if trained_base != base_digest and (folder / "model" / "config.json").is_file():
        opens = partial(open_model, run, folder / "model", model, trains=False)
        tokenizer, content = load_tokenizer(folder / "model"), whole_digest(folder / "model")
        return [Candidate("incumbent", content, tokenizer, opens, known, beta, loss)]
    base = inputs.base_model if trained_base == base_digest else _base_in_registry(inputs.incumbent, folder)
    opens = partial(open_tuned, run, base, folder, model, "incumbent")
    content, tokenizer = adapted_digest(trained_base, folder / "adapter"), load_tokenizer(base)
    rank = training["reference_rank"]
    reference = known or (INCUMBENT_REFERENCE if rank else "")
    incumbent = Candidate("incumbent", content, tokenizer, opens, reference, beta, loss)
    if reference != INCUMBENT_REFERENCE:
        return [incumbent]

    def open_reference() -> PackedModel:
        opened = opens()
        keep_first_ranks(opened.lm, "incumbent", rank)
        return opened

    return [incumbent, Candidate(reference, digest([content, "first ranks", rank]), tokenizer, open_reference)]


def download_incumbent(uri: str) -> tuple[Path, str]:
    """The artifacts of a registered version, and the sha256 of the signed statement that they are what was judged.

    Raises:
        InputError: it cannot be downloaded.
        EvidenceError: nothing proves that it is what was registered.
    """
    name, number = uri.removeprefix("models:/").rsplit("/", 1)
    download = _fetch(uri, f"incumbent {uri}")
    checked = check_version(store.client(), name, number, download)
    return download / "artifacts", checked.evidence.digest


def _base_in_registry(incumbent: str, folder: Path) -> Path:
    """The base model of an incumbent that was registered as an adapter of a base other than ours."""
    recorded = read_document(folder / "base.json", BaseReference)
    base = _fetch(recorded["reference"], f"the base model {recorded['reference']} of incumbent {incumbent}")
    if any(sha256_file(base / name) != expected for name, expected in recorded["files"].items()):
        raise InputError(f"incumbent {incumbent}: the files of its base model {recorded['reference']} changed")
    return base


def _fetch(uri: str, what: str) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    store.client()
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise InputError(f"{what} cannot be downloaded: {single_line(str(error))}") from error


def _base_of(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    return str(read_json(file).get("base_model_name_or_path")) if file.exists() else ""
