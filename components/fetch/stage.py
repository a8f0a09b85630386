"""Fetch the resolved data and base model as artifacts, verified against their digests."""

import hashlib
import secrets
import shutil
from collections.abc import Iterable
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from components.common.errors import InputError, KubealignError
from components.common.files import (
    digest,
    folder_digest,
    inside,
    read_json,
    replacing,
    replacing_folder,
    write_json,
    write_manifest,
)
from components.common.limits import ANSWER_S, time_limit
from components.common.secrets import without_credentials
from components.config.data import DataConfig
from components.dataset.chat import (
    check_template,
    choose_template,
    load_tokenizer,
    shipped_templates,
    with_beginning,
    with_date,
)
from components.registry.evidence import STATEMENT, check_files, read_statement
from components.sources.base_model import EMBEDDED, bucket_digest
from components.sources.data import (
    WORKSPACE,
    embedded_model,
    object_path,
    opened,
    push_again,
    recorded_digest,
    remote_errors,
    tracked_files,
    workspace_digest,
)
from components.sources.model_folder import check_weights
from components.tracking import store
from components.tracking.run import stage_run
from components.tracking.storage import S3, s3_filesystem

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""The files of a base model that are taken, by name: configuration, safetensors weights, tokenizer. Never pickles, code
or weights beside the model's own.
"""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""An adapter in a model's folder is an error, as transformers would add it to the weights."""
MIN_BYTES_PER_S = 50_000
"""A remote that is slower counts as one that does not answer."""
DOWNLOADS = "downloads"
"""Folder below the home folder for the files of interrupted downloads."""


def run_fetch(
    data: DataConfig,
    digests: dict[str, str],
    template: str,
    template_date: date,
    base_reference: str,
    base_digest: str,
    dataset_out: Path,
    base_out: Path,
) -> str:
    """Copy or download the data set and the base model.

    Args:
        data: the data repository; its revision is the commit from resolve, or `workspace`.
        digests: expected DVC digest of each data folder.
        template: the chat template for the base model, as `model.chat_template` names it.
        template_date: the day that the template renders as today.
        base_reference: exact version of the base model, from resolve.
        base_digest: its digest, from resolve.
        dataset_out: gets preferences/ and instructions/.
        base_out: gets the model folder with one chat template and a manifest of hashes.

    Returns:
        id of the MLflow run.

    Raises:
        InputError: the data changed since it was resolved or cannot be fetched, or the model cannot be used.
    """
    params = {"data_commit": data.revision, "base_model": base_reference, "base_digest": base_digest} | {
        f"{Path(folder).name}_digest": value for folder, value in digests.items()
    }
    with stage_run("fetch", params) as run:
        fetch_data(data, digests, dataset_out)
        repo = without_credentials(data.repo)
        for folder, md5 in digests.items():
            source = {"repo": repo, "commit": data.revision, "path": folder}
            run.log_dataset(Path(folder).name, source, md5, "alignment")
        with replacing_folder(base_out) as staging:
            _fetch_base(data, base_reference, base_digest, staging)
            _clean_model_folder(template, template_date, base_reference, staging)
            content = write_manifest(staging)
        run.log_params({"base_content": content})
        run.log(f"fetched data set and base model; base model content {content[:12]}")
        return run.run_id


def fetch_data(data: DataConfig, digests: dict[str, str], out: Path) -> None:
    """Fetch the data folders into `out`, which appears with all of them or not at all.

    Raises:
        InputError: the data differs from what was resolved, does not exist, or may not be read.
        KubealignError: the remote failed; the same call resumes where this one stopped.
    """
    with replacing_folder(out) as staging:
        for folder, expected in digests.items():
            _copy_folder(data, folder, expected, staging / Path(folder).name)


def _copy_folder(data: DataConfig, folder: str, expected: str, out: Path) -> None:
    if out.exists():
        out.rmdir()
    if data.revision != WORKSPACE:
        _download(data, folder, expected, out)
        return
    _copy_files(Path(data.repo) / folder, out)
    if workspace_digest(Path(data.repo).resolve(), folder) != expected:
        raise InputError(f"{folder} changed while the run was starting; start it again")


def _download(data: DataConfig, folder: str, expected: str, out: Path) -> None:
    """Download a folder file by file, each verified by its md5; an interrupted download resumes at the last file."""
    partial = _partial_folder(data.repo, folder, expected)
    reading = remote_errors(data.repo, data.revision, folder, expected)
    with reading, opened(data.repo, data.revision, (folder,)) as fs:
        actual = recorded_digest(fs, folder, f"{data.repo} at {data.revision}")
        if actual != expected:
            raise InputError(f"{data.repo} at {data.revision}: {folder} has digest {actual}, expected {expected}")
        for number, (path, name) in enumerate(tracked_files(fs, folder)):
            target, kept = inside(out, name), partial / str(number)
            md5 = _recorded_md5(fs, path, f"{data.repo} at {data.revision}")
            if not kept.exists() or _md5(kept) != md5:
                size = int(fs.info(path).get("size") or 0)
                limit = time_limit(ANSWER_S + size / MIN_BYTES_PER_S, f"{path}: the remote is too slow; run it again")
                with replacing(kept) as staging, limit:
                    fs.get_file(path, str(staging))
                    if _md5(staging) != md5:
                        raise KubealignError(
                            f"{data.repo} at {data.revision}: {path} does not match its md5 {md5}: the remote is"
                            f" damaged; delete {object_path(md5)} and {object_path(expected)} in it, then"
                            f" {push_again(data.revision)}"
                        )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept, target)
    shutil.rmtree(partial, ignore_errors=True)


