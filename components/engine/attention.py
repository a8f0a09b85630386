"""Attention for packed rows, by the `packed` entry of transformers' AttentionInterface.

A completion sees its prompt and itself; other completions and other examples do not exist for it. The bounds arrive as
the plain forward keyword `segments` (see `packing.py`), which transformers hands through to the attention function. As
no mask is registered under the name, the library builds none. On a GPU in bf16 a row is one call of torch's
variable-length flash attention, on a CPU one autograd function over torch's flash kernels; for what neither covers,
each piece of it is one call of torch's fused attention.

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
from transformers import AttentionInterface

from components.engine.packing import Segment

PACKED = "packed"
CPU_BLOCK = 64
"""Queries in one piece on a CPU, whose kernel computes what a causal mask hides; blocks spare most of it."""


def causal_mask(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean [Q, M], true where a query sees a key: the last Q of M positions, causal, at most `window` back."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - window)


def pieces(segments: Sequence[Segment], size: int) -> Iterator[tuple[slice, list[slice]]]:
    """At most `size` queries in the row, and the key ranges that together end with them, for every query of the row."""
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
    """A row as sequences of variable length: queries in the row's order, keys with each prompt repeated per completion.

    U sequences: prompt + first completion of each example, and each further completion; M keys of all of them.
    """

    query_starts_U1: Tensor
    """int32, where the queries of each sequence start, and their end."""
    key_starts_U1: Tensor
    longest_query: int
    longest_key: int
    key_M: Tensor | None
    """Row index of each key; None where the keys are the row as it is."""
    own_T: Tensor | None
    """Where in the keys each token of the row stands as itself."""
    copies: tuple[tuple[Tensor, Tensor], ...]
    """(where in the keys, which token of the row) of the prompts' further copies; no token twice in one of them."""


def varlen(segments: Sequence[Segment], device: torch.device) -> Varlen:
    """The sequences of a row, once for all layers; a query sees what ends with it: flash attention's causal order."""
    queries, keys = [0], [0]
    key: list[int] = []
    own: list[int] = []
    copies: dict[int, tuple[list[int], list[int]]] = {}
    for start, end, branches in segments:
        for number, (begin, stop) in enumerate(branches or ((end, end),)):
            if number == 0:
                own += range(len(key), len(key) + stop - start)
                key += range(start, stop)
                queries.append(stop - start)
                keys.append(stop - start)
                continue
            places, rows = copies.setdefault(number, ([], []))
            places += range(len(key), len(key) + end - start)
            rows += range(start, end)
            key += range(start, end)
            own += range(len(key), len(key) + stop - begin)
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
        index(own) if copies else None,
        tuple((index(places), index(rows)) for places, rows in copies.values()),
    )


