"""The losses, against numbers worked out by hand."""

import math

import pytest
import torch

from components.training import objectives


def test_sequence_logps_sum_the_tokens_of_each_completion() -> None:
    tokens = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert objectives.sequence_logps(tokens, torch.tensor([0, 0, 1, 1]), 3).tolist() == [-3.0, -12.0, 0.0]


def test_sft_loss_is_the_mean_over_the_global_batch_not_the_micro_batch() -> None:
    first, second = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-6.0])
    whole = objectives.sft_loss(torch.cat([first, second]), 4)
    assert whole.item() == 3.0
    assert (objectives.sft_loss(first, 4) + objectives.sft_loss(second, 4)).item() == 3.0


def test_equal_policy_and_reference_give_ln_2() -> None:
    logps = torch.tensor([-3.0, -7.5])
    chosen, rejected = objectives.rewards(logps, logps.clone(), beta=0.7)
    assert objectives.dpo_sigmoid_loss((chosen - rejected)[None]).item() == pytest.approx(objectives.LN2)


def test_dpo_loss_of_a_worked_pair() -> None:
    # Three tokens each: chosen -1 -1 -2 = -4 against -5, rejected -2 -2 -2 = -6 against -4; beta 0.5.
    # Rewards 0.5 * 1 = 0.5 and 0.5 * -2 = -1, margin 1.5, loss -log sigmoid(1.5) = ln(1 + e^-1.5).
    chosen, rejected = objectives.rewards(torch.tensor([-4.0, -6.0]), torch.tensor([-5.0, -4.0]), beta=0.5)
    loss = objectives.dpo_sigmoid_loss((chosen - rejected)[None])
    assert (chosen - rejected).item() == 1.5
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_swapping_chosen_and_rejected_negates_the_margin_and_half_smoothing_is_symmetric() -> None:
    margins = torch.tensor([0.3, -2.0, 5.0])
    assert torch.allclose(objectives.dpo_sigmoid_loss(margins, 0.5), objectives.dpo_sigmoid_loss(-margins, 0.5))
    assert not torch.allclose(objectives.dpo_sigmoid_loss(margins), objectives.dpo_sigmoid_loss(-margins))


def test_label_smoothing_mixes_both_labels() -> None:
    # margin 1, eps 0.1: 0.9 * ln(1 + e^-1) + 0.1 * ln(1 + e^1)
    expected = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.e)
    assert objectives.dpo_sigmoid_loss(torch.tensor([1.0]), 0.1).item() == pytest.approx(expected)


def test_the_gradient_vanishes_with_beta() -> None:
    logps = torch.tensor([-3.0, -4.0], requires_grad=True)
    chosen, rejected = objectives.rewards(logps, torch.tensor([-3.5, -3.0]), beta=1e-8)
    objectives.dpo_sigmoid_loss((chosen - rejected)[None]).sum().backward()
    assert logps.grad is not None and logps.grad.abs().max().item() < 1e-8
