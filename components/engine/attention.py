"""Attention for packed rows: a completion sees its prompt and itself, never other completions or examples.

Where those lie in the row arrives as the forward keyword `segments` (see `packing.py`), which transformers passes on to
the attention function. On a GPU in bf16 a row is one call of torch's variable-length flash attention; what that does
not cover goes piece by piece through torch's fused attention. `devices.py` registers it with transformers and sends
CPUs to `cpu/attention.py`.

Shapes: B=1, H query heads, K key-value heads (H is a multiple of K), T tokens of the row, D head width; Q and M are the
query and key tokens of one piece.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from components.engine.packing import Segment


class Options(NamedTuple):
    """How a model attends."""

    scaling: float | None = None
    """Factor on the scores; None for 1/sqrt(D)."""
    dropout: float = 0.0
    """Probability on the attention weights."""
    sliding_window: int | None = None
    """How many positions a query looks back, itself included; None for all."""
    softcap: float | None = None
    """Gemma 2's cap on the scores, cap * tanh(score / cap); None for no cap."""
    sinks_H: Tensor | None = None
    """GPT-OSS's learnt sink logit of each head, or None."""

    @property
    def is_plain(self) -> bool:
        """Whether flash attention covers it: no dropout, no softcap, no sinks."""
        return not (self.dropout or self.softcap or self.sinks_H is not None)


