"""Packs that go through the model at the same time, a thread each."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from components.common.errors import TrainingError
from components.config.params import load_config
from components.dpo.stage import cached_reference, make_objective
from components.engine import loop
from components.engine.cpu.threads import plan_concurrent_packs as plan
from components.engine.cpu.threads import side_by_side
from components.engine.models import (
    DPO_ADAPTER,
    PackedModel,
    add_lora,
    disable_dropout,
    load_causal_lm,
    trainable_state,
)
from components.engine.packing import Example
from tests.conftest import ROOT
from tests.support.engine import SETTINGS, packed, with_adapter

EXAMPLES = [
    Example([5 + n, 6, 7 + n], [[8, 9, 10 + n][: 1 + n % 3], [11 + n, 12, 13, 14][: 2 + n % 2]]) for n in range(8)
]
PAIRS = loop.TrainingSet(EXAMPLES, [f"pair-{n}" for n in range(8)], [1.0] * 8)
THREADED = replace(SETTINGS, batch_size=8, epochs=4.0, max_tokens_per_microbatch=40)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and lanes however little they have to do."""
    monkeypatch.setattr("components.engine.cpu.threads.LANE_TOKENS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "left as it was"
    torch.set_num_threads(before)


def train(model: PackedModel, folder: Path, pure: bool = True) -> list[loop.StepRecord]:
    reference = np.asarray(loop.sequence_logps(with_adapter(Path(model.causal_lm.config._name_or_path)), EXAMPLES))
    objective = make_objective(cached_reference(reference), load_config(ROOT / "params.yaml", ["dpo.beta=0.5"]).dpo)
    return list(loop.train(model, PAIRS, objective, THREADED, folder, lambda sentence: None, pure=pure))


def test_packs_go_side_by_side_only_where_every_thread_has_its_share() -> None:
    tokens = [300, 310, 620, 590, 900, 40, 1100]
    assert plan([0, 1, 2, 3], tokens, 2048, 2) == ([[[2, 0]], [[3, 1]]], [])
    assert plan([0, 1, 2, 3], tokens, 1300, 2) == ([[[2], [0]], [[3], [1]]], []), "650 tokens in each at a time"
    assert plan([0, 1, 2, 3], tokens, 2048, 1) == ([], [[2, 3, 1, 0]])
    assert plan([4, 0], tokens, 2048, 2) == ([], [[4, 0]]), "one thread would wait for 900 tokens after 300"
    assert plan([0, 5], tokens, 2048, 2) == ([], [[0, 5]]), "too few tokens for two"
    assert plan([0, 1, 2, 3, 6], tokens, 2048, 2) == ([[[2, 0]], [[3, 1]]], [[6]]), "two of 1100 would be too many"
    assert plan([0, 1, 4], tokens, 2048, 8) == ([], [[4, 1, 0]]), "no three lanes alike, and no two"
    found, rest = plan([0, 1, 2, 3], tokens, 2048, 8)
    assert list(map(len, found)) == [1, 1] and not rest, "three lanes would leave two threads idle"


def test_tasks_run_at_the_same_time_in_their_order_on_their_share_of_the_threads(two_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=60)

    def task(number: int) -> tuple[int, int]:
        meeting.wait()
        torch.mm(torch.ones(300, 300), torch.ones(300, 300))
        return number, torch.get_num_threads()

    assert side_by_side([partial(task, 1), partial(task, 2)]) == [(1, 1), (2, 1)]
    assert side_by_side([torch.get_num_threads]) == [2], "alone it has them all"


@pytest.mark.parametrize("how", ["fp32", "checkpointing", "bf16"])
def test_training_side_by_side_is_training_in_one_and_the_same_every_time(
    two_threads: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def fresh() -> PackedModel:
        if how == "bf16":
            lm = add_lora(load_causal_lm(tiny_model, "bf16"), DPO_ADAPTER, 4, 8, 0.0, "all-linear", 1)
            return PackedModel(lm, "bf16")
        model = with_adapter(tiny_model)
        if how == "checkpointing":
            model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    threads: set[int] = set()
    forward = PackedModel.forward

    def watched(model: PackedModel, *arguments: object) -> torch.Tensor:
        threads.add(threading.get_ident())
        return forward(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("components.engine.models.native_precision", lambda: "bf16")
    monkeypatch.setattr(PackedModel, "forward", watched)
    alone = train(fresh(), tmp_path / "alone", pure=False)
    assert threads == {threading.get_ident()}
    models = [fresh() for _ in range(4)]
    runs = [train(model, tmp_path / str(number)) for number, model in enumerate(models)]
    assert len(threads) > 1
    for records in runs:
        assert [replace(record, seconds=0.0, memory_mib=0.0) for record in records] == [
            replace(record, seconds=0.0, memory_mib=0.0) for record in runs[0]
        ]
        assert [record.tokens for record in records] == [record.tokens for record in alone]
        for mine, theirs in zip(records, alone, strict=True):
            more = 1000 if how == "bf16" else 1
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-5 * more)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4 * more)
            assert mine.metrics == pytest.approx(theirs.metrics, rel=1e-4 * more, abs=1e-5 * more)
    for model in models[1:]:
        for name, parameter in trainable_state(model).items():
            assert torch.equal(parameter, trainable_state(models[0])[name]), name


def test_a_loss_that_is_not_finite_in_a_lane_stops_with_its_records(
    two_threads: None, tiny_model: Path, tmp_path: Path
) -> None:
    model = with_adapter(tiny_model)
    with torch.no_grad():
        next(iter(trainable_state(model).values())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 1 is not finite; records of that pass: pair-"):
        train(model, tmp_path)


def test_one_lane_where_chance_or_the_size_of_gradients_forbids_more(two_threads: None, tiny_model: Path) -> None:
    assert with_adapter(tiny_model).n_lanes == 2
    assert with_adapter(tiny_model, dropout=0.1).n_lanes == 1
    assert packed(tiny_model).n_lanes == 1, "no adapter"
    assert PackedModel(load_causal_lm(tiny_model, "fp32", full=True), "fp32").n_lanes == 1
    drops = with_adapter(tiny_model)
    drops.causal_lm.config.attention_dropout = 0.1
    assert drops.n_lanes == 1
    disable_dropout(drops)
    assert drops.n_lanes == 2, "as in dpo"
    apart = with_adapter(tiny_model)
    apart.packed = False
    assert apart.n_lanes == 1
