"""The packed engine against plain transformers, on a tiny real model."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from components.common.errors import InputError, TrainingError
from components.config.params import load_config
from components.dpo.stage import cached_reference, check_reference, make_objective
from components.engine import checkpoints, fused, loop
from components.engine.export import EXPORT_ADAPTER, concatenate_adapters, merge, save_adapter
from components.engine.head import FrozenHeadLogps, chunk_logps
from components.engine.lora import LoraFunction
from components.engine.models import (
    DPO_ADAPTER,
    SFT_ADAPTER,
    PackedModel,
    Precision,
    activate,
    add_lora,
    load_adapter,
    load_causal_lm,
    max_packing_error,
    select_packing,
    trainable_state,
)
from components.engine.objectives import LOSSES
from components.engine.packing import Example, balance, first_fit_decreasing, pack, plan_steps
from tests.conftest import ROOT
from tests.support.engine import SETTINGS, packed, with_adapter

EXAMPLES = [
    Example([5, 6, 7], [[8, 9], [10, 11, 12]]),
    Example([13, 14], [[15], [16, 17]]),
    Example([20, 21, 22, 23], [[24, 25, 26], [27]]),
]


def plain_logps(tiny: Path, prompt: list[int], completion: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_packed_log_probs_equal_those_of_plain_forward_passes(tiny_model: Path) -> None:
    found = packed(tiny_model)(pack(EXAMPLES))
    expected = torch.cat([plain_logps(tiny_model, list(e.prompt), list(c)) for e in EXAMPLES for c in e.completions])
    assert torch.allclose(found, expected, atol=1e-5)


def test_packed_gradients_equal_those_of_plain_forward_passes(tiny_model: Path) -> None:
    ours = with_adapter(tiny_model)
    with torch.no_grad():
        for index, parameter in enumerate(trainable_state(ours).values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    parameters = list(trainable_state(ours).values())
    weights = torch.linspace(-1, 1, sum(len(c) for e in EXAMPLES for c in e.completions))
    found = torch.autograd.grad((ours(pack(EXAMPLES)) * weights).sum(), parameters)
    lm = ours.causal_lm
    lm.set_attn_implementation("eager")
    rows = []
    for example in EXAMPLES:
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt, *completion]])
            logits = lm(ids).logits[0, len(example.prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    expected = torch.autograd.grad((torch.cat(rows) * weights).sum(), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_rejected_answer_never_sees_the_chosen_nor_another_example(tiny_model: Path) -> None:
    model = packed(tiny_model)
    batch = pack(EXAMPLES)
    other = pack([Example(EXAMPLES[0].prompt, [[99, 98], EXAMPLES[0].completions[1]]), *EXAMPLES[1:]])
    before, after = model(batch), model(other)
    chosen_of_first = batch.sequence_N == 0
    assert torch.equal(before[~chosen_of_first], after[~chosen_of_first])
    assert not torch.allclose(before[chosen_of_first], after[chosen_of_first])


def test_what_shares_a_pack_changes_nothing(tiny_model: Path) -> None:
    model = packed(tiny_model)
    together = model(pack(EXAMPLES))
    apart = torch.cat([model(pack([example])) for example in EXAMPLES])
    assert torch.allclose(together, apart, atol=1e-5)


def test_an_empty_completion_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt or completion"):
        pack([Example([1], [[2], []])])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_frozen_head_has_the_gradient_of_autograd(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine.cpu.head.CACHED_LOGITS", 7 * 600)  # seven rows: no divisor of a chunk's
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 600, bias=False).requires_grad_(False)
    hidden = torch.randn(300, 8, generator=generator, requires_grad=True)
    target = torch.randint(600, (300,), generator=generator)
    weights = torch.randn(300, generator=generator)
    ours = FrozenHeadLogps.apply(hidden, target, head.weight, softcap)
    (mine,) = torch.autograd.grad((ours * weights).sum(), hidden)
    plain = chunk_logps(hidden, target, head, softcap, torch.float32)
    (theirs,) = torch.autograd.grad((plain * weights).sum(), hidden)
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_frozen_head_adds_up_a_large_vocabulary_without_losing_digits() -> None:
    """Against fp64; exponentials added up one after the other in fp32, as torch's log_softmax does, would not pass."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(49152, 8, generator=generator)
    weight[17] += 2
    hidden = torch.randn(20, 8, generator=generator) + 1
    target = torch.randint(49152, (20,), generator=generator)
    logits = (hidden @ weight.T).double()
    exact = logits[torch.arange(20), target] - logits.logsumexp(1)
    errors = (FrozenHeadLogps.apply(hidden, target, weight, None) - exact).abs()
    assert errors.max() < 5e-6
    exponentials = (logits - logits.amax(1, keepdim=True)).exp().float().numpy()
    one_by_one = np.add.accumulate(exponentials, axis=1)[:, -1]
    assert np.abs(np.log(one_by_one) - np.log(exponentials.astype(np.float64).sum(1))).max() > 5e-6


