"""Packed = plain, in log-probs and in gradients, for tiny random models of the supported architectures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from components.engine.models import (
    DPO_ADAPTER,
    PackedModel,
    add_lora,
    disable_dropout,
    load_causal_lm,
    select_packing,
    trainable_state,
)
from components.engine.objectives import LossOptions, dpo_sigmoid_loss, preference_loss, sequence_logps
from components.engine.packing import Example, pack
from tests.conftest import ROOT
from tests.support.architectures import (
    COMPLETIONS,
    EXAMPLES,
    PACKABLE,
    SOME_LINEAR,
    UNPACKABLE,
    WEIGHTS,
    build,
    configuration,
)
from tests.tools.component_readmes import MODELS_START, models, renewed


def plain_logps(model: PreTrainedModel, completions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Log-probs of completions from one forward pass of transformers for each."""
    rows = []
    for prompt, completion in completions:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(rows)


def plain_copy(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def loaded(folder: Path) -> PackedModel:
    return PackedModel(load_causal_lm(folder, "fp32"), "fp32")


def adapt(model: PackedModel, targets: str | list[str] = "all-linear") -> list[Tensor]:
    """Put LoRA with random values on linear layers; its parameters."""
    model.lm = add_lora(model.lm, DPO_ADAPTER, 4, 8, 0.0, targets, 1)
    parameters = list(trainable_state(model).values())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parameters


def gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).detach().norm() / theirs.detach().norm())


def all_true(n_queries: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_log_probs_and_gradients_are_the_plain_ones(name: str, tmp_path: Path) -> None:
    folder = build(PACKABLE[name], tmp_path / name)
    model = loaded(folder)
    assert "packed and plain log-probs differ by at most" in select_packing(model, 64)
    assert model.packed
    found = model(pack(EXAMPLES)).detach()
    with torch.no_grad():
        expected = plain_logps(plain_copy(folder), COMPLETIONS)
    assert (found - expected).abs().max() < 1e-4
    parameters = adapt(model)
    batch = pack(EXAMPLES)
    adapted = model(batch)
    assert (adapted - found).abs().max() > 1e-2, "the adapter acts"
    mine = gradient((adapted * WEIGHTS).sum(), parameters)
    model.causal_lm.set_attn_implementation("eager")
    theirs = gradient((plain_logps(model.causal_lm, COMPLETIONS) * WEIGHTS).sum(), parameters)
    assert theirs.norm() > 1e-2
    assert relative(mine, theirs) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "deepseek_v3"])
def test_attention_in_blocks_of_queries_is_the_plain_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences go through attention in blocks on a CPU; with small blocks these short ones do too."""
    monkeypatch.setattr("components.engine.cpu.attention.BLOCK", 5)
    test_packed_log_probs_and_gradients_are_the_plain_ones(name, tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, own) in PACKABLE.items() if "sliding_window" in own])
def test_the_examples_reach_past_the_sliding_window(name: str, tmp_path: Path) -> None:
    kind, own = PACKABLE[name]
    narrow = plain_copy(build((kind, own), tmp_path / "narrow"))
    wide = plain_copy(build((kind, own | {"sliding_window": 100}), tmp_path / "wide"))
    with torch.no_grad():
        difference = (plain_logps(narrow, COMPLETIONS) - plain_logps(wide, COMPLETIONS)).abs().max()
    assert difference > 1e-2


def test_the_readme_lists_what_is_tested() -> None:
    text = (ROOT / "components" / "engine" / "README.md").read_text(encoding="utf-8")
    assert text == renewed(text, models(), MODELS_START), "run `make readmes`"


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_runs_one_sequence_at_a_time_and_is_right(name: str, tmp_path: Path) -> None:
    folder = build(UNPACKABLE[name], tmp_path / name)
    model = loaded(folder)
    assert "cannot be packed" in select_packing(model, 64)
    assert not model.packed
    found = model(pack(EXAMPLES)).detach()
    with torch.no_grad():
        expected = plain_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), COMPLETIONS)
    assert (found - expected).abs().max() < 1e-4
    parameters = adapt(model, SOME_LINEAR.get(name, "all-linear"))
    mine = gradient((model(pack(EXAMPLES)) * WEIGHTS).sum(), parameters)
    theirs = gradient((plain_logps(model.causal_lm, COMPLETIONS) * WEIGHTS).sum(), parameters)
    assert theirs.norm() > 1e-2
    assert relative(mine, theirs) < 1e-4


@pytest.mark.parametrize("name", [*PACKABLE, *UNPACKABLE])
def test_frozen_bf16_weights_compute_as_in_fp32_where_the_hardware_has_no_bf16(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.engine.models.native_precision", lambda: "fp32")
    folder = build((PACKABLE | UNPACKABLE)[name], tmp_path / name)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = {}
    for precision in ("fp32", "bf16"):
        model = PackedModel(load_causal_lm(folder, precision), precision)
        layout = select_packing(model, 64).split(" differ")[0]
        parameters = adapt(model, SOME_LINEAR.get(name, "all-linear"))
        found[precision] = layout, gradient((model(pack(EXAMPLES)) * WEIGHTS).sum(), parameters)
        dtypes = {each.weight.dtype for each in model.causal_lm.modules() if type(each) is torch.nn.Linear}
        assert torch.float32 in dtypes and (torch.bfloat16 in dtypes) == (precision == "bf16" and name != "mamba")
    assert found["bf16"][0] == found["fp32"][0]
    assert found["fp32"][1].norm() > 1e-2
    # transformers keeps the factor of Gemma's embedding in the dtype of the weights.
    assert relative(found["bf16"][1], found["fp32"][1]) < (1e-3 if "gemma" in name else 1e-5)


def test_without_a_causal_mask_the_comparison_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(PACKABLE["llama"], tmp_path / "llama")
    model, plain = loaded(folder), plain_copy(folder)
    with torch.no_grad():
        expected = plain_logps(plain, COMPLETIONS)
        assert (model(pack(EXAMPLES)) - expected).abs().max() < 1e-4
        monkeypatch.setattr("components.engine.attention.causal_mask", all_true)
        assert (model(pack(EXAMPLES)) - expected).abs().max() > 0.1


@pytest.fixture
def tuned(tiny_model: Path) -> tuple[PackedModel, list[Tensor]]:
    """The tiny Llama with a random adapter, and the adapter's parameters."""
    model = loaded(tiny_model)
    return model, adapt(model)


