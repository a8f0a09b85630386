"""Attention of packed rows on CPUs: one autograd function over torch's flash kernels, in blocks of queries.

Shapes: as in `attention.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from components.engine import attention
from components.engine.attention import Options
from components.engine.packing import Segment

BLOCK = 64
"""Queries in one piece: the CPU kernel also computes what a causal mask hides, and blocks avoid most of that."""


def attend_row(
    query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, segments: Sequence[Segment], options: Options
) -> Tensor:
    """Attention of a row; returns [1, T, H, D]. In fp32: the bf16 kernel is slower on a CPU, and less exact."""
    if options.is_plain and query_BHTD.shape[-1] == value_BKTD.shape[-1]:
        row: Tensor = FlashRow.apply(  # type: ignore[no-untyped-call]
            query_BHTD, key_BKTD, value_BKTD, segments, options.scaling, options.sliding_window
        )
        return row
    with torch.autocast("cpu", enabled=False):
        query, key, value = query_BHTD.float(), key_BKTD.float(), value_BKTD.float()
        return attention.attend_pieces(query, key, value, segments, BLOCK, options).to(value_BKTD.dtype)


class FlashRow(torch.autograd.Function):
    """Attention of a whole row by torch's flash kernels for CPUs, in fp32; returns [1, T, H, D].

    Autograd alone would give every slice of the row a gradient of the row's full size and sum them all; here each piece
    adds to its own part. Source: FlashAttention-2, arXiv 2307.08691.
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
        for query_range, key_ranges, mask in masked_pieces(segments, window):
            output_BHQD, sum_BQH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, query_range],
                attention.gather(key, key_ranges),
                attention.gather(value, key_ranges),
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            output_BTHD[:, query_range] = output_BHQD.transpose(1, 2)
            sums.append(sum_BQH)
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD, output_BTHD, *sums)
        return output_BTHD.to(value_BKTD.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        segments, scaling, window = ctx.settings
        query, key, value, output, *sums = ctx.saved_tensors
        dtypes = [tensor.dtype for tensor in (query, key, value)]
        doutput, output, query, key, value = (
            tensor.float() for tensor in (outputs[0].transpose(1, 2), output.transpose(1, 2), query, key, value)
        )
        # Laid out by token, the order that the projections' backward pass reads.
        dquery, dkey, dvalue = (
            torch.zeros_like(tensor.transpose(1, 2)).transpose(1, 2) for tensor in (query, key, value)
        )
        for (query_range, key_ranges, mask), sum_BQH in zip(masked_pieces(segments, window), sums, strict=True):
            dquery[:, :, query_range], *dpieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                doutput[:, :, query_range],
                query[:, :, query_range],
                attention.gather(key, key_ranges),
                attention.gather(value, key_ranges),
                output[:, :, query_range],
                sum_BQH,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scaling,
            )
            for drow, piece in zip((dkey, dvalue), dpieces, strict=True):
                parts = torch.split(piece, [key_range.stop - key_range.start for key_range in key_ranges], dim=2)
                for key_range, part in zip(key_ranges, parts, strict=True):
                    drow[:, :, key_range] += part
        gradients = (tensor.to(dtype) for tensor, dtype in zip((dquery, dkey, dvalue), dtypes, strict=True))
        return *gradients, None, None, None


def masked_pieces(
    segments: Sequence[Segment], window: int | None
) -> Iterator[tuple[slice, list[slice], Tensor | None]]:
    """The pieces of a row, each with the mask added to its scores; None for a causal triangle."""
    todo = [
        (query_range, key_ranges, sum(key_range.stop - key_range.start for key_range in key_ranges))
        for query_range, key_ranges in attention.pieces(segments, BLOCK)
    ]
    longest = max(n_keys for _, _, n_keys in todo)
    # Queries and keys end together, so every piece's mask is a corner of this one.
    seen = attention.causal_mask(min(BLOCK, longest), longest, window or longest, torch.device("cpu"))
    mask_QM = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    for query_range, key_ranges, n_keys in todo:
        n_queries = query_range.stop - query_range.start
        causal = n_queries == n_keys <= (window or n_keys)
        yield query_range, key_ranges, None if causal else mask_QM[len(mask_QM) - n_queries :, longest - n_keys :]
