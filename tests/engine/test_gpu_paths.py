"""What runs on a GPU alone, as far as a CPU can show it: the same values from its layouts and its element-wise code.

On a CPU the decorators of `devices.py` would call the functions of `cpu/`; `unwrap` takes the GPU's own.
"""

from inspect import unwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.engine import attention, fused, head
from components.engine.packing import Example, pack

ROWS = [Example([1, 2, 3], [[4, 5], [6, 7, 8]]), Example([9, 10], [[11, 12, 13]]), Example([3], [[1], [2, 4], [5]])]


def by_sequence(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, *_: int, **options: Any
) -> Tensor:
    """Variable-length attention as its documentation says, a sequence at a time; torch has it for GPUs only."""
    bounds = zip(starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False)
    outputs = []
    for first, last, begin, end in bounds:
        q, k, v = (each.transpose(0, 1)[None] for each in (query[first:last], key[begin:end], value[begin:end]))
        window = options["window_size"][0] + 1 if options["window_size"][0] >= 0 else None
        outputs.append(
            attention.attend(q, k, v, attention.Options(options["scale"], sliding_window=window))[0].transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_as_sequences_of_variable_length_gives_the_outputs_and_gradients_of_its_pieces(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", by_sequence)
    row = pack(ROWS)
    generator = torch.Generator().manual_seed(0)
    n = len(row.input_ids_T)
    query, key, value = (
        torch.randn(1, heads, n, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    )
    pieces = [
        attention.attend(
            query[:, :, at],
            attention.gather(key, r),
            attention.gather(value, r),
            attention.Options(sliding_window=window),
        )
        for at, r in attention.pieces(row.segments, n)
    ]
    expected = torch.cat(pieces, dim=2)[0].transpose(0, 1)
    layout = attention.varlen(row.segments, torch.device("cpu"))
    found = attention.attend_varlen(query[0], key[0], value[0], layout, None, window)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * slope).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * slope).sum(), (query, key, value))
    torch.testing.assert_close(ours, theirs)


def test_a_row_without_further_completions_gathers_no_keys() -> None:
    layout = attention.varlen(pack([Example([1, 2], [[3]]), Example([4], [[5, 6]])]).segments, torch.device("cpu"))
    assert layout.key_M is None
    assert layout.query_starts_U1.tolist() == layout.key_starts_U1.tolist() == [0, 3, 6]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_fused_softmax_gives_log_probs_and_their_slope(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 11, generator=generator, requires_grad=True)
    target = torch.tensor([0, 3, 10, 5, 5])
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = capped.log_softmax(1).gather(1, target[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    with torch.no_grad():
        logps, minus_slope = unwrap(head.logps_and_slope)(logits, target, softcap, torch.float32)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(-minus_slope, slope)


def test_the_head_on_a_gpu_gives_what_the_head_on_a_cpu_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "GPU_CHUNK_LOGITS", 4 * 13)
    monkeypatch.setattr("components.engine.cpu.head.CHUNK_TOKENS", 4)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(10, 6, generator=generator), torch.randn(13, 6, generator=generator)
    target = torch.randint(13, (10,), generator=generator)
    logps, gradient = unwrap(head.frozen_logps)(hidden, target, weight, None, True)
    again = hidden.clone().requires_grad_()
    expected = head.FrozenHeadLogps.apply(again, target, weight, None)
    torch.testing.assert_close(logps, expected.detach())
    (slope,) = torch.autograd.grad(expected.sum(), again)
    torch.testing.assert_close(gradient, slope)


def test_the_fused_norm_and_gate_have_the_gradients_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(3)
    x, gate, up, dy = (torch.randn(4, 6, generator=generator, requires_grad=i < 3) for i in range(4))
    weight = torch.rand(6, generator=generator)
    expected = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    scale = unwrap(fused.norm_scale)(x.detach(), 1e-6)
    torch.testing.assert_close(unwrap(fused.normed)(x, scale, weight, torch.float32), expected)
    (dx,) = torch.autograd.grad((expected * dy).sum(), x)
    torch.testing.assert_close(unwrap(fused.norm_gradient)(dy, x, scale, weight).detach(), dx)
    product = F.silu(gate) * up
    torch.testing.assert_close(unwrap(fused.gated)(gate, up), product)
    torch.testing.assert_close(
        tuple(each.detach() for each in unwrap(fused.gated_gradient)(dy, gate, up)),
        torch.autograd.grad((product * dy).sum(), (gate, up)),
    )
