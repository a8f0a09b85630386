"""Versions of a registered model, and a lineage for register."""

import copy
from typing import Any

from components.config.gate import GateConfig
from components.config.params import load_config
from components.gate.rejudge import numbers
from components.gate.rules_of_model import rules_of
from components.register.stage import Lineage
from components.registry.audit import Audit
from components.tracking import store
from tests.conftest import ROOT

NAME = "m"


def with_versions(client: Any, n: int, name: str = NAME) -> Any:
    """A registered model with `n` dummy versions and the first entry of a history."""
    Audit.open(client, name, RULES)
    run = client.create_run(store.experiment_id(client))
    client.log_text(run.info.run_id, "nothing", "model/nothing.txt")
    client.create_registered_model(name)
    for _ in range(n):
        client.create_model_version(name, f"runs:/{run.info.run_id}/model", run_id=run.info.run_id)
    return client


LINEAGE = Lineage(
    data_commit="workspace",
    preferences_digest="aa.dir",
    instructions_digest="bb.dir",
    data_clean=True,
    test_set="cc",
    git_commit="dd",
    project_commit="",
    base_reference="/models/tiny",
    base_digest="ee",
    config="ff",
    lineage="gg",
    incumbent="",
    decision="hh",
    decision_index=1,
)


def with_outcome(evaluation: Any, rival: str, better: bool, gate: GateConfig) -> Any:
    """An evaluation whose pairs show the policy to be better than its rival, or equal to it, with the numbers that
    follow.
    """
    made = copy.deepcopy(evaluation)
    for kind, sign in (("held_out", 1), ("calibration", -1)):
        for index, pair in enumerate(made[kind]):
            noise = sign * ((index * 37) % 11 - 5) / 10
            pair["margins"][rival] = 0.4 + noise
            pair["margins"]["policy"] = pair["margins"][rival] + (4.0 - noise if better else 0.0)
    made["comparisons"][rival] = comparison = copy.deepcopy(made["comparisons"]["sft"])
    made["models"][rival] = made["models"]["sft"]
    for place, value in numbers(made, rival, gate).items():
        *path, last = place.split(".")
        target = comparison[path[0]] if path else comparison
        target[last] = int(value) if last == "n" else value
    return made


CONFIG = load_config(ROOT / "params.yaml")


LENIENT = CONFIG.gate.model_copy(
    update={"min_pairs": 1, "alpha": 0.49, "max_policy_loss": 9.0, "max_kl": 1e9, "min_length_ratio": 0.0}
    | {"max_length_ratio": 1e9, "max_repetition_increase": 1.0, "max_language_regression": 9.0}
)


RULES = rules_of(LENIENT, answers=False)
