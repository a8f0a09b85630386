"""Names that others chose (in buckets, manifests, lists of the data) never lead out of the folder they are for."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from components.common import files
from components.common.errors import InputError, KubealignError
from components.common.files import MANIFEST, inside, verify_manifest, write_manifest
from components.tracking import storage
from components.training.checkpoint_mirror import Mirror
from tests.support.services import S3, s3_server

pytestmark = pytest.mark.integration

HOSTILE = [
    "../../escaped",
    "/tmp/escaped",  # noqa: S108 - an attacker's
    "a/../../escaped",
    "..",
    "a//b",
    "",
    "a/./b",
    "a\\..\\b",
    "a\nb",
    "a\x00b",
    "a/\u202eb",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a name of a file below"):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["model.safetensors", "model/config.json", ".gitkeep", "数据/行.jsonl", "a..b", "-x"])
def test_an_ordinary_name_is_accepted(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc")
    with pytest.raises(InputError):
        inside(tmp_path / "in", "link/passwd")


def written(folder: Path) -> Path:
    """A folder as a step writes it."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("text", ["{}", "[]", "null", '"x"', '{"weights": 1}', '{"weights": "zz"}', "{"])
def test_a_manifest_that_names_nothing_is_no_manifest(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path / "folder")
    (folder / "weights").unlink()
    (folder / MANIFEST).write_text(text)
    with pytest.raises(KubealignError, match=MANIFEST):
        verify_manifest(folder)
    with pytest.raises(KubealignError, match=MANIFEST):
        storage.download(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSTILE[:3])
def test_a_manifest_with_a_hostile_name_stops_the_run(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "folder")
    hashes = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(hashes | {name: "0" * 64}))
    with pytest.raises(InputError, match="not a name"):
        verify_manifest(folder)


def test_a_volume_gives_no_file_of_this_machine_by_a_link(tmp_path: Path) -> None:
    """Whoever may write to the shared volume may plant a link to a secret, and know its hash or not."""
    (tmp_path / "secret").write_text("s3cr3t")
    folder = written(tmp_path / "volume")
    (folder / "cache").symlink_to(tmp_path)
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(KubealignError):
        storage.download(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a real bucket


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


class Bucket:
    """What s3fs shows of a bucket into which an attacker has put a key that no client of ours would write.

    SeaweedFS folds `..` in the keys that it is given; S3 itself keeps them.
    """

    def __init__(self, fs: object, location: str, hostile: str) -> None:
        self._fs, self._location, self._hostile = fs, location, hostile

    def find(self, location: str) -> list[str]:
        found: list[str] = self._fs.find(location)  # type: ignore[attr-defined]
        return [*found, f"{self._location}/{self._hostile}"]

    def get_file(self, path: str, target: str) -> None:
        if path.endswith(self._hostile):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_text("of the attacker")
        else:
            self._fs.get_file(path, target)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._fs, name)


