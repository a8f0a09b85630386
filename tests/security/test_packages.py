"""Packages of data/sources.lock are bytes with a hash: fetched as files, nothing of them is built or run."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from components.common.errors import InputError
from components.common.files import sha256_file
from components.prepare import package_index
from components.prepare.sources import Package, Sources, unpack
from tests.support.services import QuietHandler, serving

pytestmark = pytest.mark.integration

FILE = "evil_pkg-1.0.tar.gz"
HTML, JSON = "text/html", package_index.JSON


def sdist(mark: Path) -> bytes:
    """A source package whose build backend leaves the environment's secrets behind."""
    files = {
        "pairs.json": "[]",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": f"import os\nopen({str(mark)!r}, 'w').write(str(dict(os.environ)))\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: evil-pkg\nVersion: 1.0\n",
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"evil_pkg-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


@contextmanager
def index(content: bytes, kind: str = HTML, link: str = f"/files/{FILE}") -> Iterator[str]:
    """A package index with one file, as PEP 503 or PEP 691 has it."""
    page = (
        f'<a href="{link}#sha256={"0" * 64}">{FILE}</a>'
        if kind == HTML
        else f'{{"files": [{{"filename": "{FILE}", "url": "{link}"}}]}}'
    )

    class Handler(QuietHandler):
        def answer(self) -> None:
            body = {"/simple/evil-pkg/": page.encode(), f"/files/{FILE}": content}.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Type", kind if self.path.startswith("/simple") else "application/gzip")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        do_GET = answer

    with serving(Handler) as address:
        yield f"{address}/simple"


def lock(content: bytes, file: str = FILE) -> Sources:
    package = Package(version="1.0", file=file, sha256=hashlib.sha256(content).hexdigest())
    member = {
        "package": "evil_pkg",
        "member": "evil_pkg-1.0/pairs.json",
        "sha256": hashlib.sha256(b"[]").hexdigest(),
        "license": "none",
    }
    raw = {"packages": {"evil_pkg": package.model_dump()}, "model": member}
    return Sources.model_validate(raw | {"preferences": {"p": member}, "instructions": {}, "added": {}})


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the index that PIP_INDEX_URL names."""
    monkeypatch.setattr(package_index, "_pip_settings", lambda: {"index-url": os.environ["PIP_INDEX_URL"]})


@pytest.mark.parametrize("kind", [HTML, JSON])
def test_a_source_package_is_unpacked_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, only: None
) -> None:
    mark = tmp_path / "mark"
    content = sdist(mark)
    with index(content, kind) as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        found = lock(content)
        unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "[]" and not mark.exists()
    assert sha256_file(tmp_path / "downloads" / FILE) == found.packages["evil_pkg"].sha256


@pytest.mark.parametrize("setting", ["find-links", "index"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_folder_that_pip_is_configured_with_is_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, damaged: bool
) -> None:
    """For machines without a network; what lies there must have the hash too."""
    content = sdist(tmp_path / "mark")
    folder = tmp_path / "wheels" if setting == "find-links" else tmp_path / "simple" / "evil-pkg"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content + b"x" * damaged)
    settings = {"index-url": f"file://{tmp_path}/simple"}
    if setting == "find-links":
        settings["find-links"] = f"{tmp_path}/nowhere {folder}"
    monkeypatch.setattr(package_index, "_pip_settings", lambda: settings)
    found = lock(content)
    if damaged:
        with pytest.raises(InputError, match="its hash"):
            unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")
        return
    unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "[]" and not (tmp_path / "mark").exists()


def test_pip_would_have_run_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = sdist(mark)
    with index(content) as address:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--isolated", "--no-build-isolation"]
        command += ["--require-hashes", "-r", str(tmp_path / "r.txt"), "-d", str(tmp_path)]
        page = address.rpartition("/simple")[0] + f"/files/{FILE}"
        (tmp_path / "r.txt").write_text(f"{page} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
        environment = os.environ | {"KEY": "s3cr3t", "PIP_CONFIG_FILE": os.devnull}
        subprocess.run(command, env=environment, capture_output=True, check=False)
    assert "s3cr3t" in mark.read_text()


def test_a_file_with_another_hash_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: None) -> None:
    content = sdist(tmp_path / "mark")
    with index(content + b"x") as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        found = lock(content)
        with pytest.raises(InputError, match=rf"{FILE}: cannot be downloaded.*hash"):
            unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists() and not list((tmp_path / "downloads").iterdir())


@pytest.mark.parametrize(
    "link", ["http://127.0.0.2:1/x/" + FILE, "file:///etc/" + FILE, "ftp://127.0.0.1/" + FILE, "//127.0.0.3:9/" + FILE]
)
def test_an_index_leads_nowhere_else_without_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: None, link: str
) -> None:
    content = sdist(tmp_path / "mark")
    with index(content, HTML, link) as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        found = lock(content)
        with pytest.raises(InputError, match="not https"):
            unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")


def test_a_page_or_a_file_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: None) -> None:
    content = sdist(tmp_path / "mark")
    found = lock(content)
    for limit in ("MAX_PAGE_BYTES", "MAX_FILE_BYTES"):
        with index(content) as address, monkeypatch.context() as patch:
            patch.setenv("PIP_INDEX_URL", address)
            patch.setattr(package_index, limit, 10)
            with pytest.raises(InputError, match="longer than|is longer"):
                unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")


@pytest.mark.parametrize("name", ["../x.tar.gz", "/tmp/x.tar.gz", "a\\x.whl"])  # noqa: S108
def test_the_file_of_a_package_has_a_plain_name(tmp_path: Path, name: str) -> None:
    found = lock(b"x", name)
    with pytest.raises(InputError, match="not a name"):
        unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")


def test_a_message_names_no_password_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: None) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:s3cr3t@127.0.0.1:9/simple")
    found = lock(b"x")
    with pytest.raises(InputError, match="cannot be downloaded") as error:
        unpack(found, found.model, tmp_path / "downloads", tmp_path / "out.json")
    assert "s3cr3t" not in str(error.value)
