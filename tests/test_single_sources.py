"""What is written once: the version in pyproject.toml, the quiet environment in pipelines/quiet.env."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.common import images
from pipelines.quiet import AWS_FILES, QUIET
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE = re.compile(r"kubealign/(?:python-data|python-train|mlflow):([\w.-]+)")
OVERLAY = re.compile(r"name: kubealign/[\w-]+\n(?:\s+newName: .*\n)?\s+newTag: (\S+)")
GENERATED = "golden"
STATED = {name: value for name, value in QUIET.items() if name not in AWS_FILES}
"""The quiet environment as quiet.env states it."""
SEVERAL = 3
"""Settings of the quiet environment that make a copy of it; a file may have a reason for one or two."""


def tracked() -> Iterator[tuple[Path, str]]:
    """The project's text files, but for those that a command writes."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for path in (ROOT / name for name in names if name and GENERATED not in name):
        if path.suffix in (".py", ".sh", ".yaml", ".yml", ".toml", ".md", ".env", "") and path.is_file():
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def test_images_have_the_version_of_pyproject() -> None:
    assert images.VERSION == VERSION and images.TRAIN_IMAGE.endswith(f":{VERSION}")


def test_every_image_that_a_manifest_or_a_document_names_has_the_version_of_pyproject() -> None:
    found = {
        f"{path}: {match[0]}": match[1]
        for path, text in tracked()
        for pattern in (IMAGE, OVERLAY)
        for match in pattern.finditer(text)
    }
    assert sum(name.startswith("k8s/") for name in found) >= 6
    assert not {name for name, version in found.items() if version != VERSION}, f"expected {VERSION} everywhere"


def test_the_changelog_begins_with_the_version_of_pyproject() -> None:
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION  # type: ignore[index]


def settings(text: str) -> dict[str, str]:
    """Settings of the quiet environment that a text makes: in Python, YAML, a shell or a Containerfile."""
    names = "|".join(QUIET)
    return dict(re.findall(rf"\b({names})[\"']?(?:\s*:?=\s*|: |\", )[\"']?([\w./]+)", text))


def test_the_images_have_the_quiet_environment() -> None:
    """A Containerfile reads no file for its ENV."""
    in_images = settings((ROOT / "components" / "Containerfile").read_text())
    assert in_images == STATED | dict.fromkeys(AWS_FILES, "/etc/empty.cfg")


def test_no_other_file_repeats_the_quiet_environment() -> None:
    own = {Path("components/Containerfile"), Path("pipelines/quiet.env")}
    copies = {str(path): sorted(settings(text)) for path, text in tracked() if path not in own}
    assert not {path: names for path, names in copies.items() if len(names) >= SEVERAL}


def test_a_copy_of_the_quiet_environment_would_be_found() -> None:
    python = "".join(f'    "{name}": "{value}",\n' for name, value in STATED.items())
    make = "".join(f"export {name} := {value}\n" for name, value in STATED.items())
    assert settings(python) == settings(make) == STATED


def test_make_exports_the_quiet_environment_unless_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"include {ROOT}/Makefile\nshow:\n\t@env\n")
    command = ["make", "-s", "-f", str(tmp_path / "Makefile"), "show"]
    environment = {"PATH": "/usr/bin:/bin", "TRANSFORMERS_VERBOSITY": "info"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {name: found[name] for name in STATED} == STATED | {"TRANSFORMERS_VERBOSITY": "info"}
