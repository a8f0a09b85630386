"""Packaging of a model version (weights or adapter, tokenizer, code, model card, provenance files) and logging to
MLflow.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.common.documents import read_document
from components.common.errors import EvidenceError
from components.common.files import MANIFEST, digest, file_hashes, sha256_file, write_json
from components.common.provenance import versions
from components.registry.base import BaseReference
from components.registry.evidence import JUDGEMENT, MLFLOWS_OWN, MODEL_SIGNATURE, STATEMENT, Judgement
from components.registry.signing import model_signature, signed, statement
from components.tracking.keys import signing_key
from components.tracking.run import StageRun
from components.tracking.store import is_registered
from components.training.documents import read_dpo_training

CODE = Path(__file__).with_name("chat_model.py")
CARD, ENVIRONMENT, FINGERPRINT = "README.md", "environment.txt", "fingerprint.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")
LOADED_BY_PATH = ("MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml")
"""Files that MLflow writes beside ours and that determine what is executed."""


@dataclass(frozen=True)
class PackageInputs:
    """Inputs that a version is packaged from."""

    policy: Path
    base: Path
    evaluation: Path
    settings: str
    """Text of settings.yaml."""


def content_digest(policy: Path, kind: str) -> str:
    """Digest that identifies a version by its content: the weights, their format and the code that runs them."""
    files = read_document(policy / MANIFEST, dict[str, str])
    weights = {name: value for name, value in files.items() if name.startswith(("model/", "adapter/"))}
    return digest([weights, kind, sha256_file(CODE)])


@contextmanager
def staged(inputs: PackageInputs, kind: str, card: str, base_reference: str) -> Iterator[dict[str, str]]:
    """The artifacts of a version by name, as paths; generated files are in a temporary folder within the context."""
    policy = inputs.policy
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / "settings.yaml").write_text(inputs.settings, encoding="utf-8")
        artifacts = {"card": folder / CARD, "settings": folder / "settings.yaml"}
        artifacts |= {"environment": policy / ENVIRONMENT, "fingerprint": policy / FINGERPRINT}
        artifacts |= {"training": policy / "training.json"}
        artifacts |= {
            "evaluation": inputs.evaluation / "evaluation.json",
            "verdict": inputs.evaluation / "verdict.json",
        }
        if (policy / "adapter").is_dir():
            artifacts["adapter"] = policy / "adapter"
        if kind == "merged":
            artifacts["model"] = policy / "model"
        else:
            shutil.copytree(policy / "model", folder / "tokenizer", ignore=shutil.ignore_patterns(*_globs(WEIGHTS)))
            # Otherwise the folder would look like a model without weights.
            (folder / "tokenizer" / "config.json").unlink()
            precision = read_dpo_training(policy)["precision"]
            base: BaseReference = {
                "reference": base_reference,
                "files": file_hashes(inputs.base),
                "precision": precision,
            }
            write_json(folder / "base.json", base)
            artifacts |= {"tokenizer": folder / "tokenizer", "base": folder / "base.json"}
        yield {name: str(path) for name, path in artifacts.items()}


def log_version(
    run: StageRun,
    name: str,
    artifacts: dict[str, str],
    requirements: list[str],
    tags: dict[str, str],
    judgement: Judgement,
) -> tuple[str, str]:
    """Log the artifacts as a pyfunc model, sign and register it; the version appears last, with all its tags.

    Returns:
        the version number, and the sha256 of its statement.
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
    with tempfile.TemporaryDirectory() as scratch:
        digest_of_statement = write_statement(Path(scratch), name, _files(stored, artifacts), judgement)
        run.client.log_model_artifacts(logged.model_id, scratch)
    version = run.client.create_model_version(
        name, logged.model_uri, run_id=run.run_id, tags=tags, model_id=logged.model_id
    )
    return str(version.version), digest_of_statement


