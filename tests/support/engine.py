"""The tiny model in the packed engine, and settings of a short training."""

from pathlib import Path

from components.engine import loop
from components.engine.models import (
    DPO_ADAPTER,
    PackedModel,
    add_lora,
    load_causal_lm,
)

SETTINGS = loop.LoopSettings(
    epochs=3.0,
    max_steps=0,
    batch_size=2,
    max_tokens_per_microbatch=16,
    learning_rate=1e-2,
    warmup_ratio=0.1,
    lr_scheduler="cosine",
    weight_decay=0.01,
    max_grad_norm=1.0,
    seed=3,
    checkpoint_every_s=1e-9,
    eval_every_steps=0,
    early_stopping_patience=0,
)


def packed(tiny: Path) -> PackedModel:
    return PackedModel(load_causal_lm(tiny, "fp32"), "fp32")


def with_adapter(tiny: Path, dropout: float = 0.0) -> PackedModel:
    return PackedModel(add_lora(load_causal_lm(tiny, "fp32"), DPO_ADAPTER, 4, 8, dropout, "all-linear", 1), "fp32")