@pytest.mark.parametrize("key", ["../../x", "/{out}/x", "a/../../../x", "weights2"])
def test_a_key_in_a_bucket_writes_nothing_outside_and_nothing_unlisted(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    location = f"s3://{s3.bucket}/folder"
    storage.upload(written(tmp_path / "folder"), location)
    storage.download(location, tmp_path / "sound")
    real, hostile = storage.s3_filesystem, key.replace("{out}", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(storage, "s3_filesystem", lambda: Bucket(real(), f"{s3.bucket}/folder", hostile))
    with pytest.raises(InputError, match="not a name|not in its manifest"):
        storage.download(location, tmp_path / "deep" / "down" / "out")
    assert [path.name for path in tmp_path.rglob("x")] == []
    assert not (tmp_path / "deep" / "down" / "out").exists()


def test_without_the_check_the_key_writes_outside(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"s3://{s3.bucket}/folder"
    storage.upload(written(tmp_path / "folder"), location)
    real = storage.s3_filesystem
    monkeypatch.setattr(storage, "s3_filesystem", lambda: Bucket(real(), f"{s3.bucket}/folder", "../../x"))
    monkeypatch.setattr(storage, "check_listed", lambda *arguments: None)
    monkeypatch.setattr(storage, "inside", lambda folder, name: folder / name)
    with pytest.raises(InputError):  # it is not among the hashes, but by then it is written
        verify = storage.verify_manifest
        monkeypatch.setattr(storage, "verify_manifest", lambda folder: inside(folder, "../../x") or verify(folder))
        storage.download(location, tmp_path / "deep" / "down" / "out")
    assert (tmp_path / "deep" / "x").exists()


@pytest.mark.parametrize("key", ["step-1//{out}/x", "step-1/../../x", "../checkpoint/manifest.json", "step-1/unlisted"])
def test_a_checkpoint_in_a_bucket_writes_nothing_outside(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    prefix = f"state-{abs(hash(key))}"
    monkeypatch.setenv("KUBEALIGN_STATE", f"s3://{s3.bucket}/{prefix}")
    where = f"{s3.bucket}/{prefix}/sft/key"
    local = tmp_path / "checkpoints" / "sft" / "key"
    local.mkdir(parents=True)
    client = boto3.client("s3")
    sound = written(tmp_path / "step-1")
    for path in sound.iterdir():
        client.upload_file(str(path), s3.bucket, f"{prefix}/sft/key/step-1/{path.name}")
    mirror = Mirror(local)
    mirror.download()
    assert (local / "step-1" / "weights").read_text() == "w"
    shutil.rmtree(local / "step-1")
    mirror.fs = Bucket(mirror.fs, where, key.replace("{out}", str(tmp_path / "elsewhere")))
    with pytest.raises((InputError, FileNotFoundError)) as error:
        mirror.download()
    assert isinstance(error.value, InputError), error.value
    assert list(tmp_path.rglob("x")) == [] and {path.name for path in local.iterdir()} <= {"step-1"}


# ---- DVC's list of a folder's files


def hostile_list(root: Path, entries: list[str]) -> None:
    """Replace the list of the files of data/preferences by one with these names, in the remote and in git."""
    import hashlib

    from tests.support.repositories import git

    store = next(root.parent.glob("store"), None) or Path(
        (root / ".dvc" / "config").read_text().rpartition("url = ")[2].strip()
    )
    content = hashlib.md5(b"data/preferences\n").hexdigest()  # noqa: S324 - DVC's
    listed = json.dumps([{"md5": content, "relpath": name} for name in entries]).encode()
    md5 = f"{hashlib.md5(listed).hexdigest()}.dir"  # noqa: S324
    target = store / "files" / "md5" / md5[:2] / md5[2:]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(listed)
    record = root / "data" / "preferences.dvc"
    old = next(line for line in record.read_text().splitlines() if ".dir" in line).rpartition(" ")[2]
    record.write_text(record.read_text().replace(old, md5))
    git(root, "commit", "-qam", "hostile")


@pytest.mark.parametrize("name", [*HOSTILE[:3], "a\\..\\..\\x", "x\ny"])
def test_a_list_of_files_in_the_data_leads_nowhere(tmp_path: Path, own_home: Path, name: str) -> None:
    from components.config.data import DataConfig
    from components.fetch.stage import fetch_data
    from components.sources.data import data_folders, resolve_data
    from tests.support.hostile import data_repository

    root = data_repository(tmp_path / "repo")
    hostile_list(root, ["train.jsonl", name])
    before = set(os.listdir("/tmp"))  # noqa: S108, PTH208
    try:
        version = resolve_data(str(root), "HEAD", data_folders("data"))
        fetch_data(DataConfig(repo=str(root), revision=version.commit), version.digests, tmp_path / "out" / "dataset")
    except Exception as error:
        assert isinstance(error, KubealignError | RecursionError), repr(error)
    assert not list(tmp_path.rglob("escaped")) and "escaped" not in set(os.listdir("/tmp")) - before  # noqa: S108, PTH208
    assert not (tmp_path / "out" / "dataset").exists()


def test_the_data_cannot_tell_where_its_downloads_wait(tmp_path: Path, own_home: Path) -> None:
    from components.fetch.stage import _partial_folder

    first = _partial_folder("repo", "data/preferences", "0" * 32 + ".dir")
    assert first == _partial_folder("repo", "data/preferences", "0" * 32 + ".dir"), "a download resumes"
    assert "0" * 8 not in first.name and first.parent == own_home / "downloads"
    shutil.rmtree(own_home)
    assert first != _partial_folder("repo", "data/preferences", "0" * 32 + ".dir"), "the same on another machine"


def test_every_reader_of_foreign_names_uses_the_one_function() -> None:
    """Who takes names from a bucket, a manifest or DVC goes through `inside`."""
    import inspect

    from components.fetch import stage
    from components.training import checkpoint_mirror

    for module in (storage, checkpoint_mirror, stage):
        assert module.inside is files.inside and "inside(" in inspect.getsource(module)
