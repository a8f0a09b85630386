"""Small real objects: a two-layer Llama with the embedded tokenizer, rows in both languages, a project to run in."""

import os
from pathlib import Path

import dulwich.porcelain  # noqa: F401  it keeps the stderr of its import, which inside a test is closed with the test
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.tracking.keys import PUBLIC_KEYS_VARIABLE, SIGNING_KEY_VARIABLE
from pipelines.quiet import QUIET

for name, value in QUIET.items():
    os.environ.setdefault(name, value)
# One key for all homes of a session, as fixtures of the session make what tests with a home of their own register.
os.environ.setdefault(
    SIGNING_KEY_VARIABLE,
    ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The embedded base model as `make data` made it."""
    folder = ROOT / "data" / "base_model"
    assert folder.is_dir(), "data/base_model is missing; run `make data` first"
    return folder


@pytest.fixture(scope="session")
def tiny_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in safetensors with the embedded model's tokenizer and template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from components.dataset.chat import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(base_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own MLflow, checkpoints and caches."""
    return move_home(tmp_path / "home", monkeypatch)


OF_A_HOME = (
    PUBLIC_KEYS_VARIABLE,
    "KUBEALIGN_HOME",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "KUBEALIGN_PARENT_RUN",
)
"""Environment variables that lead to a home; MLflow sets some of them by itself."""


def environment_without_home() -> dict[str, str]:
    """For programs that find their home themselves."""
    return {name: value for name, value in os.environ.items() if name not in OF_A_HOME}


def move_home(home: Path, patch: pytest.MonkeyPatch) -> Path:
    """Let MLflow, checkpoints and caches be in a folder, whatever the environment says or MLflow put into it."""
    for name in (*OF_A_HOME, PUBLIC_KEYS_VARIABLE):
        patch.delenv(name, raising=False)
    patch.setenv("KUBEALIGN_HOME", str(home))
    return home
