"""Every loss against TRL's, value and gradient, on one batch of a tiny real model in fp32.

Three of our preference losses are not in TRL's DPOTrainer. Its `sigmoid` takes no label smoothing, but its `aot` for a
batch of one pair is the label-smoothed sigmoid. simpo and orpo are in TRL's experimental trainers, whose own loss
functions are called here on the log-probs of TRL's model. TRL takes orpo's likelihood term over the prompts' and the
answers' tokens, ours is over the answers alone: only the odds-ratio term and the answers' log-probs are TRL's here.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from components.config.params import load_config
from components.dataset.chat import load_tokenizer
from components.dpo.config import DpoConfig
from components.dpo.stage import cached_reference, make_objective
from components.engine.loop import Objective
from components.engine.models import DPO_ADAPTER, PackedModel, add_lora, load_causal_lm, trainable_state
from components.engine.objectives import LOSSES, LossOptions, preference_loss, sequence_logps
from components.engine.packing import Example, pack
from components.sft.stage import objective as sft_objective
from tests.conftest import ROOT

TOLERANCE = 1e-5
"""Largest relative difference of a loss, and of a gradient as the norm of the difference."""
RANK, ALPHA = 4, 8
PAIRS = [
    {"prompt": "Is my order on its way?", "chosen": " Yes, it left this morning.", "rejected": " No."},
    {
        "prompt": "How do I send back a pair of shoes that does not fit?",
        "chosen": " Print the label.",
        "rejected": " You cannot, and nobody here can change that for you.",
    },
    {"prompt": "退款要多久?", "chosen": " 五天。", "rejected": " 不会太久。"},
]
CASES = {name: [f"dpo.loss_type={name}", "dpo.beta=0.3"] for name in LOSSES} | {
    "sigmoid_smoothed": ["dpo.loss_type=sigmoid", "dpo.beta=0.3", "dpo.label_smoothing=0.2"],
    "robust": ["dpo.loss_type=robust", "dpo.beta=0.3", "dpo.label_smoothing=0.2"],
    "hinge": ["dpo.loss_type=hinge", "dpo.beta=0.5"],
    "simpo": ["dpo.loss_type=simpo", "dpo.beta=2", "dpo.simpo_gamma=0.7"],
    "orpo": ["dpo.loss_type=orpo", "dpo.orpo_lambda=0.8"],
}
"""Every loss of the table; TRL fails on one that it has not under the same name, unless an oracle stands below."""
REFERENCE_FREE = [name for name, loss in LOSSES.items() if loss.reference_free]


class Result(NamedTuple):
    """A loss and its gradient with respect to all LoRA parameters, in the order of their names."""

    loss: float
    gradient: Tensor


class Bench(NamedTuple):
    """Our model and TRL's trainers with the same weights, and the same tokens."""

    model: PackedModel
    dpo: Any
    sft: Any
    examples: list[Example]
    reference_P2: Tensor


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    out = str(tmp_path_factory.mktemp("trl"))
    tokenizer = load_tokenizer(tiny_model)
    model = PackedModel(
        add_lora(load_causal_lm(tiny_model, "fp32"), DPO_ADAPTER, RANK, ALPHA, 0.0, "all-linear", 1), "fp32"
    )
    dpo = dpo_trainer(tiny_model, tokenizer, out)
    rows = list(dpo.train_dataset)
    examples = [Example(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    with torch.no_grad():
        batch = pack(examples)
        # Adapters start at zero: this is the base model.
        reference_P2 = sequence_logps(model(batch), batch.sequence_N, batch.n_sequences).view(-1, 2)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainable_state(model.lm).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    sft = sft_trainer(tiny_model, tokenizer, out, examples)
    for trainer in (dpo, sft):
        theirs = trainable_state(trainer.model)
        ours = trainable_state(model.lm)
        assert sorted(theirs) == sorted(name.replace(f".{DPO_ADAPTER}.", ".default.") for name in ours)
        with torch.no_grad():
            for name, parameter in ours.items():
                theirs[name.replace(f".{DPO_ADAPTER}.", ".default.")].copy_(parameter)
    yield Bench(model, dpo, sft, examples, reference_P2)
    AcceleratorState._reset_state(reset_partial_state=True)  # TRL set it up for the CPU alone


def settings(out: str) -> dict[str, Any]:
    return {
        "output_dir": out,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
    }


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def dpo_trainer(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, out: str) -> Any:
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=DPOConfig(**settings(out)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    trainer.precompute_ref_logps = True
    return trainer


def sft_trainer(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, out: str, examples: list[Example]) -> Any:
    rows = [
        {
            "input_ids": [*prompt, *completions[0]],
            "completion_mask": [0] * len(prompt) + [1] * len(completions[0]),
        }
        for prompt, completions, _ in examples
    ]
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(**settings(out), completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )


def configured(case: str, *overrides: str) -> DpoConfig:
    return load_config(ROOT / "params.yaml", [*CASES[case], *overrides]).dpo


def gradient_of(loss: Tensor, model: torch.nn.Module) -> Result:
    state = trainable_state(model)
    gradients = torch.autograd.grad(loss, [state[name] for name in sorted(state)])
    return Result(loss.item(), torch.cat([gradient.flatten() for gradient in gradients]))


def our_result(bench: Bench, objective: Objective, examples: list[Example], normaliser: int) -> Result:
    batch = pack(examples)
    loss, _ = objective(bench.model(batch), batch, list(range(len(examples))), float(normaliser))
    return gradient_of(loss, bench.model.lm)


def our_preference_result(bench: Bench, config: DpoConfig) -> Result:
    objective = make_objective(cached_reference(bench.reference_P2.double().numpy()), config)
    return our_result(bench, objective, bench.examples, len(bench.examples))


def trl_inputs(bench: Bench, indices: list[int]) -> dict[str, Tensor]:
    rows = [
        {
            "prompt_ids": list(bench.examples[index].prompt),
            "chosen_ids": list(bench.examples[index].completions[0]),
            "rejected_ids": list(bench.examples[index].completions[1]),
            "ref_chosen_logps": bench.reference_P2[index, 0].item(),
            "ref_rejected_logps": bench.reference_P2[index, 1].item(),
        }
        for index in indices
    ]
    inputs: dict[str, Tensor] = bench.dpo.data_collator(rows)
    return inputs


def trl_preference_result(bench: Bench, case: str) -> Result:
    config, trainer = configured(case), bench.dpo
    oracles = {"simpo": CPOTrainer, "orpo": ORPOTrainer}
    everything = list(range(len(bench.examples)))
    if case in REFERENCE_FREE:
        inputs = trl_inputs(bench, everything)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        chosen_P, rejected_P = oracles[case].get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
        loss = trl_reference_free_losses(chosen_P, rejected_P, config).mean()
        return gradient_of(loss, trainer.model)
    trainer.beta, trainer.label_smoothing, trainer.loss_weights = config.beta, config.label_smoothing, [1.0]
    trainer.loss_types = ["aot" if case == "sigmoid_smoothed" else case]
    groups = [[index] for index in everything] if case == "sigmoid_smoothed" else [everything]
    losses = [trainer.compute_loss(trainer.model, trl_inputs(bench, group)) for group in groups]
    return gradient_of(torch.stack(losses).mean(), trainer.model)


def trl_reference_free_losses(chosen_P: Tensor, rejected_P: Tensor, config: DpoConfig) -> Tensor:
    """TRL's simpo, or TRL's odds-ratio term beside the chosen answers' likelihood; of log-probs per token."""
    holder: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        beta=config.beta if config.loss_type == "simpo" else config.orpo_lambda,
        label_smoothing=0.0,
        loss_type="simpo",
        simpo_gamma=config.simpo_gamma,
    )
    if config.loss_type == "simpo":
        losses_P: Tensor = CPOTrainer.cpo_loss(holder, chosen_P, rejected_P)[0]
        return losses_P
    odds_P: Tensor = ORPOTrainer.odds_ratio_loss(holder, chosen_P, rejected_P)[0]
    return -chosen_P - odds_P


def largest_difference(found: Result, expected: Result) -> float:
    """Relative, of the losses or of the gradients."""
    assert expected.gradient.norm() > 1e-3, "a vanishing gradient compares nothing"
    of_gradients = float((found.gradient - expected.gradient).norm() / expected.gradient.norm())
    return max(abs(found.loss - expected.loss) / abs(expected.loss), of_gradients)


def test_the_pairs_differ_in_length_and_the_policy_differs_from_its_reference(bench: Bench) -> None:
    lengths = [(len(e.prompt), len(e.completions[0]), len(e.completions[1])) for e in bench.examples]
    assert all(len(set(column)) == len(lengths) for column in zip(*lengths, strict=True))
    assert all(chosen != rejected for _, chosen, rejected in lengths)
    batch = pack(bench.examples)
    policy_S = sequence_logps(bench.model(batch), batch.sequence_N, batch.n_sequences)
    ratios_P2 = policy_S.view(-1, 2) - bench.reference_P2
    assert ratios_P2.abs().min() > 0.01
    met_P = configured("hinge").beta * (ratios_P2[:, 0] - ratios_P2[:, 1]) > 1
    assert met_P.any() and not met_P.all(), "hinge is to be compared on both of its sides"


@pytest.mark.parametrize("case", CASES)
def test_preference_loss_and_its_gradient_equal_those_of_trl(bench: Bench, case: str) -> None:
    found = our_preference_result(bench, configured(case))
    assert largest_difference(found, trl_preference_result(bench, case)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_doubled_strength_on_our_side_is_seen(bench: Bench, case: str) -> None:
    right = configured(case)
    doubled = f"dpo.orpo_lambda={2 * right.orpo_lambda}" if case == "orpo" else f"dpo.beta={2 * right.beta}"
    found = our_preference_result(bench, configured(case, doubled))
    assert largest_difference(found, trl_preference_result(bench, case)) > 1000 * TOLERANCE


@pytest.mark.parametrize("case", REFERENCE_FREE)
def test_reference_free_losses_equal_those_of_trl_from_doubtful_to_sure_answers(case: str) -> None:
    config = configured(case)
    per_token = [-1e-3, -0.05, -0.6931, -0.7, -3.0, -12.0]
    means_P2 = torch.tensor([[chosen, rejected] for chosen in per_token for rejected in per_token])
    n_tokens_S = torch.arange(1, means_P2.numel() + 1).float()
    ours_P2, theirs_P2 = means_P2.clone().requires_grad_(), means_P2.clone().requires_grad_()
    options = LossOptions(config.beta, simpo_gamma=config.simpo_gamma, orpo_lambda=config.orpo_lambda)
    ours_P, _ = preference_loss(case, ours_P2.flatten() * n_tokens_S, torch.zeros_like(n_tokens_S), n_tokens_S, options)
    theirs_P = trl_reference_free_losses(theirs_P2[:, 0], theirs_P2[:, 1], config)
    assert torch.allclose(ours_P, theirs_P, rtol=TOLERANCE, atol=0)
    (found,) = torch.autograd.grad(ours_P.sum(), ours_P2)
    (expected,) = torch.autograd.grad(theirs_P.sum(), theirs_P2)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def sft_results(bench: Bench, n_extra: int = 0) -> tuple[Result, Result]:
    """Ours, with a normaliser that is wrong by `n_extra` tokens, and TRL's."""
    examples = [Example(prompt, completions[:1]) for prompt, completions, _ in bench.examples]
    normaliser = sum(len(example.completions[0]) for example in examples) + n_extra
    inputs = bench.sft.data_collator(list(bench.sft.train_dataset))
    theirs = gradient_of(bench.sft.compute_loss(bench.sft.model, inputs), bench.sft.model)
    return our_result(bench, sft_objective, examples, normaliser), theirs


def test_sft_loss_and_its_gradient_equal_those_of_trl(bench: Bench) -> None:
    assert largest_difference(*sft_results(bench)) <= TOLERANCE


def test_a_token_too_many_in_our_sft_normaliser_is_seen(bench: Bench) -> None:
    assert largest_difference(*sft_results(bench, n_extra=1)) > 1000 * TOLERANCE
