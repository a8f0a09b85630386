"""Resolve a run's names before anything else runs, and give every later step its order: all that it depends on.

Never cached. Later steps are cached by their orders, so that the cache cannot serve a stale result.
"""

import importlib.util
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from components.common.errors import InputError
from components.common.secrets import without_credentials
from components.config.model import ModelConfig
from components.config.params import Config
from components.gate.rules_of_model import check_rules
from components.orders import Order, decision_key, make_orders, with_keys
from components.registry.audit import Audit, next_use
from components.registry.champion import champion_version
from components.registry.evidence import check_history, fetch_statement
from components.registry.preconditions import check_server
from components.sources.facts import resolve_facts
from components.tracking.run import SETTINGS, StageRun, stage_run

ORDERS = "orders.json"
"""Artifact of the run: the order of every step."""


def run_resolve(config: Config, project_commit: str = "") -> tuple[dict[str, str], str]:
    """Resolve a run's names.

    Args:
        config: configuration of the run.
        project_commit: the commit of the project that the run judges; empty for a run of something else.

    Returns:
        the order of every later step as JSON, and the id of the MLflow run.

    Raises:
        InputError: a name does not resolve, the model cannot be stored in the configured format, or not by this MLflow.
    """
    data, register = config.data, config.register_
    if register.format == "adapter" and config.model.finetuning == "full":
        raise InputError("register.format=adapter: full fine-tuning produces no adapter; set register.format=merged")
    named = {"data_repo": data.repo, "data_revision": data.revision, "data_path": data.path}
    with stage_run("resolve", named) as run:
        model = with_resolved_hardware(config.model)
        run.log(f"precision {model.precision}, for {model.hardware} (model.precision, model.hardware)")
        config = config.model_copy(update={"model": model})
        sections = config.sections()
        facts = replace(with_keys(sections, resolve_facts(data, model)), project_commit=project_commit)
        audit = _history(run, config)
        facts = replace(facts, incumbent=_incumbent(run, register.name, audit, facts.lineage))
        decision = decision_key(make_orders(sections, facts), facts.incumbent)
        decision_index = next_use(audit.decisions(facts.test_set), decision) if audit else 1
        facts = replace(facts, decision=decision, decision_index=decision_index)
        orders = make_orders(sections, facts)
        _record(run, config, asdict(facts), orders)
        check_server(run.client, run.run_id, ORDERS, register.name)
        run.log(f"data {facts.data_commit[:12]}, base model {facts.base_reference}")
        run.log(f"incumbent {facts.incumbent or 'none'}")
        if decision_index > 1:
            run.log(
                f"this will be decision {decision_index} on this test set; the gate adjusts its significance level"
                " accordingly"
            )
        return {stage: order.as_json() for stage, order in orders.items()}, run.run_id


def with_resolved_hardware(model: ModelConfig) -> ModelConfig:
    """The section with precision and hardware resolved; `auto` means this machine, for a run whose steps stay on it.

    Raises:
        InputError: hardware is `auto`, and this image has no torch to detect it.
    """
    if model.hardware != "auto":
        return model.resolved(model.hardware)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "model.hardware=auto: this image has no torch to detect the hardware; set it to the hardware that sft and"
            " dpo will run on, such as cpu or gpu+bf16"
        )
    from components.engine.hardware import hardware

    return model.resolved(hardware())


def _record(run: StageRun, config: Config, facts: dict[str, Any], orders: dict[str, Order]) -> None:
    """Log facts, orders and the settings, from which the run can be repeated."""
    code = {f"code_{stage}": value for stage, value in facts.pop("code").items()}
    facts["template"] = facts["template_digest"]  # its text may be longer than MLflow takes; SETTINGS has it
    run.log_params(facts | code)
    run.client.log_dict(run.run_id, {stage: asdict(order) for stage, order in orders.items()}, ORDERS)
    settings = {name: values for name, values in config.sections().items() if name not in ("prepare", "cluster")}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    run.client.log_text(run.run_id, without_credentials(text), SETTINGS)


def _history(run: StageRun, config: Config) -> Audit | None:
    """The registered model's history, whose rules this run's are not looser than; None before the first version.

    Raises:
        InputError: a rule is looser.
        EvidenceError: the history is damaged.
    """
    name = config.register_.name
    audit = Audit.find(run.client, name)
    rules = audit.rules() if audit else None
    if audit and rules:
        check_history(run.client, audit)
        check_rules(rules, config.gate, config.evaluate.generations_per_language > 0, name)
    return audit


def _incumbent(run: StageRun, name: str, audit: Audit | None, lineage: str) -> str:
    """The version to beat, as models:/name/version; empty before the first champion.

    If the champion came from this lineage, the run repeats it and so has the same incumbent as before.
    """
    version = champion_version(audit)
    if not version:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        judgement = fetch_statement(name, version, Path(scratch)).judgement
    if judgement["lineage"] == lineage:
        return judgement["incumbent"]["version"]
    return f"models:/{name}/{version}"
