"""Every command of docs/cluster.md is one that kubectl, make and kubealign know, on things that k8s/ holds."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

from components.config.params import load_config
from pipelines.cli import app
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
INLINE = re.findall(r"`((?:kubectl|kubealign) [^`]+)`", GUIDE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()] + INLINE
NOT_OURS = ("export", "docker", "cp", "rm")


def words(command: str) -> list[str]:
    return shlex.split(re.sub(r"\$\(.*?\)", "x", command))


def commands(program: str) -> list[list[str]]:
    return [words(command) for command in COMMANDS if words(command)[0] == program]


def test_every_command_is_of_a_program_that_is_checked() -> None:
    assert {words(command)[0] for command in COMMANDS} <= {"kubectl", "kubealign", "make", *NOT_OURS}
    assert len(commands("kubectl")) > 15 and len(commands("kubealign")) > 2


@pytest.mark.parametrize("command", commands("kubealign"), ids=lambda command: command[1])
def test_kubealign_knows_its_commands_options_and_settings(command: list[str]) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found = group.commands[command[1]]  # type: ignore[union-attr]
    parsed = found.make_context(command[1], command[2:], resilient_parsing=False).params
    settings: Any = parsed.get("overrides") or []
    load_config(ROOT / "params.yaml", list(settings))


def test_make_knows_its_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for command in commands("make") for word in command[1:]} <= targets
    assert set(re.findall(r"`make ([\w-]+)`", GUIDE)) <= targets


@pytest.fixture(scope="module")
def kubectl_options() -> dict[str, set[str]]:
    """The options of every subcommand that the guide uses, as kubectl itself lists them."""
    found = {}
    common = subprocess.run(["kubectl", "options"], capture_output=True, text=True, check=True).stdout
    for name in {_subcommand(command) for command in commands("kubectl")}:
        done = subprocess.run(["kubectl", *name.split(), "--help"], capture_output=True, text=True, check=True)
        assert f"kubectl {name}" in done.stdout, f"kubectl has no {name}"
        found[name] = set(re.findall(r"^\s+(?:-\w, )?(--[\w-]+)", done.stdout + common, re.MULTILINE))
    return found


def _subcommand(command: list[str]) -> str:
    plain = [word for word in command[1:] if not word.startswith("-")]
    return " ".join(plain[:2]) if plain[0] in ("create", "rollout", "set") else plain[0]


@pytest.mark.usefixtures("overlays")
def test_kubectl_knows_its_commands_and_options(kubectl_options: dict[str, set[str]]) -> None:
    for command in commands("kubectl"):
        options = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert options <= kubectl_options[_subcommand(command)], command


def test_what_the_commands_name_is_in_the_manifests(overlays: dict[str, list[dict[str, Any]]]) -> None:
    there = {f"{manifest['kind'].lower()}/{manifest['metadata']['name']}" for manifest in overlays["dev"]}
    made = {f"job/{command[-1]}" for command in commands("kubectl") if "job" in command}
    for command in commands("kubectl"):
        for word in command:
            named = re.search(r"(?:^|=)((?:deployment|statefulset|service|cronjob|job)/[\w-]+)$", word)
            assert not named or named[1] in there | made, command
            if "/" in word and word.startswith("k8s/") and "secrets.yaml" not in word:
                assert (ROOT / word).exists(), command
    assert all(Path(ROOT / "k8s" / "overlays" / name).is_dir() for name in re.findall(r"overlays/(\w+)", GUIDE))
