"""The losses, against numbers worked out by hand."""

import math

import pytest
import torch

from components.engine import objectives


def test_sequence_logps_sum_the_tokens_of_each_completion() -> None:
    tokens = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert objectives.sequence_logps(tokens, torch.tensor([0, 0, 1, 1]), 3).tolist() == [-3.0, -12.0, 0.0]


def test_a_long_answer_is_summed_exactly() -> None:
    """In fp32 the sum of 2,000 tokens is off by far more than the loss of a pair bears."""
    tokens = -6 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    exact, sequence = math.fsum(tokens.tolist()), torch.zeros(2000, dtype=torch.int64)
    assert objectives.sequence_logps(tokens, sequence, 1).item() == pytest.approx(exact, abs=1e-9)
    assert abs(torch.zeros(1).index_add(0, sequence, tokens).item() - exact) > 1e-4


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


# Log-ratios per token used below: chosen 0.4, rejected -0.2; sequence rewards 1.0 and -0.5.


def test_robust_dpo_by_hand_and_without_noise_it_is_dpo() -> None:
    # margin 1, eps 0.1: (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8
    expected = (0.9 * math.log1p(math.exp(-1)) - 0.1 * math.log1p(math.e)) / 0.8
    margin = torch.tensor([1.0])
    assert objectives.robust_dpo_loss(margin, 0.1).item() == pytest.approx(expected)
    assert torch.equal(objectives.robust_dpo_loss(margin, 0.0), objectives.dpo_sigmoid_loss(margin))


def test_robust_dpo_is_unbiased_under_swapped_labels() -> None:
    margin = torch.tensor([0.7])
    eps = 0.2
    noisy = (1 - eps) * objectives.robust_dpo_loss(margin, eps) + eps * objectives.robust_dpo_loss(-margin, eps)
    assert noisy.item() == pytest.approx(objectives.dpo_sigmoid_loss(margin).item(), rel=1e-5)


def test_hinge_by_hand() -> None:
    assert objectives.hinge_loss(torch.tensor([0.25, 1.0, 3.0, -1.0])).tolist() == [0.75, 0.0, 0.0, 2.0]


def test_ipo_by_hand_and_zero_at_its_target() -> None:
    chosen, rejected = torch.tensor([0.4]), torch.tensor([-0.2])
    assert objectives.ipo_loss(chosen, rejected, beta=1.0).item() == pytest.approx((0.6 - 0.5) ** 2)
    assert objectives.ipo_loss(torch.tensor([5.0]), torch.tensor([0.0]), beta=0.1).item() == 0.0


def test_apo_by_hand() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    chosen, rejected = torch.tensor([1.0]), torch.tensor([-0.5])
    assert objectives.apo_zero_loss(chosen, rejected).item() == pytest.approx(1 - sigmoid(1) + sigmoid(-0.5))
    assert objectives.apo_down_loss(chosen, rejected).item() == pytest.approx(sigmoid(1) + 1 - sigmoid(1.5))
    zero = torch.zeros(1)
    assert objectives.apo_zero_loss(zero, zero).item() == objectives.apo_down_loss(zero, zero).item() == 1.0


def test_simpo_by_hand() -> None:
    # per token -1 and -1.5, beta 2, gamma 0.5: -log sigmoid(2 * 0.5 - 0.5)
    found = objectives.simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=0.5)
    assert found.item() == pytest.approx(math.log1p(math.exp(-0.5)))


def test_orpo_by_hand() -> None:
    # p 0.5 has odds 1, p 0.2 odds 1/4: log odds ratio ln 4, sigmoid of it 0.8; loss ln 2 + 0.1 * -ln 0.8.
    found = objectives.orpo_loss(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)]), weight=0.1)
    assert found.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.8))