def write_statement(folder: Path, name: str, files: dict[str, str], judgement: Judgement) -> str:
    """Write model.sig and statement.json about a version's files, given by their sha256; returns the statement's."""
    key = signing_key()
    (folder / MODEL_SIGNATURE).write_bytes(model_signature(name, files, [MODEL_SIGNATURE, STATEMENT, MLFLOWS_OWN], key))
    subject = files | {MODEL_SIGNATURE: sha256_file(folder / MODEL_SIGNATURE)}
    (folder / STATEMENT).write_bytes(signed(statement(subject, JUDGEMENT, judgement), key))
    return sha256_file(folder / STATEMENT)


def register_base(run: StageRun, name: str, base: Path, base_digest: str) -> str:
    """Register the base model, once per content; returns its URI.

    An adapter version refers to it, so that anyone with access to the registry can load the full model.
    """
    registered, files = f"{name}-base", file_hashes(base)
    for version in find_versions(run.client, registered, "kubealign.base_content", base_digest):
        if _has_files(f"models:/{registered}/{version}", files):
            return f"models:/{registered}/{version}"
        run.log(f"{registered} version {version} says that it is this base model, but its files are others")
    run.client.log_artifacts(run.run_id, str(base), "base")
    ensure_registered_model(run.client, registered)
    tags = {"kubealign.base_content": base_digest}
    source = f"runs:/{run.run_id}/base"
    version = str(run.client.create_model_version(registered, source, run_id=run.run_id, tags=tags).version)
    run.log(f"the base model is {registered} version {version}")
    return f"models:/{registered}/{version}"


def _has_files(uri: str, files: dict[str, str]) -> bool:
    """Whether a registered version holds these files, by their sha256: its tags may say anything."""
    import mlflow

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
        found = file_hashes(folder)
        found.pop(MLFLOWS_OWN, None)
    return found == files


def ensure_registered_model(client: Any, name: str) -> None:
    """Create the registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_versions(client: Any, name: str, tag: str, value: str) -> list[str]:
    """The versions whose tag has this value, the newest first. A tag is a hint: anyone may have written it."""
    if not is_registered(client, name):
        return []
    matches = client.search_model_versions(f"name = '{name}' AND tags.`{tag}` = '{value}'")
    return [str(number) for number in sorted((int(version.version) for version in matches), reverse=True)]


def requirements(policy: Path, kind: str) -> list[str]:
    """Packages that an environment needs to load the registered model; this project is not one of them."""
    required = {"mlflow": versions(["mlflow-skinny"])["mlflow-skinny"], **versions(["pandas"])}
    required |= read_dpo_training(policy)["libraries"]
    if kind == "merged":
        required.pop("peft", None)
    return [f"{name}=={version}" for name, version in required.items()]


def _files(stored: str, artifacts: dict[str, str]) -> dict[str, str]:
    """sha256 of every file of the version: our files as logged, MLflow's as stored."""
    import mlflow

    hashes = {f"{CODE.name}": sha256_file(CODE)}
    for artifact in map(Path, artifacts.values()):
        files = file_hashes(artifact) if artifact.is_dir() else {"": sha256_file(artifact)}
        hashes |= {f"artifacts/{artifact.name}/{name}".rstrip("/"): value for name, value in files.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOADED_BY_PATH:
            path = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{stored}/{name}", dst_path=scratch))
            if name == "MLmodel":
                check_loader(path, stored)
            hashes[name] = sha256_file(path)
    return hashes


def check_loader(path: Path, where: str) -> None:
    """Check that MLflow would run chat_model.py for this MLmodel, and no other code.

    Raises:
        EvidenceError: it names other code.
    """
    flavors = yaml.safe_load(path.read_text(encoding="utf-8")).get("flavors", {})
    ours = flavors.get("python_function", {})
    code = Path(str(ours.get("model_code_path"))).name
    runs = (list(flavors), ours.get("loader_module"), code, ours.get("code"), ours.get("python_model"))
    if runs != (["python_function"], "mlflow.pyfunc.loaders.code_model", CODE.name, None, None):
        raise EvidenceError(f"{where}: MLmodel would load other code than {CODE.name}: {runs}")


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
