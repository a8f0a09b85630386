"""Location of runs, models and local state: the home folder, the MLflow client and its experiment."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from components.common.errors import InputError
from components.tracking.local import ARTIFACTS, check_path, prepare

HOME_VARIABLE = "KUBEALIGN_HOME"
DEFAULT_HOME = ".kubealign"
EXPERIMENT = "kubealign"
SQLITE = "sqlite:///"
KFP_RUN_VARIABLE = "KUBEALIGN_KFP_RUN"
"""Environment variable with the id of the run on Kubeflow, which its parent run in MLflow carries as a tag."""


def home() -> Path:
    """The folder for everything that outlives a stage: checkpoints, caches, the local MLflow.

    An empty variable is one that is not set: `KUBEALIGN_HOME=$UNSET` names no folder.

    Raises:
        InputError: it is the root folder or a person's own, where nothing of ours may be mixed with theirs.
    """
    named = os.environ.get(HOME_VARIABLE, "").strip() or DEFAULT_HOME
    folder = Path(named).resolve()
    if folder in (Path("/"), Path(os.path.expanduser("~")).resolve()):  # noqa: PTH111 - Path's raises without a name
        raise InputError(f"{HOME_VARIABLE}={named}: expected a folder of its own, such as {folder / DEFAULT_HOME}")
    return folder


def in_pod() -> bool:
    """Whether this process is a step of a run on Kubeflow, where the run form may name anything."""
    return bool(os.environ.get(KFP_RUN_VARIABLE))


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or SQLite in the home folder; a relative SQLite path is made absolute.

    Raises:
        InputError: MLflow cannot have a file at that path.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given and not given.startswith(SQLITE):
        return given
    path, separator, options = given.removeprefix(SQLITE).partition("?")
    database = Path(unquote(path)).resolve() if given else home() / "mlflow.db"
    check_path(database)
    return f"{SQLITE}{database}{separator}{options}"


def client() -> Any:
    """An MLflow client for `tracking_uri`."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if (uri := tracking_uri()).startswith(SQLITE):
        home().mkdir(parents=True, exist_ok=True)
        prepare(Path(uri.removeprefix(SQLITE).partition("?")[0]), home())
    mlflow.set_tracking_uri(tracking_uri())
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri())
    return mlflow.MlflowClient()


def is_registered(mlflow_client: Any, name: str) -> bool:
    """Whether there is a registered model of that name."""
    # With authentication on, MLflow answers 403 for a model that does not exist; a search is allowed.
    return bool(mlflow_client.search_registered_models(f"name = '{name}'"))


def experiment_name() -> str:
    """The name of the experiment of all runs: MLFLOW_EXPERIMENT_NAME or `kubealign`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)


def experiment_id(mlflow_client: Any) -> str:
    """The id of the experiment of all runs, created if missing.

    Raises:
        InputError: it was deleted.
    """
    name = experiment_name()
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment and experiment.lifecycle_stage != "active":
        raise InputError(
            f"the experiment {name} was deleted from MLflow, and its runs with it; `kubealign history --repair` (or"
            f" `mlflow experiments restore -x {experiment.experiment_id}`) brings them back"
        )
    if experiment:
        return str(experiment.experiment_id)
    from mlflow.exceptions import MlflowException

    location = (home() / ARTIFACTS).as_uri() if tracking_uri().startswith(SQLITE) else None
    try:
        return str(mlflow_client.create_experiment(name, location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another first run
            raise
        experiment = mlflow_client.get_experiment_by_name(name)
        return str(experiment.experiment_id)
