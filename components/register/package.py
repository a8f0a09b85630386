"""What a model version holds: weights or adapter, tokenizer, code, model card, and the papers that prove where it comes
from; and how it gets into MLflow.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.documents import read_document
from components.common.files import MANIFEST, digest, file_hashes, sha256_file, write_json
from components.common.provenance import versions
from components.registry.manifest import MANIFEST_TAG, BaseReference
from components.tracking.run import StageRun
from components.training.documents import read_dpo_training

CODE = Path(__file__).with_name("chat_model.py")
CARD, ENVIRONMENT, FINGERPRINT = "README.md", "environment.txt", "fingerprint.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")
LOADED_BY_PATH = ("MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml")
"""Files that MLflow writes beside ours and that decide what is run."""


@dataclass(frozen=True)
class Sources:
    """Folders and files that a version is made of."""

    policy: Path
    base: Path
    evaluation: Path
    settings: str
    """Text of settings.yaml."""


def content_digest(policy: Path, kind: str) -> str:
    """What names a version by its content: the weights, their format and the code that runs them."""
    files = read_document(policy / MANIFEST, dict[str, str])
    weights = {name: value for name, value in files.items() if name.startswith(("model/", "adapter/"))}
    return digest([weights, kind, sha256_file(CODE)])


@contextmanager
def staged(sources: Sources, kind: str, card: str, base_reference: str) -> Iterator[dict[str, str]]:
    """The artifacts of a version by name, as paths; small files lie in a folder of their own meanwhile."""
    policy = sources.policy
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / "settings.yaml").write_text(sources.settings, encoding="utf-8")
        made = {"card": folder / CARD, "settings": folder / "settings.yaml"}
        made |= {"environment": policy / ENVIRONMENT, "fingerprint": policy / FINGERPRINT}
        made |= {"training": policy / "training.json"}
        made |= {"evaluation": sources.evaluation / "evaluation.json", "verdict": sources.evaluation / "verdict.json"}
        if (policy / "adapter").is_dir():
            made["adapter"] = policy / "adapter"
        if kind == "merged":
            made["model"] = policy / "model"
        else:
            shutil.copytree(policy / "model", folder / "tokenizer", ignore=shutil.ignore_patterns(*_globs(WEIGHTS)))
            # Otherwise the folder would look like a model without weights.
            (folder / "tokenizer" / "config.json").unlink()
            base: BaseReference = {"reference": base_reference, "files": file_hashes(sources.base)}
            write_json(folder / "base.json", base)
            made |= {"tokenizer": folder / "tokenizer", "base": folder / "base.json"}
        yield {name: str(path) for name, path in made.items()}


def log_version(
    run: StageRun, name: str, artifacts: dict[str, str], requirements: list[str], tags: dict[str, str]
) -> str:
    """Log the artifacts as a pyfunc model and make a version of it; the version appears last, with all its tags.

    Returns:
        the version.
    """
    import mlflow

    with mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(CODE),
            artifacts=artifacts,
            signature=_signature(),
            pip_requirements=requirements,
        )
    ensure_registered_model(run.client, name)
    stored = run.client.get_logged_model(logged.model_id).artifact_location
    made = run.client.create_model_version(
        name,
        logged.model_uri,
        run_id=run.run_id,
        tags=tags | {MANIFEST_TAG: _manifest(stored, artifacts)},
        model_id=logged.model_id,
    )
    return str(made.version)


def register_base(run: StageRun, name: str, base: Path, base_digest: str) -> str:
    """The base model as a version in the registry, once per content; returns its URI.

    An adapter names it there, so that whoever reaches the registry can load the whole.
    """
    registered = f"{name}-base"
    found = find_version(run.client, registered, "kubealign.base_content", base_digest)
    if not found:
        run.client.log_artifacts(run.run_id, str(base), "base")
        ensure_registered_model(run.client, registered)
        tags = {"kubealign.base_content": base_digest}
        source = f"runs:/{run.run_id}/base"
        found = str(run.client.create_model_version(registered, source, run_id=run.run_id, tags=tags).version)
        run.log(f"the base model is {registered} version {found}")
    return f"models:/{registered}/{found}"


def ensure_registered_model(client: Any, name: str) -> None:
    """Make the registered model if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_version(client: Any, name: str, tag: str, value: str) -> str:
    """The newest version with a tag of that value, or nothing."""
    # A server with users answers 403 when asked for a model that is not there; a search is let through.
    if not client.search_registered_models(f"name = '{name}'"):
        return ""
    found = client.search_model_versions(f"name = '{name}' AND tags.`{tag}` = '{value}'")
    return str(max((int(version.version) for version in found), default=""))


def requirements(policy: Path, kind: str) -> list[str]:
    """What an environment needs to load the registered model; this project is not among it."""
    wanted = {"mlflow": versions(["mlflow-skinny"])["mlflow-skinny"], **versions(["pandas"])}
    wanted |= read_dpo_training(policy)["libraries"]
    if kind == "merged":
        wanted.pop("peft", None)
    return [f"{name}=={version}" for name, version in wanted.items()]


def _manifest(stored: str, artifacts: dict[str, str]) -> str:
    """sha256 of every file of the version, as JSON: ours as they were given, MLflow's as they were stored."""
    import mlflow

    hashes = {f"{CODE.name}": sha256_file(CODE)}
    for given in map(Path, artifacts.values()):
        found = file_hashes(given) if given.is_dir() else {"": sha256_file(given)}
        hashes |= {f"artifacts/{given.name}/{name}".rstrip("/"): value for name, value in found.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOADED_BY_PATH:
            path = mlflow.artifacts.download_artifacts(artifact_uri=f"{stored}/{name}", dst_path=scratch)
            hashes[name] = sha256_file(Path(path))
    return json.dumps(hashes, sort_keys=True)


def _globs(endings: tuple[str, ...]) -> list[str]:
    return [f"*{ending}" for ending in endings]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    return ModelSignature(
        inputs=Schema([ColSpec(Array(message), "messages")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 256),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