def pair_values(model: PackedModel, examples: Sequence[Example]) -> Tensor:
    """Summed log-probs [P, 2] of pairs in one pack."""
    batch = pack(examples)
    return sequence_logps(model(batch), batch.sequence_N, batch.n_sequences).view(-1, 2)


def losses_and_rewards(values_P2: Tensor, reference_P2: Tensor, beta: float = 0.3) -> tuple[Tensor, Tensor]:
    """DPO's losses [P] and rewards [P, 2]."""
    values_S, reference_S = values_P2.flatten(), reference_P2.flatten()
    losses_P, rewards_S = preference_loss(
        "sigmoid", values_S, reference_S, torch.ones_like(values_S), LossOptions(beta)
    )
    return losses_P, rewards_S.view(-1, 2)


def dpo_loss(values_P2: Tensor, reference_P2: Tensor, beta: float = 0.3) -> Tensor:
    return losses_and_rewards(values_P2, reference_P2, beta)[0].sum()


REFERENCE = torch.tensor([[-40.0, -70.0], [-60.0, -11.0], [-9.0, -52.0]])


def test_the_order_of_the_pairs_in_a_pack_changes_nothing(tuned: tuple[PackedModel, list[Tensor]]) -> None:
    model, parameters = tuned
    order = [2, 0, 1]
    values, permuted = pair_values(model, EXAMPLES), pair_values(model, [EXAMPLES[i] for i in order])
    assert relative(permuted, values[order]) < 1e-5
    whole = gradient(dpo_loss(values, REFERENCE), parameters)
    assert relative(gradient(dpo_loss(permuted, REFERENCE[order]), parameters), whole) < 1e-5


@pytest.mark.parametrize("parts", [[[0], [1, 2]], [[0], [1], [2]]])
def test_splitting_a_pack_changes_nothing(tuned: tuple[PackedModel, list[Tensor]], parts: list[list[int]]) -> None:
    model, parameters = tuned
    values = pair_values(model, EXAMPLES)
    whole = gradient(dpo_loss(values, REFERENCE), parameters)
    split = [pair_values(model, [EXAMPLES[i] for i in part]) for part in parts]
    assert relative(torch.cat(split), values) < 1e-5
    losses = [dpo_loss(found, REFERENCE[part]) for found, part in zip(split, parts, strict=True)]
    summed = torch.stack([gradient(loss, parameters) for loss in losses]).sum(0)
    assert relative(summed, whole) < 1e-5


def test_gradient_checkpointing_changes_nothing(tuned: tuple[PackedModel, list[Tensor]]) -> None:
    model, parameters = tuned
    model.train()
    plain = model(pack(EXAMPLES))
    expected = gradient((plain * WEIGHTS).sum(), parameters)
    model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.causal_lm.is_gradient_checkpointing
    layers = model.causal_lm.base_model.layers
    calls: list[int] = []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = model(pack(EXAMPLES))
    found = gradient((again * WEIGHTS).sum(), parameters)
    assert len(calls) == 2 * len(layers), "each layer ran a second time in the backward pass"
    assert relative(again, plain) < 1e-5
    assert relative(found, expected) < 1e-5


