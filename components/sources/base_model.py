"""Resolution of a base model's name: its location, and a digest that changes when its files do."""

import re
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import InputError, single_line
from components.common.files import digest, folder_digest
from components.common.urls import parse_url
from components.config.data import DataConfig
from components.config.model import ModelSource
from components.sources.data import embedded_model, resolve_data
from components.tracking import store
from components.tracking.storage import s3_filesystem
from components.tracking.store import in_pod

EMBEDDED = "embedded"


@dataclass(frozen=True)
class ResolvedModel:
    """A resolved base model: `reference` names one exact version, `digest` its content."""

    reference: str
    digest: str


def resolve_base(model: ModelSource, data: DataConfig) -> ResolvedModel:
    """Resolve the configured base model to one exact version.

    Raises:
        InputError: it does not exist, or the configuration does not allow it.
    """
    base = model.base
    if base == EMBEDDED:
        embedded = embedded_model(data.path)
        version = resolve_data(data.repo, data.revision, (embedded,))
        return ResolvedModel(f"{EMBEDDED}@{version.commit}", version.digests[embedded])
    if base.startswith("models:/"):
        return _registered(base)
    if base.startswith("s3://"):
        return ResolvedModel(base, bucket_digest(base))
    folder = Path(base).expanduser()
    if folder.is_dir() and not in_pod():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.base={base}: the folder has no config.json; expected a transformers model folder")
        return ResolvedModel(str(folder.resolve()), folder_digest(folder))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith("."):
        return _hub(model)
    problem = "a pod sees no folder of this machine" if in_pod() else "no such folder"
    raise InputError(
        f"model.base={base}: {problem}; expected `embedded`, a folder, s3://bucket/prefix, models:/name/version,"
        " models:/name@alias, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def _hub(model: ModelSource) -> ResolvedModel:
    if not model.allow_network:
        raise InputError(
            f"model.base={model.base}: no such folder, and a hub id needs the network; set model.allow_network, and"
            " model.revision to a commit"
        )
    if not model.revision:
        raise InputError(f"model.base={model.base}: a hub id needs model.revision, a commit of 40 hexadecimal digits")
    reference = f"hub:{model.base}@{model.revision}"
    return ResolvedModel(reference, digest(reference))


def _registered(uri: str) -> ResolvedModel:
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if not match:
        raise InputError(f"model.base={uri}: expected models:/name/version or models:/name@alias")
    name, version, alias = match.groups()
    client = store.client()
    try:
        if alias:
            model_version = client.get_model_version_by_alias(name, alias)
        else:
            model_version = client.get_model_version(name, version)
    except MlflowException as error:
        raise InputError(f"model.base={uri}: {single_line(str(error))}") from error
    reference = f"models:/{name}/{model_version.version}"
    return ResolvedModel(reference, digest(reference))


def bucket_digest(uri: str) -> str:
    """Digest of the names, sizes and tags of a model's files in a bucket.

    Raises:
        InputError: it cannot be listed, or is no model.
    """
    try:
        parse_url(uri, ("s3",))
        entries = s3_filesystem().find(uri, detail=True)
    except (OSError, ValueError) as error:
        raise InputError(f"model.base={uri}: cannot be listed: {single_line(str(error))}") from error
    if not any(path.endswith("/config.json") for path in entries):
        raise InputError(f"model.base={uri}: no config.json under it; expected a transformers model folder")
    return digest({path: [entry["size"], entry["ETag"]] for path, entry in entries.items()})
