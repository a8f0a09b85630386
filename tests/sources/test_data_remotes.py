"""Data in git and DVC repositories: by path and URL without a git binary, from S3, bad keys, killed servers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import yaml

from components.common.errors import InputError, KubealignError
from components.common.files import folder_digest
from components.config.params import load_config
from components.fetch.stage import run_fetch
from components.sources.data import data_folders, resolve_data
from components.tracking import store
from tests.conftest import ROOT
from tests.support.remotes import FOLDER, Remote, fetch, source
from tests.support.repositories import dvc, git
from tests.support.services import S3, git_http_server, s3_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration

FILES = 4
BYTES = 24_000_000


def content(number: int, size: int) -> bytes:
    return hashlib.shake_256(str(number).encode()).digest(size)


def md5_of(number: int) -> str:
    """DVC's name of a part that is 1000 bytes long."""
    return hashlib.md5(content(number, 1000)).hexdigest()  # noqa: S324 - no secret


def make_remote(root: Path, url: str, size: int, files: int) -> Remote:
    root.mkdir(parents=True)
    git(root, "init", "-q")
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {url}\n")
    (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    names = [*data_folders(FOLDER), f"{FOLDER}/other"]
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for part in range(files if name.endswith("preferences") else 1):
            (root / name / f"part{part}.jsonl").write_bytes(content(10 * number + part, size))
    dvc(root, "add", "-q", *names)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "data")
    version = resolve_data(str(root), "HEAD", data_folders(FOLDER))
    return Remote(root, version.digests, version.commit)


def assert_whole(remote: Remote, dataset: Path, files: int, size: int) -> None:
    found = sorted(path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file())
    assert found == ["instructions/part0.jsonl", *(f"preferences/part{part}.jsonl" for part in range(files))]
    for part in range(files):
        assert (dataset / "preferences" / f"part{part}.jsonl").read_bytes() == content(part, size)


# ---- by path and URL, without git


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Remote, str]]:
    """A repository with a local DVC remote, and its address at a real git server."""
    tmp_path = tmp_path_factory.mktemp("served")
    remote = make_remote(tmp_path / "repo", str(tmp_path / "store"), 1000, 2)
    dvc(remote.root, "push", "-q")
    remote.wipe()
    with git_http_server(tmp_path) as http:
        yield remote, f"{http}/repo"


SCRIPT = """
import json, shutil, sys
from pathlib import Path
assert shutil.which("git") is None
from components.sources.data import data_folders, resolve_data
from tests.support.remotes import Remote, fetch
for number, repo in enumerate(sys.argv[2:]):
    version = resolve_data(repo, "HEAD", data_folders("corpus/pairs"))
    fetch(Remote(Path(), version.digests, version.commit), Path(sys.argv[1]) / str(number), repo)
    print(json.dumps([version.commit, version.digests]))
"""


def test_a_path_and_a_url_give_the_same_commit_digests_and_files_without_a_git_binary(
    served: tuple[Remote, str], tmp_path: Path
) -> None:
    remote, url = served
    empty = tmp_path / "no-programs"
    empty.mkdir()
    out = tmp_path / "out"
    environment = os.environ | {"PATH": str(empty), "PYTHONPATH": str(ROOT), "KUBEALIGN_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-P", "-c", SCRIPT, str(out), str(remote.root), url]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert found == [[remote.commit, remote.digests]] * 2
    for number in range(2):
        assert_whole(remote, out / str(number) / "dataset", 2, 1000)


def test_data_that_was_never_pushed_is_refused_before_a_run(tmp_path: Path) -> None:
    remote = make_remote(tmp_path / "repo", str(tmp_path / "store"), 1000, 2)
    message = rf"HEAD: the content of {FOLDER}/preferences is neither .* nor in {tmp_path}/store; `git checkout HEAD &&"
    with git_http_server(tmp_path) as http, pytest.raises(InputError, match=message):
        resolve_data(f"{http}/repo", "HEAD", data_folders(FOLDER))
    assert resolve_data(str(remote.root), "HEAD", data_folders(FOLDER)).commit == remote.commit