class GatherKeys(torch.autograd.Function):
    """Keys or values [T, K, D] with the prompts repeated, [M, K, D]; the gradient is summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, row_TKD: Tensor, layout: Varlen) -> Tensor:
        ctx.layout = layout
        assert layout.key_M is not None
        return row_TKD.index_select(0, layout.key_M)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        layout: Varlen = ctx.layout
        assert layout.own_T is not None
        gradient_TKD = outputs[0].index_select(0, layout.own_T)
        for place, row in layout.copies:
            gradient_TKD[row] += outputs[0].index_select(0, place)
        return gradient_TKD, None


def attend_varlen(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: Varlen, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of all sequences of a row in one call, bf16 on a GPU; returns [T, H, D]."""
    query_THD, key_MKD, value_MKD = (each.transpose(0, 1) for each in (query_HTD, key_KTD, value_KTD))
    if layout.key_M is not None:
        key_MKD, value_MKD = (GatherKeys.apply(each, layout) for each in (key_MKD, value_MKD))  # type: ignore[no-untyped-call]
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
    """The tokens of these ranges of the row, end to end."""
    parts = [tensor_BHTD[:, :, each] for each in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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


class FlashRow(torch.autograd.Function):
    """Attention of a whole row by torch's flash kernels for CPUs, in fp32; returns [1, T, H, D].

    By itself, autograd would give every slice of the row a gradient of the row's whole size and add them all up; here
    each piece adds to its own part. Source: FlashAttention-2, arXiv 2307.08691.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BKTD: Tensor,
        value_BKTD: Tensor,
        segments: Sequence[Segment],
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.settings = segments, scaling, window
        query, key, value = query_BHTD.float(), key_BKTD.float(), value_BKTD.float()
        output_BTHD = torch.empty((1, query.shape[2], *query.shape[1::2]), dtype=query.dtype)
        sums = []
        for at, ranges, mask in FlashRow.masked(segments, window):
            output_BHQD, sum_BQH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, at],
                gather(key, ranges),
                gather(value, ranges),
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            output_BTHD[:, at] = output_BHQD.transpose(1, 2)
            sums.append(sum_BQH)
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD, output_BTHD, *sums)
        return output_BTHD.to(value_BKTD.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        segments, scaling, window = ctx.settings
        query, key, value, output, *sums = ctx.saved_tensors
        dtypes = [each.dtype for each in (query, key, value)]
        doutput, output, query, key, value = (
            each.float() for each in (outputs[0].transpose(1, 2), output.transpose(1, 2), query, key, value)
        )
        # Laid out by token, as the projections before want them.
        dquery, dkey, dvalue = (torch.zeros_like(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
        for (at, ranges, mask), sum_BQH in zip(FlashRow.masked(segments, window), sums, strict=True):
            dquery[:, :, at], *dpieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                doutput[:, :, at],
                query[:, :, at],
                gather(key, ranges),
                gather(value, ranges),
                output[:, :, at],
                sum_BQH,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            for whole, piece in zip((dkey, dvalue), dpieces, strict=True):
                parts = torch.split(piece, [each.stop - each.start for each in ranges], dim=2)
                for each, part in zip(ranges, parts, strict=True):
                    whole[:, :, each] += part
        gradients = (each.to(dtype) for each, dtype in zip((dquery, dkey, dvalue), dtypes, strict=True))
        return *gradients, None, None, None

    @staticmethod
    def masked(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[slice, list[slice], Tensor | None]]:
        """The pieces of a row with what is added to the scores; None for a causal triangle."""
        todo = [
            (at, ranges, sum(each.stop - each.start for each in ranges)) for at, ranges in pieces(segments, CPU_BLOCK)
        ]
        longest = max(n_keys for _, _, n_keys in todo)
        # Queries and keys end together, so every piece's mask is a corner of this one.
        seen = causal_mask(min(CPU_BLOCK, longest), longest, window or longest, torch.device("cpu"))
        mask_QM = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        for at, ranges, n_keys in todo:
            n_queries = at.stop - at.start
            causal = n_queries == n_keys <= (window or n_keys)
            yield at, ranges, None if causal else mask_QM[len(mask_QM) - n_queries :, longest - n_keys :]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] = (),
    layout: Varlen | None = None,
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
    if (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and not (dropout or softcap or s_aux is not None)
    ):
        output: Tensor = FlashRow.apply(query, key, value, segments, scaling, sliding_window)  # type: ignore[no-untyped-call]
        return output, None
    device, dtype = query.device.type, value.dtype
    if layout is not None and dtype == torch.bfloat16 and not (dropout or softcap or s_aux is not None):
        low_query, low_key = query[0].to(dtype), key[0].to(dtype)
        return attend_varlen(low_query, low_key, value[0], layout, scaling, sliding_window)[None], None
    # On a CPU the bf16 kernel is slower than the fp32 one, and less exact.
    with torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)):
        if device == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        size = CPU_BLOCK if device == "cpu" else query.shape[2]
        todo = list(pieces(segments, size))
        queries = torch.split(query, [at.stop - at.start for at, _ in todo], dim=2)
        outputs = [
            attend(query, gather(key, ranges), gather(value, ranges), scaling, dropout, sliding_window, softcap, s_aux)
            for query, (_, ranges) in zip(queries, todo, strict=True)
        ]
        return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
