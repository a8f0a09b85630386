"""What each step depends on: its order, and the keys that are digests of orders."""

import dataclasses
import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest

from components.common.errors import InputError
from components.config.model import ExecutionConfig
from components.config.params import Config, load_config, pipeline_arguments
from components.orders import Facts, Order, config_key, decision_key, lineage, make_orders, read_order
from components.register.stage import Lineage
from components.resolve.component import resolve
from components.resolve.stage import with_resolved_hardware
from components.stages import BY_NAME, ORDERED, STAGE_NAMES
from components.training.run import resolve_precision
from pipelines.platform import for_its_hardware
from tests.conftest import ROOT

FACTS = Facts(
    data_repo="/here",
    data_path="data",
    data_commit="c1",
    preferences_digest="p",
    instructions_digest="i",
    data_clean=True,
    test_set="t",
    base_reference="embedded@c1",
    base_digest="b",
    template="model",
    template_digest="model",
    template_date="2024-07-26",
    git_commit="g",
    code=dict.fromkeys(ORDERED, "code"),
)


def configuration(*sets: str, machine: str = "cpu+bf16") -> Config:
    config = load_config(ROOT / "params.yaml", list(sets))
    return config.model_copy(update={"model": config.model.resolved(machine)})


def orders(*sets: str, machine: str = "cpu+bf16", **facts: Any) -> dict[str, Order]:
    return make_orders(configuration(*sets, machine=machine).sections(), replace(FACTS, **facts))


def differing(other: dict[str, Order]) -> set[str]:
    """The stages whose result another order says to be different."""
    return {stage for stage, order in orders().items() if order.digest != other[stage].digest}


@pytest.mark.parametrize(
    ("sets", "facts", "stages"),
    [
        ([], {}, ""),
        (["dpo.beta=0.2"], {}, "dpo"),
        (["sft.learning_rate=1e-5"], {}, "sft"),
        (["validate.min_rows=9"], {}, "validate"),
        (["model.max_length=512"], {}, "validate sft dpo evaluate"),
        (["model.finetuning=full"], {}, "sft dpo evaluate"),
        (["evaluate.seed=9"], {}, "evaluate"),
        (["gate.alpha=0.01"], {}, "evaluate register"),
        (["register.promote=false"], {}, "register"),
        (["cluster.retries=7", "prepare.near_duplicate=0.5"], {}, ""),
        (["data.revision=v2", "model.base=other", "model.chat_template=chatml"], {}, ""),
        ([], {"preferences_digest": "p2"}, "fetch register"),
        ([], {"base_digest": "b2"}, "fetch register"),
        ([], {"template_digest": "x"}, "fetch"),
        ([], {"template_date": "2026-11-28"}, "fetch"),
        ([], {"incumbent": "models:/m/3"}, "evaluate register"),
        ([], {"data_commit": "c2", "data_repo": "/there", "base_reference": "embedded@c2", "git_commit": "h"}, ""),
        ([], {"code": dict.fromkeys(ORDERED, "code") | {"dpo": "new"}}, "dpo"),
    ],
)
def test_an_order_holds_what_a_step_depends_on_and_nothing_else(
    sets: list[str], facts: dict[str, Any], stages: str
) -> None:
    assert differing(orders(*sets, **facts)) == set(stages.split())


def test_names_that_resolve_turns_into_facts_are_in_no_order() -> None:
    for order in orders().values():
        assert not {"base", "revision", "chat_template", "allow_network"} & order.sections.get("model", {}).keys()
    assert orders()["fetch"].origin == {
        "data_repo": "/here",
        "data_path": "data",
        "data_commit": "c1",
        "base_reference": "embedded@c1",
        "template": "model",
    }


def test_the_lineage_is_the_digest_of_the_orders_that_decide_the_weights() -> None:
    known = lineage(orders())
    assert len(known) == 32 and known == lineage(orders("gate.alpha=0.01", data_commit="c2", git_commit="h"))
    others = [
        lineage(orders("dpo.beta=0.2")),
        lineage(orders("model.max_length=512")),
        lineage(orders(preferences_digest="p2")),
        lineage(orders(code=dict.fromkeys(ORDERED, "code") | {"validate": "new"})),
    ]
    assert known not in others and len(set(others)) == len(others)


def test_the_key_of_a_retraining_asks_how_it_is_judged_and_stored_and_not_who_is_champion() -> None:
    def key(*sets: str, **facts: Any) -> str:
        return config_key(configuration(*sets).sections(), replace(FACTS, **facts))

    assert key() == key(
        "register.promote=false", incumbent="models:/m/1", decision_index=4, git_commit="h", data_commit="c"
    )
    others = [key(f"{name}={value}") for name, value in {"gate.alpha": 0.01, "evaluate.seed": 9}.items()]
    others += [key("register.name=other"), key("register.format=adapter"), key("dpo.beta=0.2")]
    others.append(key(code=dict.fromkeys(ORDERED, "code") | {"evaluate": "new"}))
    assert key() not in others and len(set(others)) == len(others)


