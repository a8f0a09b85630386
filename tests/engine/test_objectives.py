"""The losses, against numbers worked out by hand."""

import ast
import math
import re
import subprocess
import sys

import pytest
import torch

from components.engine import objectives
from components.engine.objectives import LOSSES, LossOptions, preference_loss
from tests.conftest import ROOT

POLICY, REFERENCE, LENGTHS = (torch.tensor(row) for row in ([-4.0, -6.0], [-5.0, -4.0], [4.0, 5.0]))
"""Log-probs and tokens of a chosen and a rejected answer.

Log-ratios 1 and -2, per token 0.25 and -0.4; log-probs per token -1 and -1.2.
"""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


WORKED = {
    # beta 0.5: rewards 0.5 and -1, margin 1.5
    "sigmoid": (
        LossOptions(0.5, label_smoothing=0.1),
        0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5)),
    ),
    "robust": (
        LossOptions(0.5, label_smoothing=0.1),
        (0.9 * math.log1p(math.exp(-1.5)) - 0.1 * math.log1p(math.exp(1.5))) / 0.8,
    ),
    "hinge": (LossOptions(0.2), 1 - 0.2 * 3),
    "ipo": (LossOptions(2.0), (0.25 + 0.4 - 1 / 4) ** 2),
    "sigmoid_norm": (LossOptions(2.0), math.log1p(math.exp(-2 * (0.25 + 0.4)))),
    "apo_zero": (LossOptions(0.5), 1 - sigmoid(0.5) + sigmoid(-1)),
    "apo_down": (LossOptions(0.5), sigmoid(0.5) + 1 - sigmoid(1.5)),
    "simpo": (LossOptions(2.0, simpo_gamma=0.5), math.log1p(math.exp(-(2 * (-1 + 1.2) - 0.5)))),
    "orpo": (LossOptions(0.5, orpo_lambda=0.8), 1 - 0.8 * math.log(sigmoid(log_odds(-1) - log_odds(-1.2)))),
}
"""Options, and the loss of the pair above, worked out by hand."""


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


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_the_rewards_of_a_worked_pair(name: str) -> None:
    options, expected = WORKED[name]
    losses, rewards = preference_loss(name, POLICY, REFERENCE, LENGTHS, options)
    assert losses.tolist() == pytest.approx([expected])
    scores = {(False, False): [1, -2], (True, False): [0.25, -0.4], (True, True): [-1, -1.2]}
    chosen, rejected = scores[LOSSES[name].per_token, LOSSES[name].reference_free]
    assert rewards.tolist() == pytest.approx([options.beta * chosen, options.beta * rejected])


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_a_policy_that_equals_its_reference_has(name: str) -> None:
    """Whatever beta and the log-probs; where the value depends on them, the table has none."""
    found = [
        preference_loss(name, logps, logps, LENGTHS, LossOptions(beta, simpo_gamma=0.5, orpo_lambda=0.1))[0].item()
        for logps, beta in ((POLICY, 0.7), (REFERENCE, 0.1))
    ]
    expected = LOSSES[name].value_at_no_learning
    if expected is None:
        assert found[0] != pytest.approx(found[1])
    else:
        assert found == pytest.approx([expected] * 2)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_options_that_the_table_names_and_no_others(name: str) -> None:
    plain = LossOptions(0.5, simpo_gamma=0.5, orpo_lambda=0.1)
    before = preference_loss(name, POLICY, REFERENCE, LENGTHS, plain)[0]
    for option in plain._fields[1:]:
        after = preference_loss(name, POLICY, REFERENCE, LENGTHS, plain._replace(**{option: 0.3}))[0]
        assert torch.equal(before, after) == (option not in LOSSES[name].options), option


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_a_reference_reads_none(name: str) -> None:
    losses = [
        preference_loss(name, POLICY, reference, LENGTHS, LossOptions(0.2, simpo_gamma=0.5, orpo_lambda=0.1))[0]
        for reference in (REFERENCE, REFERENCE - torch.tensor([0.5, 0.1]))
    ]
    assert torch.equal(*losses) == LOSSES[name].reference_free


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_names_its_paper_and_equation(name: str) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}.*equations? \d", LOSSES[name].source)


def test_only_the_table_names_the_losses() -> None:
    """A new loss is a row of the table, its function, a test and a line of the changelog: no other list knows it.

    The configuration names its default, and nothing else does.
    """
    modules = [path for room in ("components", "pipelines") for path in (ROOT / room).rglob("*.py")]
    naming = {
        (path.relative_to(ROOT).as_posix(), node.value)
        for path in modules
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in LOSSES
    }
    elsewhere = {(path, name) for path, name in naming if path != "components/engine/objectives.py"}
    assert elsewhere == {("components/dpo/config.py", "sigmoid")}


def test_the_table_is_read_without_torch() -> None:
    """The configuration reads it for `--help`, and the gate in an image that has no torch."""
    code = "import sys, components.config.params, components.gate.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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
    preference_loss("sigmoid", logps, torch.tensor([-3.5, -3.0]), LENGTHS, LossOptions(1e-8))[0].sum().backward()
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