def causal_mask(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean [Q, M], true where a query sees a key: the last Q of M positions, causal, at most `window` back."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - window)


def pieces(segments: Sequence[Segment], size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Split the row into (range of at most `size` queries, ranges of the keys that they see and that end with them)."""
    for start, end, branches in segments:
        # The first completion follows its prompt in the row, so both are one causal sequence.
        sequences = [(start, start, branches[0][1] if branches else end)]
        sequences += [(end, begin, stop) for begin, stop in branches[1:]]
        for prompt_end, begin, stop in sequences:
            prompt = [slice(start, prompt_end)] if prompt_end > start else []
            for first in range(begin, stop, size):
                last = min(first + size, stop)
                yield slice(first, last), [*prompt, slice(begin, last)]


class Varlen(NamedTuple):
    """A row as sequences of variable length: queries in row order, keys with the prompt repeated for each completion.

    U sequences: prompt + first completion of each example, and each further completion; M keys in all.
    """

    query_starts_U1: Tensor
    """int32, the start of each sequence's queries, and the end of the last."""
    key_starts_U1: Tensor
    longest_query: int
    longest_key: int
    key_M: Tensor | None
    """Row index of each key; None if the keys are the row itself."""
    row_T: Tensor | None
    """Key index of each token of the row."""
    copies: tuple[tuple[Tensor, Tensor], ...]
    """(key index, row index) of further copies of the prompts; no token occurs twice within one of them."""


def varlen(segments: Sequence[Segment], device: torch.device) -> Varlen:
    """The sequences of a row; keys end with the queries, which is flash attention's causal alignment."""
    queries, keys = [0], [0]
    key: list[int] = []
    row: list[int] = []
    copies: dict[int, tuple[list[int], list[int]]] = {}
    for start, end, branches in segments:
        for branch, (begin, stop) in enumerate(branches or ((end, end),)):
            if branch == 0:
                row += range(len(key), len(key) + stop - start)
                key += range(start, stop)
                queries.append(stop - start)
                keys.append(stop - start)
                continue
            key_indices, row_indices = copies.setdefault(branch, ([], []))
            key_indices += range(len(key), len(key) + end - start)
            row_indices += range(start, end)
            key += range(start, end)
            row += range(len(key), len(key) + stop - begin)
            key += range(begin, stop)
            queries.append(stop - begin)
            keys.append(end - start + stop - begin)

    def index(values: Sequence[int], dtype: torch.dtype = torch.long) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    def starts(lengths: Sequence[int]) -> Tensor:
        return index(list(accumulate(lengths)), torch.int32)

    return Varlen(
        starts(queries),
        starts(keys),
        max(queries),
        max(keys),
        index(key) if copies else None,
        index(row) if copies else None,
        tuple((index(key_indices), index(row_indices)) for key_indices, row_indices in copies.values()),
    )


class GatherKeys(torch.autograd.Function):
    """Keys or values [T, K, D] with the prompts repeated, [M, K, D]; gradients are summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, row_TKD: Tensor, layout: Varlen) -> Tensor:
        ctx.layout = layout
        assert layout.key_M is not None
        return row_TKD.index_select(0, layout.key_M)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        layout: Varlen = ctx.layout
        assert layout.row_T is not None
        gradient_TKD = outputs[0].index_select(0, layout.row_T)
        for key_indices, row_indices in layout.copies:
            gradient_TKD[row_indices] += outputs[0].index_select(0, key_indices)
        return gradient_TKD, None


def attend_varlen(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: Varlen, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of all sequences of a row in one call, bf16 on a GPU; returns [T, H, D]."""
    query_THD, key_MKD, value_MKD = (tensor.transpose(0, 1) for tensor in (query_HTD, key_KTD, value_KTD))
    if layout.key_M is not None:
        key_MKD, value_MKD = (GatherKeys.apply(tensor, layout) for tensor in (key_MKD, value_MKD))  # type: ignore[no-untyped-call]
    output = varlen_attn(
        query_THD,
        key_MKD,
        value_MKD,
        layout.query_starts_U1,
        layout.key_starts_U1,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query_THD.shape[1] != key_MKD.shape[1],
    )
    return cast(Tensor, output)


def gather(tensor_BHTD: Tensor, ranges: Sequence[slice]) -> Tensor:
    """The tokens of these ranges of the row, concatenated."""
    parts = [tensor_BHTD[:, :, tokens] for tokens in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def attend(query_BHQD: Tensor, key_BKMD: Tensor, value_BKMD: Tensor, options: Options) -> Tensor:
    """Causal attention of the last Q positions over M; returns [B, H, Q, D]."""
    scaling, dropout, sliding_window, softcap, sinks_H = options
    n_queries, n_keys = query_BHQD.shape[2], key_BKMD.shape[2]
    window = min(sliding_window or n_keys, n_keys)
    if softcap is None and sinks_H is None:
        causal = n_queries == n_keys <= window
        return F.scaled_dot_product_attention(
            query_BHQD,
            key_BKMD,
            value_BKMD,
            None if causal else causal_mask(n_queries, n_keys, window, query_BHQD.device),
            dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query_BHQD.shape[1] != key_BKMD.shape[1],
        )
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


def attend_pieces(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, segments: Sequence[Segment], size: int, options: Options
) -> Tensor:
    """Attention of a row in pieces of at most `size` queries, one call each; returns [1, T, H, D]."""
    todo = list(pieces(segments, size))
    queries = torch.split(query_BHTD, [query_range.stop - query_range.start for query_range, _ in todo], dim=2)
    outputs = [
        attend(query_BHQD, gather(key_BKTD, ranges), gather(value_BKTD, ranges), options)
        for query_BHQD, (_, ranges) in zip(queries, todo, strict=True)
    ]
    return torch.cat(outputs, dim=2).to(value_BKTD.dtype).transpose(1, 2)


def attend_row(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    segments: Sequence[Segment],
    layout: Varlen | None,
    options: Options,
) -> Tensor:
    """Attention of a row on a GPU: one flash attention call in bf16 where that covers it, otherwise by pieces.

    Returns:
        [1, T, H, D].
    """
    dtype = value_BKTD.dtype
    if layout is not None and dtype == torch.bfloat16 and options.is_plain:
        query_HTD, key_KTD = query_BHTD[0].to(dtype), key_BKTD[0].to(dtype)
        return attend_varlen(query_HTD, key_KTD, value_BKTD[0], layout, options.scaling, options.sliding_window)[None]
    return attend_pieces(query_BHTD, key_BKTD, value_BKTD, segments, query_BHTD.shape[2], options)