def test_a_decision_is_named_by_weights_rules_and_champion() -> None:
    keys = [decision_key(orders(*sets), champion) for sets in ((), ("gate.alpha=0.01",)) for champion in ("", "m/1")]
    assert len(set(keys)) == 4 and keys[0] == decision_key(orders(decision_index=3), "")


def test_an_order_is_canonical_json_that_reads_back_as_it_was() -> None:
    for stage, order in orders().items():
        text = order.as_json()
        assert read_order(text) == order and order.stage == stage
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with pytest.raises(InputError, match="order: expected what `resolve` puts out, found 'sft'"):
        read_order("sft")


def test_an_order_that_kfp_would_not_take_is_refused_by_name() -> None:
    severity = ", ".join(f"check_{index}_{'x' * 40}: warn" for index in range(200))
    with pytest.raises(InputError, match=r"order of validate has \d{5} bytes.*takes 10000.*section validate shorter"):
        orders(f"validate.severity={{{severity}}}")["validate"].as_json()
    assert max(len(order.as_json().encode()) for order in orders().values()) < 2500


def test_resolve_puts_out_the_order_of_every_stage_behind_it() -> None:
    assert list(resolve.component_spec.outputs) == [*(f"order_{stage}" for stage in ORDERED), "run_id"]
    assert set(resolve.component_spec.inputs) == set(pipeline_arguments(Config()))


def test_register_records_what_its_order_says() -> None:
    assert {field.name for field in dataclasses.fields(Lineage)} == {
        *BY_NAME["register"].facts,
        *BY_NAME["register"].origin,
    }


def test_the_table_names_sections_and_facts_that_there_are() -> None:
    sections, facts = Config().sections(), {field.name for field in dataclasses.fields(Facts)}
    for stage in BY_NAME.values():
        assert {*stage.facts, *stage.origin} <= facts and not {*stage.facts} & {*stage.origin}
        for name, _, key in (name.partition(".") for name in stage.sections):
            assert key in ("", *sections[name])
    assert BY_NAME.keys() == set(STAGE_NAMES)


# ---- precision and hardware


def test_two_machines_never_share_a_key_for_different_weights() -> None:
    by_machine = {machine: orders(machine=machine) for machine in ("cpu", "cpu+bf16", "gpu", "gpu+bf16")}
    assert len({lineage(found) for found in by_machine.values()}) == 4
    assert by_machine["cpu"]["sft"].sections["model"]["precision"] == "fp32"
    assert by_machine["cpu+bf16"]["sft"].sections["model"]["precision"] == "bf16"
    # In fp32 it is all one whether there is bf16 too; asked for, bf16 is computed otherwise without the hardware.
    fp32, bf16 = (
        {machine: lineage(orders(f"model.precision={precision}", machine=machine)) for machine in by_machine}
        for precision in ("fp32", "bf16")
    )
    assert fp32["cpu"] == fp32["cpu+bf16"] == lineage(by_machine["cpu"]) and fp32["cpu"] != fp32["gpu"]
    assert len(set(bf16.values())) == 4


def test_no_order_is_made_while_the_precision_is_open() -> None:
    with pytest.raises(ValueError, match=r"model\.precision is auto"):
        make_orders(load_config(ROOT / "params.yaml").sections(), FACTS)
    with pytest.raises(ValueError, match=r"model\.hardware is auto"):
        make_orders(load_config(ROOT / "params.yaml", ["model.precision=fp32"]).sections(), FACTS)


def test_a_run_on_kubeflow_says_which_hardware_it_is_for() -> None:
    gpus = {"cluster.train.gpus=0": "cpu", "cluster.train.gpus=2": "gpu+bf16", "model.hardware=gpu": "gpu"}
    for override, hardware in gpus.items():
        config = for_its_hardware(load_config(ROOT / "params.yaml", [override]), "kubeflow")
        assert config.model.hardware == hardware
        assert json.loads(pipeline_arguments(config)["model_section"])["hardware"] == hardware


def test_a_step_refuses_a_machine_that_would_compute_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.training.run.hardware", lambda: "cpu")
    asked = ExecutionConfig(precision="bf16", hardware="gpu+bf16")
    with pytest.raises(InputError, match=r"model\.hardware=gpu\+bf16: this run in bf16 is for .*this machine is cpu"):
        resolve_precision(asked)
    assert resolve_precision(ExecutionConfig(precision="fp32", hardware="cpu+bf16")).hardware == "cpu"
    assert resolve_precision(ExecutionConfig()) == ExecutionConfig(precision="fp32", hardware="cpu")


def test_an_image_that_cannot_tell_the_hardware_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.hardware=auto: .*no torch"):
        with_resolved_hardware(Config().model)
    known = with_resolved_hardware(load_config(ROOT / "params.yaml", ["model.hardware=gpu+bf16"]).model)
    assert (known.precision, known.hardware) == ("bf16", "gpu+bf16")
