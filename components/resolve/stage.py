"""Turn names into facts before anything else runs, and tell every later step what it depends on: its order.

Never cached. The cache goes by the orders, so that it cannot serve a step a stale result.
"""

import importlib.util
from dataclasses import asdict, replace
from typing import Any

import yaml

from components.common.errors import InputError
from components.config.model import ModelConfig
from components.config.params import Config
from components.orders import Order, decision_key, make_orders, with_keys
from components.registry.audit import Audit, next_use
from components.registry.champion import champion_alias, reconcile_alias
from components.sources.facts import resolve_facts
from components.tracking import store
from components.tracking.run import SETTINGS, StageRun, stage_run

ORDERS = "orders.json"
"""Artifact of the run: the order of every step."""


def run_resolve(config: Config) -> tuple[dict[str, str], str]:
    """Resolve a run's names.

    Args:
        config: of the run.

    Returns:
        the order of every later step as JSON, and the id of the MLflow run.

    Raises:
        InputError: a name that means nothing, or a format that the model cannot be stored in.
    """
    data, register = config.data, config.register_
    if register.format == "adapter" and config.model.finetuning == "full":
        raise InputError("register.format=adapter: full fine-tuning makes no adapter; set register.format=merged")
    named = {"data_repo": _public(data.repo), "data_revision": data.revision, "data_path": data.path}
    with stage_run("resolve", named) as run:
        model = resolved_for_its_hardware(config.model)
        run.log(f"precision {model.precision}, for {model.hardware} (model.precision, model.hardware)")
        config = config.model_copy(update={"model": model})
        sections = config.sections()
        facts = with_keys(sections, resolve_facts(data, model))
        facts = replace(facts, incumbent=_incumbent(run, register.name, facts.lineage))
        decision = decision_key(make_orders(sections, facts), facts.incumbent)
        uses = _decision_index(run.client, register.name, facts.test_set, decision)
        facts = replace(facts, decision=decision, decision_index=uses)
        orders = make_orders(sections, facts)
        _record(run, config, asdict(facts), orders)
        run.log(f"data {facts.data_commit[:12]}, base model {facts.base_reference}")
        run.log(f"incumbent {facts.incumbent or 'none'}")
        if uses > 1:
            run.log(f"this will be decision {uses} on the test set; the gate's level follows")
        return {stage: order.as_json() for stage, order in orders.items()}, run.run_id


def resolved_for_its_hardware(model: ModelConfig) -> ModelConfig:
    """The section with precision and hardware definite: `auto` is this machine, for a run whose steps stay on it.

    Raises:
        InputError: this image cannot tell, and the run does not say what it is for.
    """
    if model.hardware != "auto":
        return model.resolved(model.hardware)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "model.hardware=auto: here is no torch to ask what this machine computes on; set it to what sft and dpo"
            " will run on, such as cpu or gpu+bf16"
        )
    from components.engine.hardware import hardware

    return model.resolved(hardware())


def _record(run: StageRun, config: Config, facts: dict[str, Any], orders: dict[str, Order]) -> None:
    """Write facts, orders and settings, as they can be run again, into the run."""
    code = {f"code_{stage}": value for stage, value in facts.pop("code").items()}
    run.log_params({key: _public(value) for key, value in (facts | code).items()})
    run.client.log_dict(run.run_id, {stage: asdict(order) for stage, order in orders.items()}, ORDERS)
    settings = {name: values for name, values in config.sections().items() if name not in ("prepare", "cluster")}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    run.client.log_text(run.run_id, store.without_credentials(text), SETTINGS)


def _public(value: Any) -> Any:
    return store.without_credentials(value) if isinstance(value, str) else value


def _incumbent(run: StageRun, name: str, made: str) -> str:
    """The version to beat, as models:/name/version, or nothing before the first champion.

    When the champion is what this very lineage once made, the run repeats that one, and so has the same incumbent.
    """
    audit = Audit.find(run.client, name)
    if audit:
        reconcile_alias(audit)
    version = champion_alias(run.client, name)
    if not version:
        return ""
    tags = run.client.get_model_version(name, version).tags
    if tags.get("kubealign.lineage") == made:
        return str(tags.get("kubealign.incumbent", ""))
    return f"models:/{name}/{version}"


def _decision_index(client: Any, name: str, test_set: str, decision: str) -> int:
    audit = Audit.find(client, name)
    return next_use(audit.decisions(test_set), decision) if audit else 1