@pytest.mark.parametrize("name", ["store", "other"])
def test_a_version_is_found_after_its_remote_was_moved(tmp_path: Path, name: str) -> None:
    """Version 1 was pushed to A, which is B now, under the same or another name, as the last commit says."""
    remote = make_remote(tmp_path / "repo", str(tmp_path / "A"), 1000, 2)
    git(remote.root, "tag", "v1")
    dvc(remote.root, "push", "-q")
    (tmp_path / "A").rename(tmp_path / "B")
    dvc(remote.root, "remote", "add", "-q", "-f", "-d", name, str(tmp_path / "B"))
    git(remote.root, "commit", "-qam", "the remote has moved")
    remote.wipe()
    with git_http_server(tmp_path) as http:
        repos = [f"{http}/repo", f"file://{remote.root}", str(remote.root)]
        for number, repo in enumerate(repos):
            assert resolve_data(repo, "v1", data_folders(FOLDER)).digests == remote.digests
            assert_whole(remote, fetch(remote, tmp_path / str(number), repo), 2, 1000)
        (tmp_path / "B" / "files" / "md5" / md5_of(1)[:2] / md5_of(1)[2:]).unlink()
        message = (
            f"the content of {FOLDER}/preferences is neither .* nor in {tmp_path}/A or {tmp_path}/B; delete files/"
        )
        with pytest.raises(InputError, match=message):
            fetch(remote, tmp_path / "again", repos[1])


@contextmanager
def changed(remote: Remote, md5: str, content: bytes | None) -> Iterator[None]:
    """An object of the remote that has another content, or none."""
    path = remote.root.parent / "store" / "files" / "md5" / md5[:2] / md5[2:]
    right = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    yield
    path.unlink(missing_ok=True)
    path.write_bytes(right)


def test_only_what_was_asked_for_is_brought(served: tuple[Remote, str], tmp_path: Path) -> None:
    """The content of the folder beside is gone from the store: whoever touched it would fail."""
    remote, url = served
    other = yaml.safe_load((remote.root / FOLDER / "other.dvc").read_text())["outs"][0]["md5"]
    with changed(remote, other, None), changed(remote, md5_of(20), None):
        assert_whole(remote, fetch(remote, tmp_path / "out", url), 2, 1000)
    message = rf"content of corpus/pairs/preferences is neither in the DVC cache nor in {remote.root.parent}/store;"
    with changed(remote, md5_of(1), None), pytest.raises(InputError, match=message):
        fetch(remote, tmp_path / "again", url)
    assert not (tmp_path / "again" / "dataset").exists()


def test_a_damaged_object_of_the_remote_is_not_taken_for_the_data(served: tuple[Remote, str], tmp_path: Path) -> None:
    remote, url = served
    message = r"preferences/part1.jsonl does not match its md5"
    with changed(remote, md5_of(1), b"x" * 1000), pytest.raises(KubealignError, match=message):
        fetch(remote, tmp_path / "out", url)
    assert not (tmp_path / "out" / "dataset").exists()


def test_mlflow_says_where_the_data_came_from(
    served: tuple[Remote, str], tmp_path: Path, tiny_model: Path, own_home: Path, empty_mlflow: Path
) -> None:
    remote, url = served
    own_home.mkdir()
    shutil.copy(empty_mlflow, own_home)
    config = load_config(ROOT / "params.yaml")
    data = config.data.model_copy(update=source(remote, url))
    base = (config.model.chat_template, config.model.template_date, str(tiny_model), folder_digest(tiny_model))
    run_fetch(data, remote.digests, *base, tmp_path / "out" / "dataset", tmp_path / "out" / "base")
    client = store.client()
    (run,) = client.search_runs([store.experiment_id(client)])
    inputs = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {name: dataset.digest for name, dataset in inputs.items()} == {
        name: remote.digests[f"{FOLDER}/{name}"] for name in ("preferences", "instructions")
    }
    origin = json.loads(inputs["preferences"].source)
    assert origin["repo"] == url and origin["commit"] == remote.commit and origin["path"] == f"{FOLDER}/preferences"


