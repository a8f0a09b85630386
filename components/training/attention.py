"""Attention for packed rows, by the `packed` entry of transformers' AttentionInterface.

A completion sees its prompt and itself; other completions and other examples do not exist for it. The bounds arrive as
the plain forward keyword `segments` (see `packing.py`), which transformers hands through to the attention function. As
no mask is registered under the name, the library builds none. Each segment is one call of torch's fused attention.

Shapes: B=1, H query heads, K key-value heads (H is a multiple of K), T tokens of the row, D head width; Q and M are the
query and key tokens of one call.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from components.training.packing import Segment

PACKED = "packed"
CPU_BLOCK = 128
"""Queries in one call on a CPU, whose kernel computes what a causal mask hides; blocks spare most of it."""


@lru_cache(maxsize=512)
def causal_mask(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean [Q, M], true where a query sees a key: the last Q of M positions, causal, at most `window` back."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - window)


def attend(
    query_BHQD: Tensor,
    key_BKMD: Tensor,
    value_BKMD: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention of the last Q positions over M; returns [B, H, Q, D].

    Args:
        scaling: factor on the scores; None for 1/sqrt(D).
        dropout: probability on the attention weights.
        sliding_window: how many positions a query looks back, itself included; None for all.
        softcap: Gemma 2's cap on the scores, cap * tanh(score / cap); None for no cap.
        sinks_H: GPT-OSS's learnt sink logit of each head, or None.
    """
    n_queries, n_keys = query_BHQD.shape[2], key_BKMD.shape[2]
    window = min(sliding_window or n_keys, n_keys)
    grouped = query_BHQD.shape[1] != key_BKMD.shape[1]
    if softcap is None and sinks_H is None:
        size = CPU_BLOCK if query_BHQD.device.type == "cpu" else n_queries
        pieces = []
        for first in range(0, n_queries, size):
            last = min(first + size, n_queries)
            seen = n_keys - n_queries + last
            causal = last - first == seen <= window
            pieces.append(
                F.scaled_dot_product_attention(
                    query_BHQD[:, :, first:last],
                    key_BKMD[:, :, :seen],
                    value_BKMD[:, :, :seen],
                    None if causal else causal_mask(last - first, seen, window, query_BHQD.device),
                    dropout,
                    is_causal=causal,
                    scale=scaling,
                    enable_gqa=grouped,
                )
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    repeats = query_BHQD.shape[1] // key_BKMD.shape[1]
    key, value = key_BKMD.repeat_interleave(repeats, 1), value_BKMD.repeat_interleave(repeats, 1)
    scores = query_BHQD @ key.mT * (scaling or query_BHQD.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = causal_mask(n_queries, n_keys, window, scores.device)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, n_queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :n_keys].to(value.dtype)
    return F.dropout(weights, dropout) @ value


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] = (),
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that transformers calls: query [1, H, T, D], key and value [1, K, T, D].

    Returns:
        output [1, T, H, D], and None for the weights.

    Raises:
        ValueError: called without `segments`, as by a plain forward pass or generation.
    """
    if not segments:
        raise ValueError("packed attention needs `segments`; set_attn_implementation('sdpa') first for a plain forward")
    rest = (scaling, dropout, sliding_window, softcap, s_aux)
    device, dtype = query.device.type, value.dtype
    outputs = []
    # On a CPU the bf16 kernel is slower than the fp32 one, and less exact.
    with torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)):
        if device == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        for start, end, branches in segments:
            # The first completion follows its prompt in the row, so both go through one causal call.
            first = slice(start, branches[0][1] if branches else end)
            outputs.append(attend(query[:, :, first], key[:, :, first], value[:, :, first], *rest))
            for begin, stop in branches[1:]:
                keys = torch.cat([key[:, :, start:end], key[:, :, begin:stop]], dim=2)
                values = torch.cat([value[:, :, start:end], value[:, :, begin:stop]], dim=2)
                outputs.append(attend(query[:, :, begin:stop], keys, values, *rest))
        return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
