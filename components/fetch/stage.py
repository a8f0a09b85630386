"""Bring the resolved data and base model here as artifacts, checked against their digests."""

import shutil
from pathlib import Path

from components.common import tracking
from components.common.chat import choose_template
from components.common.config import ModelConfig
from components.common.errors import InputError
from components.common.files import folder_digest, read_json, replacing_folder, write_json, write_manifest
from components.resolve.base import EMBEDDED
from components.resolve.data import DATA_FOLDERS, EMBEDDED_MODEL, WORKSPACE, opened, workspace_digest

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
"""What a model folder may hold: weights in safetensors, configuration and tokenizer. Never pickles, never code."""


def run_fetch(
    repo: str,
    commit: str,
    digests: dict[str, str],
    model: ModelConfig,
    base_reference: str,
    base_digest: str,
    dataset_out: Path,
    base_out: Path,
) -> str:
    """Copy or download the data set and the base model.

    Args:
        repo: path or URL of the data repository.
        commit: commit of the data, or `workspace`.
        digests: expected DVC digest of each data folder.
        model: for the chat template.
        base_reference: definite name of the base model, from resolve.
        base_digest: its digest, from resolve.
        dataset_out: gets preferences/ and instructions/.
        base_out: gets the model folder, its template chosen, with a manifest of hashes.

    Returns:
        id of the MLflow run.

    Raises:
        InputError: the data changed since it was resolved, or the model cannot be used.
    """
    params = {"data_commit": commit, "base_model": base_reference, "base_digest": base_digest} | {
        f"{Path(folder).name}_digest": value for folder, value in digests.items()
    }
    with tracking.stage_run("fetch", params) as run:
        with replacing_folder(dataset_out) as aside:
            for folder in DATA_FOLDERS:
                _copy_folder(repo, commit, folder, digests[folder], aside / Path(folder).name)
        for folder in DATA_FOLDERS:
            run.log_dataset(Path(folder).name, Path(folder), digests[folder], "alignment")
        with replacing_folder(base_out) as aside:
            _fetch_base(repo, base_reference, base_digest, aside)
            _settle_model(model, aside)
            content = write_manifest(aside)
        run.log_params({"base_content": content})
        run.say(f"data set and base model are here; base model content {content[:12]}")
        return run.run_id


def _copy_folder(repo: str, commit: str, folder: str, expected: str, out: Path) -> None:
    if out.exists():
        out.rmdir()
    if commit == WORKSPACE:
        _copy_files(Path(repo) / folder, out)
        found = workspace_digest(Path(repo).resolve(), folder)
        if found != expected:
            raise InputError(f"{folder} changed while the run was starting; start it again")
        return
    with opened(repo, commit) as fs:
        found = str(fs.info(folder)["dvc_info"]["md5"])
        if found != expected:
            raise InputError(f"{repo}@{commit}: {folder} has digest {found}, expected {expected}")
        try:
            fs.get(folder, str(out), recursive=True)
        except FileNotFoundError as error:
            raise InputError(
                f"{repo}@{commit}: the content of {folder} is neither in the DVC cache nor in a remote; `dvc push` it"
            ) from error


def _copy_files(source: Path, out: Path) -> None:
    """Copy a folder file by file: shutil.copytree goes on after a full disk and hides the reason in a list."""
    out.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        target = out / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(path, target)


def _fetch_base(repo: str, reference: str, expected: str, out: Path) -> None:
    if reference.startswith(f"{EMBEDDED}@"):
        _copy_folder(repo, reference.partition("@")[2], EMBEDDED_MODEL, expected, out)
    elif reference.startswith("models:/"):
        import mlflow

        tracking.client()
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=reference))
        inner = next((path.parent for path in sorted(folder.rglob("config.json"))), None)
        if inner is None:
            raise InputError(f"model.base={reference}: holds no config.json; expected a transformers model")
        _copy_model(inner, out)
    elif reference.startswith("s3://"):
        import s3fs

        s3fs.S3FileSystem().get(reference.rstrip("/") + "/", str(out) + "/", recursive=True)
    elif reference.startswith("hub:"):
        import os

        os.environ["HF_HUB_OFFLINE"] = "0"
        from huggingface_hub import snapshot_download

        name, _, revision = reference.removeprefix("hub:").partition("@")
        snapshot_download(name, revision=revision, local_dir=out, allow_patterns=list(MODEL_FILES))
    else:
        _copy_model(Path(reference), out)
        if folder_digest(Path(reference)) != expected:
            raise InputError(f"{reference} changed while the run was starting; start it again")


def _copy_model(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for pattern in MODEL_FILES:
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)


def _settle_model(model: ModelConfig, folder: Path) -> None:
    """Leave only files that a model may hold, and exactly one chat template, the one that was asked for."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.base={model.base}: no *.safetensors; pickled weights are not loaded, convert them first"
        )
    template_file = folder / "chat_template.jinja"
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    own = template_file.read_text(encoding="utf-8") if template_file.exists() else settings.pop("chat_template", None)
    template_file.write_text(choose_template(model.template, own), encoding="utf-8")
    settings.pop("chat_template", None)
    write_json(settings_file, settings)
