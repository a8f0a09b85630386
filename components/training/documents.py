"""training.json: the metrics of a training and the digests of its inputs.

It is registered with the model and must stay readable there, so fields that other versions of kubealign add are
ignored.
"""

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from components.common.documents import read_document


class SftTraining(TypedDict):
    """training.json of sft."""

    metrics: dict[str, float]
    """Loss on the validation answers before and after training, nats per token."""
    base_digest: str


class DpoTraining(TypedDict):
    """training.json of dpo."""

    metrics: NotRequired[dict[str, float]]
    """Loss and rewards on the validation pairs; version 0.1 wrote them at the top level."""
    beta: float | None
    """None without preference training (`dpo.epochs: 0`): the policy is the SFT model."""
    loss: str
    """The preference loss, such as `sigmoid`; empty likewise."""
    precision: str
    quantization: NotRequired[str]
    """Of the base that was trained on; version 0.1 did not write it."""
    base_digest: str
    sft_digest: str
    reference_rank: int
    """The first ranks of the exported adapter are the reference; 0 after full fine-tuning, or without a reference."""
    libraries: dict[str, str]
    """Versions of the libraries that the model was written with and loads with."""


def read_dpo_training(folder: Path) -> DpoTraining:
    """training.json of a folder that dpo wrote.

    Raises:
        InputError: the file or a field is missing, or a field has the wrong type.
    """
    return read_document(folder / "training.json", DpoTraining, unknown="ignore")
