"""What runs is what was built: images by digest, and a statement on what each was built from."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.common.images import DATA_IMAGE, MLFLOW_IMAGE, TRAIN_IMAGE
from components.config.params import load_config
from pipelines.cli import app
from tests.conftest import ROOT
from tests.support.services import QuietHandler, serving

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def docker_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, list[str]]], None]]:
    """A container engine with some images; gives what sets their digests."""
    images: dict[str, list[str]] = {}

    class Handler(QuietHandler):
        def answer(self) -> None:
            name = self.path.partition("/images/")[2].removesuffix("/json")
            found: Any = {"ApiVersion": "1.45"}
            if name:
                found = {"Id": DIGEST, "RepoDigests": images[name]} if name in images else {"message": "No such image"}
            body = json.dumps(found).encode()
            self.send_response(404 if name and name not in images else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = answer

    with serving(Handler) as address:
        monkeypatch.setenv("DOCKER_HOST", address.replace("http://", "tcp://"))
        yield images.update


def test_pushed_images_are_printed_by_digest_and_taken_as_setting(
    docker_with: Callable[[dict[str, list[str]]], None],
) -> None:
    names = [DATA_IMAGE, TRAIN_IMAGE, MLFLOW_IMAGE]
    pushed = [f"{name.rpartition(':')[0]}@{DIGEST}" for name in names]
    docker_with({name: [f"mirror.example.com/x@{DIGEST}", by] for name, by in zip(names, pushed, strict=True)})
    done = CliRunner().invoke(app, ["images", "--digest"], catch_exceptions=False)
    assert done.output.split() == pushed
    config = load_config(ROOT / "params.yaml", [f"cluster.data_image={pushed[0]}", f"cluster.train_image={pushed[1]}"])
    assert config.cluster.data_image == pushed[0]


@pytest.mark.parametrize(
    ("images", "word"),
    [
        ({DATA_IMAGE: []}, "docker push"),
        ({DATA_IMAGE: [f"mirror.example.com/x@{DIGEST}"]}, "docker push"),
        ({}, "make images"),
    ],
)
def test_an_image_that_no_registry_has_gets_no_digest(
    docker_with: Callable[[dict[str, list[str]]], None], images: dict[str, list[str]], word: str
) -> None:
    from components.common.errors import InputError

    docker_with(images)
    with pytest.raises(InputError, match=f"{DATA_IMAGE}.*{word}"):
        CliRunner().invoke(app, ["images", "data", "--digest"], catch_exceptions=False)


ENGINE = """#!{python}
import json, sys
images = json.load(open({images!r}))
if sys.argv[1:3] != ["image", "inspect"] or sys.argv[3] not in images:
    sys.exit("no such image")
print(json.dumps([images[sys.argv[3]]]))
"""
LABELS = {
    "org.opencontainers.image.source": "https://git.example.com/kubealign",
    "org.opencontainers.image.revision": "c" * 40,
    "kubealign.code": "0123456789abcdef",
}


def provenance(folder: Path, images: dict[str, Any], base: str) -> "subprocess.CompletedProcess[str]":
    """What `make images` would say of the image x:1."""
    (folder / "images.json").write_text(json.dumps(images))
    engine = folder / "engine"
    engine.write_text(ENGINE.format(python=sys.executable, images=str(folder / "images.json")))
    engine.chmod(0o755)
    (folder / "sbom.json").write_text("{}")
    words = [sys.executable, str(ROOT / "tools" / "image_provenance.py"), "x:1", "--target", "data", "--base", base]
    words += ["--engine", str(engine), "--sbom", str(folder / "sbom.json")]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("base", "known", "digest"),
    [("python:3.11", [f"python@{DIGEST}"], DIGEST), (f"python@{DIGEST}", None, DIGEST), ("python:3.11", None, None)],
)
def test_an_image_has_a_statement_on_what_it_was_built_from(
    tmp_path: Path, base: str, known: list[str] | None, digest: str | None
) -> None:
    """A base image whose digest nobody tells has none there, rather than a made-up one."""
    images: dict[str, Any] = {"x:1": {"Id": "sha256:" + "1" * 64, "Config": {"Labels": LABELS}}}
    images |= {base: {"Id": "x", "RepoDigests": known, "Config": {}}} if known else {}
    found = json.loads(provenance(tmp_path, images, base).stdout)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    assert found["subject"] == [{"name": "x:1", "digest": {"sha256": "1" * 64}}]
    definition, details = found["predicate"]["buildDefinition"], found["predicate"]["runDetails"]
    source, base_image, *files = definition["resolvedDependencies"]
    assert source["digest"] == {"gitCommit": "c" * 40} and source["uri"] == "git+https://git.example.com/kubealign"
    assert base_image.get("digest") == (digest and {"sha256": digest.removeprefix("sha256:")})
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert {"uri": "file:requirements.lock", "digest": {"sha256": lock}} in files
    assert details["byproducts"] == [{"name": "sbom.json", "digest": {"sha256": hashlib.sha256(b"{}").hexdigest()}}]


def test_an_image_that_is_not_there_has_no_statement(tmp_path: Path) -> None:
    done = provenance(tmp_path, {}, "python:3.11")
    assert done.returncode == 1 and not done.stdout and "x:1" in done.stderr


def test_updates_of_packages_images_and_actions_are_proposed() -> None:
    import yaml

    file = ROOT / ".github" / "dependabot.yml"
    words = [
        str(Path(sys.executable).with_name("check-jsonschema")),
        "--builtin-schema",
        "vendor.dependabot",
        str(file),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    updates = yaml.safe_load(file.read_text(encoding="utf-8"))["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "docker", "github-actions"}
    for update in updates:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.lstrip("/")).is_dir()