def test_swapping_chosen_and_rejected_negates_the_margin(tuned: tuple[PackedModel, list[Tensor]]) -> None:
    model, _ = tuned
    swapped = [Example(e.prompt, [*reversed(e.completions)]) for e in EXAMPLES]
    with torch.no_grad():
        _, values = losses_and_rewards(pair_values(model, EXAMPLES), REFERENCE)
        _, others = losses_and_rewards(pair_values(model, swapped), REFERENCE.flip(1))
    margins, negated = values[:, 0] - values[:, 1], others[:, 0] - others[:, 1]
    assert margins.abs().min() > 0.1
    assert relative(negated, -margins) < 1e-5


def test_the_gradient_vanishes_with_beta(tuned: tuple[PackedModel, list[Tensor]]) -> None:
    """In proportion: beta * sigmoid(-m) -> beta / 2."""
    model, parameters = tuned

    def at(beta: float) -> Tensor:
        return gradient(dpo_loss(pair_values(model, EXAMPLES), REFERENCE, beta), parameters)

    small, smaller = at(1e-4), at(1e-6)
    values = pair_values(model, EXAMPLES)
    slope = gradient((values[:, 1] - values[:, 0]).sum() / 2, parameters)
    assert smaller.norm() < 1e-2 * at(0.1).norm()
    assert relative(smaller / 1e-6, slope) < 1e-3
    assert relative(100 * smaller, small) < 1e-1
    assert at(0.0).norm() == 0.0


def test_half_the_labels_swapped_makes_the_loss_symmetric() -> None:
    margins = torch.tensor([-30.0, -2.5, -0.1, 0.0, 0.7, 4.0, 50.0])
    assert torch.allclose(dpo_sigmoid_loss(margins, 0.5), dpo_sigmoid_loss(-margins, 0.5), rtol=1e-6)
    assert not torch.allclose(dpo_sigmoid_loss(margins, 0.4), dpo_sigmoid_loss(-margins, 0.4), rtol=1e-2)


def test_a_shared_prompt_equals_a_prompt_for_each_completion(tuned: tuple[PackedModel, list[Tensor]]) -> None:
    model, parameters = tuned
    apart = [Example(prompt, [completion]) for prompt, completion in COMPLETIONS]
    shared, single = model(pack(EXAMPLES)), model(pack(apart))
    assert relative(shared, single) < 1e-5
    mine, theirs = (gradient((logps * WEIGHTS).sum(), parameters) for logps in (shared, single))
    assert relative(mine, theirs) < 1e-5


def test_positions_that_depend_on_the_longest_sequence_are_packed_only_within_the_original_length(
    tmp_path: Path,
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = build(("LlamaConfig", {"rope_parameters": rope, "max_position_embeddings": 26}), tmp_path / "dynamic")
    assert "packed and plain log-probs differ by at most" in select_packing(loaded(folder), 26)
    model = loaded(folder)
    assert "dynamic positions" in select_packing(model, 27)
    with torch.no_grad():
        expected = plain_logps(plain_copy(folder), COMPLETIONS)
    assert (model(pack(EXAMPLES)) - expected).abs().max() < 1e-4
    model.packed = True
    model.causal_lm.set_attn_implementation("packed")
    assert (model(pack(EXAMPLES)) - expected).abs().max() > 1e-2, "packed they are wrong, which the check cannot see"


DRAWN_IN_TRAINING: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "router_jitter_noise": 0.3}),
    "minimax": ("MiniMaxConfig", {"num_local_experts": 4, "router_jitter_noise": 0.3, "head_dim": 8}),
    "phimoe": (
        "PhimoeConfig",
        {"num_local_experts": 4, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "head_dim": 8},
    ),
    "dbrx": ("DbrxConfig", {"ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.3}}),
}


@pytest.mark.parametrize("kind", DRAWN_IN_TRAINING)
def test_a_pair_and_its_reference_see_the_same_routing_in_dpo(kind: str) -> None:
    """So the loss before the first step is ln 2; SFT keeps what the model's own code draws."""
    name, own = DRAWN_IN_TRAINING[kind]
    if kind == "dbrx":
        sizes = {"ffn_hidden_size": 32, "hidden_size": 32}
        attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
        own = {"ffn_config": own["ffn_config"] | sizes, "attn_config": attention, "max_seq_len": 64, "d_model": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration((name, own), vocab_size=100))
    ids_BT = torch.arange(20)[None]

    def logps() -> Tensor:
        found: Tensor = model(ids_BT).logits.log_softmax(-1)[0, :-1].gather(1, ids_BT[0, 1:, None]).sum()
        return found

    model.train()
    assert logps() != logps(), "as in SFT"
    disable_dropout(model)
    model.eval()
    reference = logps()
    model.train()
    loss = -torch.nn.functional.logsigmoid(logps() - reference)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