def _recorded_md5(fs: Any, path: str, where: str) -> str:
    """DVC's md5 of a file of a data folder.

    Raises:
        InputError: the file is in git, beside the data.
    """
    try:
        return str(fs.info(path)["dvc_info"]["md5"])
    except KeyError as error:
        raise InputError(f"{where}: {path} is committed inside a folder that DVC tracks; `git rm` it") from error


def _partial_folder(repo: str, folder: str, expected: str) -> Path:
    """Where the files of an interrupted download wait, under a name that nobody can tell from the data.

    A repository that knew it could name a file of its own there, in a setting of another library.
    """
    root = store.home() / DOWNLOADS
    root.mkdir(parents=True, exist_ok=True)
    secret = root / ".secret"
    if not secret.exists():
        with replacing(secret) as staging:
            staging.write_text(secrets.token_hex(16))
    return root / digest([secret.read_text(), repo, folder, expected])[:32]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _copy_files(source: Path, out: Path) -> None:
    """Copy a folder file by file: shutil.copytree continues on a full disk and hides the reason in a list."""
    out.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        target = out / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(path, target)


def _fetch_base(data: DataConfig, reference: str, expected: str, out: Path) -> None:
    if reference.startswith(f"{EMBEDDED}@"):
        version = data.model_copy(update={"revision": reference.partition("@")[2]})
        _copy_folder(version, embedded_model(data.path), expected, out)
    elif reference.startswith("models:/"):
        import mlflow

        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=reference))
        if (folder / STATEMENT).exists():
            where = f"model.base={reference}"
            check_files(folder, read_statement(folder, where), where)
        inner = next((path.parent for path in sorted(folder.rglob("config.json"))), None)
        if inner is None:
            raise InputError(f"model.base={reference}: no config.json in it; expected a transformers model")
        _copy_model(inner, out)
    elif reference.startswith("s3://"):
        _copy_bucket(reference.rstrip("/"), out)
        if bucket_digest(reference) != expected:
            raise InputError(f"{reference} changed while the run was starting; start it again")
    elif reference.startswith("hub:"):
        import os

        os.environ["HF_HUB_OFFLINE"] = "0"
        from huggingface_hub import snapshot_download

        name, _, revision = reference.removeprefix("hub:").partition("@")
        snapshot_download(name, revision=revision, local_dir=out, allow_patterns=[*MODEL_FILES, *ADAPTER_FILES])
    else:
        _copy_model(Path(reference), out)
        if folder_digest(Path(reference)) != expected:
            raise InputError(f"{reference} changed while the run was starting; start it again")


def _copy_model(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in _model_files((path.name for path in folder.iterdir() if path.is_file()), str(folder)):
        shutil.copyfile(folder / name, out / name)


def _copy_bucket(uri: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fs, prefix = s3_filesystem(), f"{uri.removeprefix(S3)}/"
    for name in _model_files((path.removeprefix(prefix) for path in fs.find(uri)), uri):
        fs.get_file(f"{prefix}{name}", str(inside(out, name)))


def _model_files(names: Iterable[str], base: str) -> list[str]:
    """Those of a folder's files that belong to a base model.

    Raises:
        InputError: an adapter is among them.
    """
    found = list(names)
    for name in ADAPTER_FILES:
        if name in found:
            raise InputError(f"model.base={base}: {name} makes it an adapter; merge it into its model first")
    return sorted(name for name in found if any(fnmatchcase(name, pattern) for pattern in MODEL_FILES))


def _clean_model_folder(template: str, template_date: date, base: str, folder: Path) -> None:
    """Reduce a model folder to safetensors weights and the configured chat template."""
    kept = _model_files((path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), base)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"model.base={base}: no *.safetensors; pickled weights are not loaded, convert them first")
    template_file = folder / "chat_template.jinja"
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    own = template_file.read_text(encoding="utf-8") if template_file.exists() else settings.pop("chat_template", None)
    chosen = with_date(choose_template(template, own), template_date)
    check_template(chosen)
    template_file.write_text(chosen, encoding="utf-8")
    settings.pop("chat_template", None)
    write_json(settings_file, settings)
    check_weights(folder, base)
    if template in shipped_templates():
        template_file.write_text(with_beginning(chosen, load_tokenizer(folder)), encoding="utf-8")