def test_every_epoch_visits_every_example_once_within_the_budget() -> None:
    n_tokens = [3, 9, 4, 4, 12, 5, 1]
    steps = plan_steps(len(n_tokens), epochs=2, batch_size=3, seed=7)
    assert steps == plan_steps(len(n_tokens), epochs=2, batch_size=3, seed=7)
    assert steps != plan_steps(len(n_tokens), epochs=2, batch_size=3, seed=8)
    assert len(steps) == 6
    for epoch in (steps[:3], steps[3:]):
        assert sorted(index for step in epoch for index in step) == list(range(7))
    packs = [indices for step in steps for indices in first_fit_decreasing(step, n_tokens, max_tokens=12)]
    assert all(sum(n_tokens[i] for i in indices) <= 12 for indices in packs)
    assert len(plan_steps(len(n_tokens), epochs=0.34, batch_size=3, seed=7)) == 1


def test_an_example_over_the_budget_stands_alone() -> None:
    assert first_fit_decreasing([0, 1, 2], [50, 4, 5], max_tokens=10) == [[0], [2, 1]]


def test_the_check_at_load_passes_the_tiny_model_and_has_teeth(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max_packing_error(packed(tiny_model)) < 1e-4
    monkeypatch.setattr(
        "components.engine.attention.causal_mask", lambda q, k, w, d: torch.ones(q, k, dtype=torch.bool)
    )
    model = packed(tiny_model)
    assert "LlamaForCausalLM cannot be packed: its packed log-probs differ by" in select_packing(model, 64)
    assert not model.packed
    assert max_packing_error(model) < 1e-4, "one sequence at a time it is right"


def dpo_objective(model: PackedModel) -> loop.Objective:
    reference = np.asarray(loop.sequence_logps(model, EXAMPLES))
    return make_objective(cached_reference(reference), load_config(ROOT / "params.yaml", ["dpo.beta=0.5"]).dpo)


def training_set() -> loop.TrainingSet:
    return loop.TrainingSet(EXAMPLES, ["a", "b", "c"], [1.0, 1.0, 1.0])


def run(model: PackedModel, folder: Path, said: list[str] | None = None) -> Iterator[loop.StepRecord]:
    objective = dpo_objective(with_adapter(Path(model.causal_lm.config._name_or_path)))
    return loop.train(model, training_set(), objective, SETTINGS, folder, (said if said is not None else []).append)


def test_dpo_starts_at_ln_2_and_the_loss_falls(tiny_model: Path, tmp_path: Path) -> None:
    records = list(run(with_adapter(tiny_model), tmp_path))
    assert len(records) == 6
    assert records[0].loss == pytest.approx(0.693147, abs=1e-5)
    assert records[-1].loss < records[0].loss
    assert records[-1].metrics["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_widens_the_margin_on_a_tiny_model(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    model = with_adapter(tiny_model)
    config = load_config(ROOT / "params.yaml", [f"dpo.loss_type={loss}", "dpo.beta=0.5"]).dpo
    reference = np.asarray(loop.sequence_logps(model, EXAMPLES))
    objective = make_objective(cached_reference(reference), config)
    before = loop.evaluate(model, training_set(), objective, 64)
    list(loop.train(model, training_set(), objective, SETTINGS, tmp_path, lambda sentence: None))
    after = loop.evaluate(model, training_set(), objective, 64)
    assert after[0] < before[0] and after[1]["rewards/margins"] > before[1]["rewards/margins"]


def test_a_killed_training_goes_on_to_bit_identical_weights(tiny_model: Path, tmp_path: Path) -> None:
    whole = with_adapter(tiny_model, dropout=0.1)
    list(run(whole, tmp_path / "whole"))
    for stop in (1, 2, 4):
        folder = tmp_path / f"stopped-{stop}"
        first = run(with_adapter(tiny_model, dropout=0.1), folder)
        for _ in range(stop):
            next(first)
        first.close()
        said: list[str] = []
        resumed = with_adapter(tiny_model, dropout=0.1)
        records = list(run(resumed, folder, said))
        assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
        assert said == [f"resuming after step {stop} of 6"]
        for name, parameter in trainable_state(whole).items():
            assert torch.equal(parameter, trainable_state(resumed)[name]), name


def test_a_tampered_checkpoint_is_passed_over_for_the_one_before(tiny_model: Path, tmp_path: Path) -> None:
    list(run(with_adapter(tiny_model), tmp_path))
    newest = sorted(tmp_path.glob("step-*"))[-1]
    weights = newest / "parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    said: list[str] = []
    list(run(with_adapter(tiny_model), tmp_path, said))
    assert "step-000006 is damaged and passed over" in said[0]
    assert said[1] == "resuming after step 5 of 6"


def test_a_half_written_checkpoint_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    list(run(with_adapter(tiny_model), tmp_path))
    newest = sorted(tmp_path.glob("step-*"))[-1]
    (newest / "manifest.json").unlink()
    checkpoint, passed_over = checkpoints.load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 5
    assert "no readable manifest.json" in passed_over[0]


def test_checkpoints_hold_no_pickles_and_only_the_last_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    list(run(with_adapter(tiny_model), tmp_path))
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000005", "step-000006"]
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_a_loss_that_is_not_finite_stops_with_the_record_ids(tiny_model: Path, tmp_path: Path) -> None:
    model = with_adapter(tiny_model)
    with torch.no_grad():
        next(iter(trainable_state(model).values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 1 is not finite; records of that pass: [abc]"):
        list(run(model, tmp_path))


def test_a_wrong_reference_stops_before_the_first_step(tiny_model: Path) -> None:
    model = with_adapter(tiny_model)
    right = np.asarray(loop.sequence_logps(model, EXAMPLES))
    check_reference(model, EXAMPLES, right)
    with pytest.raises(TrainingError, match=r"expected 0, a loss of ln 2"):
        check_reference(model, EXAMPLES, right + np.array([0.1, 0.0]))


def test_the_shipped_adapter_and_the_merged_model_are_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    def shaken(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for index, parameter in enumerate(trainable_state(model).values()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.add_(0.1 * noise)

    adapted = add_lora(load_causal_lm(tiny_model, "fp32"), SFT_ADAPTER, 4, 6, 0.0, "all-linear", 1)
    shaken(adapted)
    sft_only = PackedModel(adapted, "fp32")(pack(EXAMPLES)).detach()
    adapted = add_lora(adapted, DPO_ADAPTER, 8, 24, 0.0, "all-linear", 2)
    assert torch.allclose(PackedModel(adapted, "fp32")(pack(EXAMPLES)), sft_only, atol=1e-5)
    shaken(adapted)
    policy = PackedModel(adapted, "fp32")(pack(EXAMPLES)).detach()
    assert not torch.allclose(policy, sft_only, atol=1e-3)
    activate(adapted, [SFT_ADAPTER], trainable=None)
    assert torch.equal(PackedModel(adapted, "fp32")(pack(EXAMPLES)), sft_only), "training never moves the reference"

    concatenate_adapters(adapted)
    save_adapter(adapted, EXPORT_ADAPTER, tmp_path / "adapter", "sha256:abc")
    shipped = PackedModel(load_adapter(load_causal_lm(tiny_model, "fp32"), tmp_path / "adapter", "x"), "fp32")
    assert torch.allclose(shipped(pack(EXAMPLES)), policy, atol=1e-5)
    merge(tiny_model, tmp_path / "adapter", tmp_path / "merged", "fp32", "none")
    assert torch.allclose(packed(tmp_path / "merged")(pack(EXAMPLES)), policy, atol=1e-5)
    assert not list(tmp_path.rglob("*.bin"))


def test_pickled_weights_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded as a causal language model in safetensors"):
        load_causal_lm(folder, "fp32")


def test_answers_within_a_prompt_are_predicted_too(tiny_model: Path) -> None:
    model = packed(tiny_model)
    conversation = [5, 6, 7, 8, 9, 10, 11, 12]
    found = model(pack([Example(conversation[:6], [conversation[6:]], [(2, 4)])]))
    expected = plain_logps(tiny_model, conversation[:1], conversation[1:])
    assert torch.allclose(found, expected[[1, 2, 5, 6]], atol=1e-5), "tokens 2, 3 and the completion 6, 7"
    with pytest.raises(ValueError, match="go with a single completion"):
        pack([Example([1, 2], [[3], [4]], [(1, 2)])])


def test_running_out_of_memory_says_which_knob_to_turn(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    model = with_adapter(tiny_model)
    monkeypatch.setattr(model, "forward", no_memory)
    with pytest.raises(TrainingError, match=r"out of memory in step 1, on a pass of \d+ tokens .* lower max_tokens"):
        list(run(model, tmp_path))


def test_another_error_in_a_step_is_not_called_out_of_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("something else")

    model = with_adapter(tiny_model)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(run(model, tmp_path))


def test_a_loss_that_is_not_finite_leaves_the_record_ids_in_a_file(tiny_model: Path, tmp_path: Path) -> None:
    model = with_adapter(tiny_model)
    with torch.no_grad():
        next(iter(trainable_state(model).values())).fill_(float("nan"))
    with pytest.raises(TrainingError):
        list(run(model, tmp_path))
    saved = json.loads((tmp_path / "not_finite.json").read_text())
    assert saved["what"] == "loss" and saved["step"] == 1 and set(saved["records"]) <= {"a", "b", "c"}


def test_examples_are_shared_out_evenly_and_completely() -> None:
    shares = balance([0, 1, 2, 3, 4], [10, 9, 2, 2, 5], 2)
    assert shares == [[0, 2, 3], [1, 4]]
    assert balance([7], [0] * 8, 3) == [[7], [], []]


def test_the_fused_layers_give_what_the_models_and_pefts_own_give(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient, for two adapters at once; with dropout at work peft's own way is taken."""
    monkeypatch.setattr("components.engine.cpu.elementwise.CHUNK_ELEMENTS", 200)  # some tokens of a row, not all

    def model(fused: bool, dropout: float = 0.0) -> PackedModel:
        adapted = add_lora(load_causal_lm(tiny_model, "fp32"), SFT_ADAPTER, 4, 6, 0.0, "all-linear", 1)
        adapted = add_lora(adapted, DPO_ADAPTER, 8, 24, dropout, "all-linear", 2)
        with torch.no_grad():
            for index, (name, parameter) in enumerate(adapted.named_parameters()):
                if ".lora_" in name:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                    parameter.add_(0.1 * noise)
        for module in adapted.modules():
            if not fused and "forward" in vars(module):
                del module.forward
        return PackedModel(adapted, "fp32")

    def outcome(of: PackedModel) -> tuple[torch.Tensor, torch.Tensor]:
        found = of(pack(EXAMPLES))
        gradients = torch.autograd.grad(found.sum(), list(trainable_state(of).values()))
        return found.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    (ours, our_gradient), (theirs, their_gradient) = outcome(model(True)), outcome(model(False))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (our_gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()
    dropping = model(True, dropout=0.5)
    dropping.train()
    assert not torch.allclose(dropping(pack(EXAMPLES)), ours, atol=1e-3)


def served(model: torch.nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def test_only_norms_and_mlps_that_are_seen_to_give_the_same_are_fused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(tiny_model, "fp32")
    assert served(model) == {"LlamaRMSNorm", "LlamaMLP"}
    model.set_attn_implementation("sdpa")
    model.model.norm.weight.requires_grad_(True)
    assert torch.autograd.grad(model(torch.tensor([[5, 6]])).logits.sum(), model.model.norm.weight)[0].norm() > 0
    wrong = fused.SwiGLU.forward
    monkeypatch.setattr("components.engine.fused.SwiGLU.forward", lambda ctx, gate, up: 1.001 * wrong(ctx, gate, up))
    right = fused.RMSNorm.forward
    monkeypatch.setattr("components.engine.fused.RMSNorm.forward", lambda ctx, x, *rest: right(ctx, x + 0.01, *rest))
    assert served(load_causal_lm(tiny_model, "fp32")) == set()


def test_fused_norms_round_to_bf16_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.engine.models.native_precision", lambda: "bf16")
    norm = load_causal_lm(tiny_model, "bf16").model.layers[0].input_layernorm
    x = torch.randn(3, 5, norm.weight.numel(), generator=torch.Generator().manual_seed(0))
    exact = type(norm).forward(norm, x)
    assert exact.dtype == torch.float32
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != exact.bfloat16()).float().mean() < 0.02


def kept_bytes_and_gradient(model: PackedModel) -> tuple[int, torch.Tensor]:
    """What a forward pass keeps for the backward pass, each storage once, and the gradient."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model(pack(EXAMPLES)).sum()
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    found = torch.autograd.grad(total, list(trainable_state(model).values()))
    return n_bytes, torch.cat([gradient.flatten() for gradient in found])


def test_what_norms_and_activations_made_is_made_again_rather_than_kept(tiny_model: Path) -> None:
    model = with_adapter(tiny_model)
    config, tokens = model.causal_lm.config, len(pack(EXAMPLES).input_ids_T)
    n_bytes, gradient = kept_bytes_and_gradient(model)
    norms = [module for name, module in model.named_modules() if name.endswith("layernorm")]
    downs = [module for name, module in model.named_modules() if name.endswith("down_proj")]
    # A copy does not say how it was made. The first norm is left out: its input needs no gradient and is kept for this.
    for norm in norms[1:]:
        norm.register_forward_hook(lambda module, inputs, output: output.clone())
    for down in downs:
        down.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
    more_bytes, same_gradient = kept_bytes_and_gradient(model)
    assert torch.equal(gradient, same_gradient)
    spared = len(norms[1:]) * config.hidden_size + len(downs) * config.intermediate_size
    assert more_bytes - n_bytes == 4 * tokens * spared


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_bf16_weights_without_bf16_hardware_give_the_gradient_of_fp32_in_less_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str | list[str]
) -> None:
    monkeypatch.setattr("components.engine.models.native_precision", lambda: "fp32")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)

    def fresh(precision: Precision) -> PackedModel:
        lm = add_lora(load_causal_lm(tmp_path, precision), DPO_ADAPTER, 4, 8, 0.0, targets, 1)
        with torch.no_grad():
            for number, parameter in enumerate(trainable_state(lm).values()):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        return PackedModel(lm, precision)

    model = fresh("bf16")
    more_bytes, expected = kept_bytes_and_gradient(fresh("fp32"))
    n_bytes, found = kept_bytes_and_gradient(model)
    assert torch.equal(found, expected)
    weights = {
        name: module.weight.numel()
        for name, module in model.causal_lm.model.named_modules()
        if type(module) is torch.nn.Linear and "lora" not in name
    }
    assert all(model.causal_lm.model.get_submodule(name).weight.dtype == torch.bfloat16 for name in weights)
    # The first layer's input needs no gradient, so nothing of a layer without LoRA there is kept.
    kept = sum(n for name, n in weights.items() if targets == "all-linear" or name != "layers.0.self_attn.k_proj")
    assert more_bytes - n_bytes == 2 * kept
    monkeypatch.setattr(
        "components.engine.cpu.precision.FrozenLinear.apply",
        lambda x, weight, bias: torch.nn.functional.linear(x, weight.float()),
    )
    assert (kept_bytes_and_gradient(model)[0] > n_bytes) == (targets != "all-linear"), "else copies in fp32 are kept"


def test_qlora_has_the_gradient_of_its_dequantised_weights_or_says_what_is_missing(base_model: Path) -> None:
    """The embedded model in 4 bits where bitsandbytes is installed, as in CI; a sentence where it is not."""
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(InputError, match=r"pip install 'kubealign\[qlora\]'"):
            load_causal_lm(base_model, "bf16", quantization="nf4")
        assert "CI" not in os.environ, "CI installs the qlora extra"
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantised = PackedModel(load_causal_lm(base_model, "fp32", quantization="nf4"), "fp32")
    assert "differ by at most" in select_packing(quantised, 64)
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in quantised.causal_lm.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert len(weights) == 7 * quantised.causal_lm.config.num_hidden_layers
    dequantised = packed(base_model)
    for name, weight in weights.items():
        dequantised.causal_lm.get_submodule(name).weight.data.copy_(weight)
    gradients = []
    for model in (quantised, dequantised):
        model.lm = add_lora(model.lm, DPO_ADAPTER, 4, 8, 0.0, "all-linear", 1)
        parameters = list(trainable_state(model).values())
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        loop.sequence_logps(model, EXAMPLES)
        model.train()
        found = torch.autograd.grad(model(pack(EXAMPLES)).sum(), parameters)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm()


def test_a_small_update_is_not_rounded_away_in_bf16() -> None:
    """An update far below the last digit of the frozen product still moves the output, on average by what it should."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator).bfloat16()
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    a, b = torch.ones(1, 64).bfloat16() / 64, torch.full((32, 1), 0.02).bfloat16()
    exact = x.float() @ weight.float().T
    update = (x.float() @ a.float().T) @ b.float().T
    together = LoraFunction.apply(x, None, weight, None, a, b)[0].float() - exact
    apart = ((x @ weight.T) + (x @ a.T) @ b.T).float() - exact

    def kept(found: torch.Tensor) -> float:
        return float((found * update).sum() / (update * update).sum())

    assert kept(together) == pytest.approx(1.0, abs=0.1)
    assert kept(apart) < 0.9, "this is what adding it afterwards loses"


FAULTS = """
import resource
import sys

import torch

from components.engine.cpu.memory import configure_malloc

def use():
    tensors = [torch.empty(12 * 2**20).fill_(1.0) for _ in range(8)]  # 48 MiB each: glibc would map them anew
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

configure_malloc(sys.argv[1] == "keep")
use()
print(-(use() - use()))
"""


def test_what_a_step_frees_stays_with_the_process() -> None:
    """Page faults of using fresh memory a second time."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] < faults["default"] / 4, faults


FAT_PARENT = """
import subprocess, sys
ballast = b"x" * (300 << 20)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
LEAN_CHILD = """
import resource
from components.common.memory import peak_memory_mib
print(peak_memory_mib(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_is_that_of_the_program_and_not_of_who_started_it() -> None:
    """A child that is made by fork begins with its parent's size in getrusage's books."""
    command = [sys.executable, "-c", FAT_PARENT, LEAN_CHILD]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    ours, of_getrusage = map(float, done.stdout.split())
    assert 5 < ours < 100 and of_getrusage > ours