# ---- S3


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with s3_server(tmp_path / "s3") as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def objects(s3: S3) -> dict[str, bytes]:
    """The objects of the bucket below dvc/, by the md5 that they are named by."""
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket=s3.bucket, Prefix="dvc/").get("Contents", [])
    keys = [entry["Key"] for entry in found]
    return {"".join(key.split("/")[-2:]): client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() for key in keys}


def test_pushed_wiped_and_pulled_data_is_the_same_and_a_bad_key_is_refused(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = make_remote(tmp_path / "repo", f"s3://{s3.bucket}/dvc", 100_000, 2)
    dvc(remote.root, "push", "-q")
    remote.wipe()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-key")
    with pytest.raises(
        InputError, match=r"may not be read from the DVC remote .*; check the key \(AWS_ACCESS"
    ) as error:
        fetch(remote, tmp_path / "refused")
    assert "a-wrong-key" not in str(error.value) and not (tmp_path / "refused" / "dataset").exists()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.environment["AWS_SECRET_ACCESS_KEY"])
    assert_whole(remote, fetch(remote, tmp_path / "out"), 2, 100_000)
    remote.wipe()
    dvc(remote.root, "pull", "-q")
    assert (remote.root / FOLDER / "preferences" / "part0.jsonl").read_bytes() == content(0, 100_000)


def port(s3: S3) -> int:
    return int(s3.endpoint.rpartition(":")[2])


def kill(s3: S3) -> None:
    os.killpg(s3.process.pid, signal.SIGKILL)
    s3.process.wait()


def await_and_kill(s3: S3, child: "subprocess.Popen[str]", begun: Callable[[], bool]) -> None:
    """Kill the server as soon as the transfer has brought something and before it is over."""
    wait_until(lambda: begun() or child.poll() is not None, "the transfer began", every_s=0.002)
    assert child.poll() is None, "the transfer was over before the server could be killed"
    kill(s3)


FETCH = """
import sys
from pathlib import Path
from components.sources.data import data_folders
from tests.support.remotes import FOLDER, Remote, fetch
from components.tracking.errors import report_errors
with report_errors("fetch"):
    remote = Remote(Path(sys.argv[1]), dict(zip(data_folders(FOLDER), sys.argv[3:5])), sys.argv[2])
    fetch(remote, Path(sys.argv[5]))
"""


@pytest.mark.long
def test_a_server_killed_in_mid_transfer_loses_nothing_and_shows_no_partial_file(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # how often a dead server is asked again is not what is tried here
    remote = make_remote(tmp_path / "repo", f"s3://{s3.bucket}/dvc", BYTES, FILES)
    push = [sys.executable, "-P", "-m", "dvc", "push", "-j", "1"]
    child = subprocess.Popen(push, cwd=remote.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    await_and_kill(s3, child, lambda: objects_begun(s3))
    assert child.wait(120) != 0
    with s3_server(tmp_path / "s3", port(s3)) as again:
        for md5, body in objects(again).items():
            assert hashlib.md5(body).hexdigest() == md5.removesuffix(".dir"), "a partial object is visible"  # noqa: S324
        dvc(remote.root, "push", "-q")
        remote.wipe()
        out = tmp_path / "out"
        out.mkdir()
        kept = tmp_path / "kept" / "downloads"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "KUBEALIGN_HOME": str(tmp_path / "kept")}
        words = [sys.executable, "-P", "-c", FETCH, str(remote.root), remote.commit, *remote.digests.values(), str(out)]
        child = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
        await_and_kill(again, child, lambda: any(kept.glob("*/0")))
        said, _ = child.communicate(timeout=300)
        assert child.returncode == 1, said
        assert "from the DVC remote" in said and "run it again" in said, said
        assert not (out / "dataset").exists()
        whole = [path.name for path in kept.glob("*/*")]
        assert "0" in whole and len(whole) < FILES and not any(name.startswith(".") for name in whole)
    with s3_server(tmp_path / "s3", port(s3)):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(remote, out / "dataset", FILES, BYTES)
    assert not list(kept.glob("*/*"))


def objects_begun(s3: S3) -> bool:
    found = boto3.client("s3").list_objects_v2(Bucket=s3.bucket, Prefix="dvc/")
    return int(found["KeyCount"]) > 0
