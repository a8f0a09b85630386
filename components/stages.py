"""The one table of stages, in the order in which they run. Whatever lists or orders stages reads it."""

from dataclasses import dataclass
from typing import Literal

Secret = Literal["git", "data", "state", "mlflow"]


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, and what its result depends on besides its code and its input artifacts.

    Args:
        name: the word for its folder, command, section, task, MLflow run and pods.
        image: in which of our images it runs; `train` has torch and, in a cluster, the GPUs.
        sections: sections of params.yaml, or single keys as `section.key`, that decide its result.
        facts: what `resolve` found out (fields of `orders.Facts`) that decides its result.
        origin: of those facts, what only says where things are and come from: it is used, shown and recorded, but the
            same content from elsewhere gives the same result.
        trains: whether it makes weights.
        several_nodes: whether `cluster.nodes` above 1 makes it a TrainJob; the step then only starts and follows one.
        cached: whether a result is served again for the same order.
        keys: which keys of cluster.signing_secret it gets on Kubeflow.
        secrets: which other secrets it gets there: `git` and `data` read the data repository, its DVC remote and base
            models in buckets, `state` reads and writes checkpoints, `mlflow` is the pipeline's user in MLflow. Every
            stage writes its own run there; register alone writes models and the history.
    """

    name: str
    image: Literal["data", "train"]
    sections: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    trains: bool = False
    several_nodes: bool = False
    cached: bool = True
    keys: tuple[str, ...] = ()
    secrets: tuple[Secret, ...] = ("mlflow",)


STAGES = (
    Stage("resolve", "data", cached=False, keys=("public_keys",), secrets=("git", "data", "mlflow")),
    Stage(
        "fetch",
        "data",
        facts=("preferences_digest", "instructions_digest", "base_digest", "template_digest", "template_date"),
        origin=("data_repo", "data_path", "data_commit", "base_reference", "template"),
        keys=("public_keys",),
        secrets=("git", "data", "mlflow"),
    ),
    Stage("validate", "data", sections=("validate", "model.max_length")),
    Stage(
        "sft",
        "train",
        sections=("sft", "model"),
        trains=True,
        several_nodes=True,
        keys=("cache_key",),
        secrets=("state", "mlflow"),
    ),
    Stage(
        "dpo",
        "train",
        sections=("dpo", "model"),
        trains=True,
        several_nodes=True,
        keys=("cache_key",),
        secrets=("state", "mlflow"),
    ),
    Stage(
        "evaluate",
        "train",
        sections=("evaluate", "gate", "model"),
        facts=("data_clean", "incumbent", "decision_index", "test_set"),
        origin=("data_commit", "preferences_digest", "base_reference", "base_digest", "lineage"),
        keys=("cache_key", "public_keys"),
    ),
    Stage(
        "register",
        "data",
        sections=("register", "gate"),
        facts=(
            *("preferences_digest", "instructions_digest", "base_digest", "data_clean", "test_set"),
            *("incumbent", "decision_index"),
        ),
        origin=("data_commit", "git_commit", "project_commit", "base_reference", "lineage", "config", "decision"),
        cached=False,
        keys=("signing_key", "cache_key", "public_keys"),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
STAGE_NAMES = tuple(BY_NAME)
ORDERED = STAGE_NAMES[1:]
"""The stages that get an order from the first one, `resolve`."""
CACHED = tuple(stage.name for stage in STAGES if stage.cached)
LINEAGE = ORDERED[: max(index for index, name in enumerate(ORDERED) if BY_NAME[name].trains) + 1]
"""The stages up to the last one that makes weights: their orders decide a model."""
