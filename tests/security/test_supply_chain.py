"""What runs is what was built: packages by hash, images by digest, and a statement on what each was built from."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from components.common.images import DATA_IMAGE, MLFLOW_IMAGE, TRAIN_IMAGE
from components.config.params import load_config
from pipelines.cli import app
from tests.conftest import ROOT
from tests.support.services import QuietHandler, serving
from tools.install_locked import locked, needed

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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def needs(name: str, extra: str) -> list[str]:
    """The requirements of a package; of one that this machine has no use for, none."""
    if name == PROJECT["name"]:
        return PROJECT["dependencies"] + EXTRAS.get(extra, [])
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def wanted(requirements: list[str]) -> set[str]:
    """Names of all installed packages that some requirements need on this machine, directly or not, as they say it
    themselves.
    """
    found: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for own in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), own
            if key not in found:
                found.add(key)
                todo += [(Requirement(text), own) for text in needs(*key)]
    return {name for name, _ in found}


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "sbom"])
def test_what_an_extra_installs_is_all_that_it_needs(extra: str) -> None:
    assert wanted([f"kubealign[{extra}]"]) - {"kubealign"} <= set(needed([extra]))


def test_the_lock_has_hashes_for_every_package_and_torch_for_cpus() -> None:
    packages = locked((ROOT / "requirements.lock").read_text())
    assert set(packages) >= set(needed([*EXTRAS])) and "triton" in needed(["train"])
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in packages.values())
    assert "triton" not in needed(["train"], {"torch": {"sympy", "filelock"}})


def wheel(folder: Path, name: str, version: str, *needs: str) -> str:
    """Write a wheel; gives its hash."""
    stem = f"{name}-{version}"
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files = {
        f"{name}.py": "",
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{stem}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in files)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Locked:
    """A project with a lock, an index of four packages, and an empty environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, folder / "index"
        for name in ("tools", "index"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "tools" / "install_locked.py", folder / "tools")
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "x"\ndependencies = ["branch"]\n'
            'optional-dependencies = { all = ["torch", "x[z]"], z = [] }\n'
        )
        self.lock("2.0", cuda=True)

    def lock(self, torch: str, cuda: bool) -> None:
        blocks = {
            "branch==1.0": (wheel(self.index, "branch", "1.0", "leaf"), "x (pyproject.toml)"),
            "leaf==1.0": (wheel(self.index, "leaf", "1.0"), "branch"),
            "cuda==3.0": (wheel(self.index, "cuda", "3.0"), "torch"),
            "torch==2.0": (wheel(self.index, "torch", torch, *(["cuda==3"] if cuda else [])), "x (pyproject.toml)"),
        }
        lines = [
            f"{name} \\\n    --hash=sha256:{digest}\n    # via {by}\n    # for all\n"
            for name, (digest, by) in blocks.items()
        ]
        (self.folder / "requirements.lock").write_text("".join(lines))

    def install(self) -> "subprocess.CompletedProcess[str]":
        venv = self.folder / "venv"
        shutil.rmtree(venv, ignore_errors=True)
        python = sys.executable if importlib.util.find_spec("pip") else sys._base_executable
        subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
        program = [python, str(self.folder / "tools" / "install_locked.py"), "all", "--venv", str(venv)]
        environment = {
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)

    def installed(self) -> set[str]:
        return {path.stem for path in self.folder.glob("venv/lib/*/site-packages/*.py")}


def test_the_build_of_torch_that_pip_takes_decides_on_cuda(tmp_path: Path) -> None:
    project = Locked(tmp_path)
    assert project.install().returncode == 0 and project.installed() == {"branch", "leaf", "torch", "cuda"}
    project.lock("2.0+cpu", cuda=False)
    assert project.install().returncode == 0 and project.installed() == {"branch", "leaf", "torch"}


@pytest.mark.parametrize("name", ["leaf", "torch"])
def test_a_package_of_another_hash_is_not_installed(tmp_path: Path, name: str) -> None:
    project = Locked(tmp_path)
    (path,) = project.index.glob(f"{name}-*")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("evil.py", "")
    done = project.install()
    assert done.returncode != 0 and name in done.stderr.lower()
    assert not project.installed() & {"leaf" if name == "leaf" else "torch", "evil"}
