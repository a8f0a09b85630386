"""Whether MLflow will take what `register` gives it, asked by `resolve`, before anything is trained."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.common.errors import InputError
from components.common.secrets import without_credentials
from components.tracking.store import experiment_id, is_registered, tracking_uri

LEAST_MLFLOW = "3.0"
"""The first MLflow server that knows logged models."""
LAST_RUN = "kubealign.last_run"
"""Tag of a registered model: the run that began last. Writing it takes the right that registering takes."""


def check_server(client: Any, run_id: str, artifact: str, name: str) -> None:
    """Check that the server can log models, gives back what it stores, and lets us change the registered model.

    Args:
        client: MLflow client.
        run_id: a run of ours.
        artifact: path of an artifact that was logged to it.
        name: the registered model, which need not exist.

    Raises:
        InputError: the server is too old, or its store of artifacts does not give back what was logged.
        MlflowException: it refuses, with its own reason.
    """
    from mlflow.exceptions import MlflowException

    server = without_credentials(tracking_uri())
    try:
        client.search_logged_models([experiment_id(client)], max_results=1)
    except MlflowException as error:
        if " 404" not in str(error) and error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        raise InputError(
            f"MLflow at {server} is {_version()}, which cannot log models; upgrade the server: kubealign needs"
            f" {LEAST_MLFLOW} or later"
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        try:
            client.download_artifacts(run_id, artifact, scratch)
        except (MlflowException, OSError) as error:
            raise InputError(
                f"MLflow at {server} took the artifact {artifact} of run {run_id} and does not give it back"
                f" ({type(error).__name__}: {without_credentials(str(error))[:200]}); check its store of artifacts"
            ) from error
        if not (Path(scratch) / artifact).is_file():
            raise InputError(f"MLflow at {server} has no artifact {artifact} of run {run_id}, which was just logged")
    if is_registered(client, name):
        client.set_registered_model_tag(name, LAST_RUN, run_id)


def _version() -> str:
    """The server's own word on its version, for a message."""
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with suppress(Exception):
        answer = http_request(get_default_host_creds(tracking_uri()), "/version", "GET", max_retries=0, timeout=10)
        if answer.ok and len(answer.text) < 40:
            return f"version {answer.text.strip()}"
    return "of an unknown version"
