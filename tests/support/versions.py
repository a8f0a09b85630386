"""Versions of a registered model, and a lineage for register."""

from typing import Any

from components.config.params import load_config
from components.register.stage import Lineage
from components.tracking import store
from tests.conftest import ROOT

NAME = "m"


def with_versions(client: Any, n: int, name: str = NAME) -> Any:
    """A registered model with `n` dummy versions."""
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
    base_reference="/models/tiny",
    base_digest="ee",
    config="ff",
    lineage="gg",
    incumbent="",
    decision="hh",
    decision_index=1,
)


CONFIG = load_config(ROOT / "params.yaml")


LENIENT = CONFIG.gate.model_copy(
    update={"min_pairs": 1, "alpha": 0.49, "max_policy_loss": 9.0, "max_kl": 1e9, "min_length_ratio": 0.0}
    | {"max_length_ratio": 1e9, "max_repetition_increase": 1.0, "max_language_regression": 9.0}
)
