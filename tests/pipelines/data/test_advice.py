"""Every command and option that a message about data advises is followed as it reads, and helps.

A situation has a cause; the message carries the advice, which is read from it, not typed again; then the same command
goes on. The last test finds advice in the source that no situation shows.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from typer.testing import CliRunner

from components.common.errors import InputError, KubealignError
from components.common.files import sha256_file
from components.config.data import DataConfig
from components.config.params import load_config
from components.dataset.records import read_lines
from components.fetch.stage import fetch_data
from components.prepare.sources import Added, record_added
from components.prepare.stage import prepare_data
from components.sources.data import data_folders, resolve_data
from components.stages import STAGE_NAMES
from components.tracking.run import NoOpRun
from components.validate.stage import check_rows, refusals, summarize
from pipelines import git as pipelines_git
from pipelines.cli import app
from pipelines.platform import check
from tests.conftest import ROOT
from tests.support.data_project import kubealign, make_project, rows, write
from tests.support.repositories import dvc, git

pytestmark = pytest.mark.integration

ROOMS = (
    *(f"components/{room}" for room in ("prepare", "dataset", "sources", "config")),
    *(f"components/{stage}" for stage in STAGE_NAMES[: STAGE_NAMES.index("sft")]),
    *("pipelines/data", "pipelines/commands/data.py", "pipelines/git.py", "pipelines/platform.py"),
)
ADVICE = re.compile(
    r"`((?:dvc|git|kubealign|make|pip|iconv|jq|rm) [^`]+)`"  # a command in back quotes
    r"|^ +((?:git|dvc) .+)$"  # a command on a line of its own
    r"|(?<![\w`-])(--[a-z][a-z-]*)(?![\w=-])",  # an option
    re.MULTILINE,
)
CLUSTER = ("cluster.mlflow_uri=http://mlflow:5000", "data.repo=https://git.example.com/a.git", "data.revision=main")
NOT_FOLLOWED = {
    "components/prepare/files.py: git lfs pull": "Git LFS is not among the programs of the tests",
    "components/dataset/chat.py: --set": "said by a step; tests/security/test_settings.py names the file",
} | dict.fromkeys(
    (
        "components/fetch/stage.py: git rm",
        "components/sources/remotes.py: dvc add",
        "components/sources/remotes.py: dvc config --local",
        "components/sources/remotes.py: git rm --cached",
    ),
    "said of a data repository that oversteps, to its owner",
)
"""Advice that no situation shows, and why."""
SHOWN: set[str] = set()

T = TypeVar("T", bound=Callable[..., object])


def shows(*advice: str) -> Callable[[T], T]:
    """Name the advice that a situation shows: file and command, as they stand in the source."""
    SHOWN.update(advice)
    return lambda situation: situation


def follow(root: Path, message: str, start: str) -> str:
    """Run the command of a message that begins so, in a folder, as somebody does who copies it."""
    found = {command for command in re.findall(r"`([^`]+)`", message) if command.startswith(start)}
    assert len(found) == 1, message
    return execute(root, found.pop())


def execute(root: Path, command: str) -> str:
    identity = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | identity | {"GIT_EDITOR": "echo a message >", "COLUMNS": "200"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{command}"],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose only data, a team's, is committed and pushed; without the stage that downloads a model."""
    folder = tmp_path_factory.mktemp("base")
    root = make_project(folder / "project")
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    del stages["stages"]["base_model"]
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEALIGN_HOME", str(root / ".kubealign"))
        team = write(folder / "team.jsonl", rows(*range(30)))
        done = kubealign(root, "add", str(team), "--licence", "MIT", "--yes")
    assert done.returncode == 0, done.stderr
    git(root, "add", "-A")
    git(root, "commit", "-qm", "the team's pairs")
    git(root, "tag", "v1")
    dvc(root, "push", "-q")
    return root


@pytest.fixture
def project(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    shutil.copytree(base, root, symlinks=True)
    monkeypatch.setenv("KUBEALIGN_HOME", str(root / ".kubealign"))
    return root


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return write(tmp_path / "more.jsonl", rows(*range(40, 70)))


def asked(root: Path, file: Path, *words: str, licence: str = "MIT") -> str:
    """What `kubealign data add` says in the end; that it asks for confirmation means that it goes on."""
    return kubealign(root, "add", str(file), *(["--licence", licence] if licence else []), *words).stderr


def goes_on(message: str) -> bool:
    return "confirmation needed" in message


# ---- the project's state


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def put_before(path: Path, text: str) -> None:
    path.write_text(text + path.read_text())


def lose_rows(root: Path) -> None:
    """The team's rows are gone, and DVC cannot tell where they would be."""
    shutil.rmtree(root / "data" / "added" / "team")
    shutil.rmtree(root / ".dvc" / "cache")


STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no sources.lock": (lambda root: (root / "data/sources.lock").unlink(), "git checkout"),
    "no sources.lock in the index": (lambda root: git(root, "rm", "-q", "-f", "data/sources.lock"), "git checkout"),
    "statistics of another kind": (lambda root: (root / "data/statistics.json").write_text("{}"), "git checkout"),
    "statistics with a conflict": (lambda root: put_before(root / "data/statistics.json", "<<<<<<< a\n"), "git check"),
    "rows changed by hand": (lambda root: append(root / "data/added/team/pairs.jsonl", "{}\n"), "dvc pull --force"),
    "no data": (lambda root: shutil.rmtree(root / "data" / "preferences"), "dvc pull"),
}


@shows(
    "components/prepare/sources.py: git checkout HEAD -- {path}",
    "components/dataset/distribution.py: git checkout HEAD -- {path}",
    "components/prepare/sources.py: dvc pull --force {path.parent}.dvc",
    "components/dataset/records.py: dvc pull",
)
@pytest.mark.parametrize("name", STATES)
def test_a_state_of_the_project_is_mended_by_the_command_in_the_message(project: Path, more: Path, name: str) -> None:
    cause, start = STATES[name]
    cause(project)
    message = asked(project, more)
    assert str(project / "data") in message and "add-" not in message, "it names the file, not a copy of it"
    follow(project, message, start)
    assert goes_on(asked(project, more))


@shows("components/dataset/records.py: dvc repro")
def test_data_that_was_never_pushed_is_made_again(project: Path, more: Path) -> None:
    for gone in ("data/preferences", ".kubealign/remote", ".dvc/cache"):
        shutil.rmtree(project / gone)
    assert "workspace" not in git(project, "status", "--porcelain")
    with pytest.raises(InputError) as error:
        resolve_data(str(project), "workspace", data_folders("data"))
    follow(project, str(error.value), "dvc repro")
    assert resolve_data(str(project), "workspace", data_folders("data")).clean
    assert goes_on(asked(project, more))


@pytest.mark.long  # it makes all data anew
@shows(
    "components/prepare/sources.py: dvc pull",
    "components/prepare/sources.py: kubealign data remove {path.parent.name}",
    "pipelines/commands/data.py: --yes",
)
def test_rows_that_are_lost_for_good_are_taken_out(project: Path, more: Path, tmp_path: Path) -> None:
    done = kubealign(project, "add", str(more), "--licence", "MIT", "--yes")
    assert done.returncode == 0, done.stderr
    (lost,) = yaml.safe_load((project / "data/added/team.dvc").read_text())["outs"]
    for folder in (".dvc/cache", ".kubealign/remote", "data/added/team"):
        shutil.rmtree(project / folder)
    again = write(tmp_path / "again.jsonl", rows(*range(80, 90)))
    message = asked(project, again)
    why = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "pull"], cwd=project, capture_output=True, text=True, check=False
    )
    assert re.findall("`dvc pull` shows why", message) and lost["md5"] in why.stdout + why.stderr
    (command,) = re.findall("`(kubealign data remove .*?)`", message)
    question = kubealign(project, *command.split()[2:])
    assert "removes the source team" in question.stdout
    (yes,) = re.findall(r"--\w+", question.stderr)
    gone = kubealign(project, *command.split()[2:], yes)
    assert gone.returncode == 0, gone.stderr
    assert goes_on(asked(project, again))


@shows("components/prepare/split.py: dvc repro")
def test_a_conflict_in_the_splits_is_settled(project: Path, more: Path) -> None:
    lock = project / "data" / "splits.lock"
    lines = lock.read_text().splitlines(keepends=True)
    theirs = lines[-1].replace("train", "test") if "train" in lines[-1] else re.sub(r"\w+$", "train", lines[-1])
    lock.write_text("".join([*lines[:-1], "<<<<<<< HEAD\n", lines[-1], "=======\n", theirs, ">>>>>>> theirs\n"]))
    message = asked(project, more)
    assert f"{lock}:" in message and "keep the lines of both sides without the markers" in message
    lock.write_text("".join([*lines, theirs]))
    follow(project, message, "dvc repro")
    assert len(lock.read_text().splitlines()) == len(lines)
    assert goes_on(asked(project, more))


@pytest.mark.long  # it makes all data anew
@shows(
    "components/prepare/stage.py: kubealign data add",
    "pipelines/data/add.py: rm \\1",
    "pipelines/data/add.py: dvc {' '.join(args)}",
)
def test_a_project_without_pairs_gets_some_though_a_lock_of_dvc_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path, more: Path
) -> None:
    root = make_project(tmp_path / "empty")
    monkeypatch.setenv("KUBEALIGN_HOME", str(root / ".kubealign"))
    shutil.copy(base / "dvc.yaml", root)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "repro"], cwd=root, capture_output=True, text=True, check=False
    )
    (command,) = re.findall("`(kubealign data add)`", done.stdout + done.stderr)
    words = [*command.split()[2:], str(more), "--licence", "MIT", "--yes"]
    (root / ".dvc" / "tmp" / "rwlock").write_text('{"x": [')
    stopped = kubealign(root, *words)
    assert stopped.returncode == 1
    follow(root, stopped.stderr, "rm ")
    done = kubealign(root, *words)
    assert done.returncode == 0, done.stderr
    execute(root, "dvc repro")


@shows("pipelines/data/add.py: git rm -r --cached \\1")
def test_rows_that_git_has_are_left_to_dvc(project: Path, tmp_path: Path) -> None:
    git(project, "add", "-f", "data/added/team/pairs.jsonl")
    git(project, "commit", "-qm", "by mistake")
    team = write(tmp_path / "team.jsonl", rows(*range(31)))
    words = ("add", str(team), "--licence", "MIT", "--yes")
    stopped = kubealign(project, *words)
    assert stopped.returncode == 1
    follow(project, stopped.stderr, "git rm")
    done = kubealign(project, *words)
    assert done.returncode == 0, done.stderr
    assert "pairs.jsonl" not in git(project, "ls-files", "data")


@shows(
    "pipelines/commands/data.py: git add data dvc.lock",
    "pipelines/commands/data.py: git commit && dvc push",
)
def test_a_version_is_kept_as_the_last_line_says(project: Path, more: Path) -> None:
    done = kubealign(project, "add", str(more), "--licence", "MIT", "--yes")
    assert done.returncode == 0, done.stderr
    execute(project, "\n".join(re.findall(r"^ +((?:git|dvc) .*)$", done.stdout, re.MULTILINE)))
    assert not git(project, "status", "--porcelain")
    shutil.rmtree(project / ".dvc" / "cache")
    assert kubealign(project, "diff", "HEAD", "workspace").stdout.strip() == "HEAD and workspace hold the same rows"
    log = json.loads(kubealign(project, "log", "--json").stdout)
    assert [entry["added"] for entry in log] == [["more", "team"], ["team"]]


@shows(
    "pipelines/commands/data.py: git add data dvc.lock && git commit",
    "pipelines/commands/data.py: dvc repro",
    "components/sources/data.py: dvc init",
)
def test_a_project_without_a_version_gets_one(project: Path) -> None:
    shutil.rmtree(project / ".git")
    git(project, "init", "-q")
    git(project, "add", "params.yaml")
    git(project, "commit", "-qm", "start")
    shutil.move(project / ".dvc", project.parent / "kept")
    with pytest.raises(InputError) as error:
        resolve_data(str(project), "workspace", data_folders("data"))
    follow(project, str(error.value), "dvc init")
    assert not resolve_data(str(project), "workspace", data_folders("data")).clean
    message = kubealign(project, "log").stderr
    follow(project, message, "dvc repro")
    follow(project, message, "git add")
    (version,) = json.loads(kubealign(project, "log", "--json").stdout)
    assert version["added"] == ["team"]


# ---- git and the remote


@shows("components/sources/data.py: git fetch --unshallow")
def test_a_shallow_clone_is_deepened(project: Path) -> None:
    (project / "README").write_text("words\n")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "words")
    first = git(project, "rev-list", "--max-parents=0", "HEAD")
    for number, read in enumerate(
        (
            lambda clone: resolve_data(str(clone), "HEAD", data_folders("data")),
            lambda c: pipelines_git.find_commit(c, first),
        )
    ):
        clone = project.parent / f"clone{number}"
        git(project, "clone", "-q", "--depth", "1", f"file://{project}", str(clone))
        shutil.copytree(project / ".dvc" / "cache", clone / ".dvc" / "cache")
        with pytest.raises(InputError) as error:
            read(clone)
        follow(clone, str(error.value), "git fetch")
        read(clone)


@shows("components/sources/data.py: git checkout {revision} && dvc push")
@pytest.mark.parametrize("missing", ["never pushed", "a file of it", "a damaged file of it"])
def test_content_that_the_remote_lacks_is_pushed_where_it_was_made(project: Path, tmp_path: Path, missing: str) -> None:
    """The version is no longer the one that is checked out."""
    store = tmp_path / "store"
    dvc(project, "remote", "modify", "-q", "local", "url", str(store))
    git(project, "commit", "-qam", "a remote")
    git(project, "tag", "v2")
    lock = project / "dvc.lock"
    lock.write_text(re.sub("md5: [0-9a-f]{32}.dir", f"md5: {'0' * 32}.dir", lock.read_text()))
    git(project, "commit", "-qam", "another version")
    listed = yaml.safe_load(git(project, "show", "v2:dvc.lock"))["stages"]["prepare"]["outs"]
    (digest,) = (out["md5"] for out in listed if out["path"] == "data/preferences")
    files = json.loads((project / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).read_text())
    (train,) = (entry["md5"] for entry in files if entry["relpath"] == "train.jsonl")
    if missing != "never pushed":
        git(project, "checkout", "-q", "v2")
        dvc(project, "push", "-q")
        path = store / "files" / "md5" / train[:2] / train[2:]
        path.unlink()
        if missing == "a damaged file of it":
            path.write_text("x")
        git(project, "checkout", "-q", "-")
    url = f"file://{project}"
    read: Callable[[], object]
    if missing == "a damaged file of it":
        data = DataConfig(repo=url, revision="v2", path="data")
        digests = resolve_data(url, "v2", data_folders("data")).digests
        read = lambda: fetch_data(data, digests, tmp_path / "out")  # noqa: E731
    else:
        params = yaml.safe_load((project / "params.yaml").read_text())
        params["data"]["repo"] = url
        reader = tmp_path / "reader"
        reader.mkdir()
        (reader / "params.yaml").write_text(yaml.safe_dump(params))

        def read() -> None:
            done = kubealign(reader, "diff", "v2", "v2")
            if done.returncode:
                raise InputError(done.stderr)

    with pytest.raises(KubealignError) as error:
        read()
    message = str(error.value)
    assert missing == "a damaged file of it" or str(store) in message, message
    for path in re.findall(r"files/md5/\S+\w", message):
        (store / path).unlink()
    follow(project, message, "git checkout v2")
    read()


# ---- what people add


@shows(
    "components/prepare/files.py: iconv -f UTF-16 -t UTF-8",
    "components/prepare/files.py: jq -c .",
    "components/prepare/files.py: jq -c '.NAME[]'",
    "components/prepare/files.py: jq -c '.{nested}[]'",
)
@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("UTF-16", "iconv"),
        ("spread", "jq -c ."),
        ("wrapped", "jq"),
        ("wrapped and spread", "jq -c '.NAME"),
    ],
)
def test_a_file_of_another_kind_is_converted(project: Path, tmp_path: Path, kind: str, start: str) -> None:
    pairs = rows(*range(40, 70))
    content = {
        "UTF-16": "\n".join(map(json.dumps, pairs)).encode("utf-16"),
        "spread": "\n".join(json.dumps(row, indent=1) for row in pairs).encode(),
        "wrapped": json.dumps({"data": pairs}).encode(),
        "wrapped and spread": json.dumps({"pairs": pairs}, indent=1).encode(),
    }[kind]
    file, mended = tmp_path / "team.json", tmp_path / "mended.jsonl"
    file.write_bytes(content)
    message = asked(project, file)
    found = [command for command in re.findall(r"`([^`]+)`", message) if command.startswith(start)]
    command = min(found, key=len).replace("NAME", "pairs")
    execute(tmp_path, f"{command} {file} > {mended}")
    assert goes_on(asked(project, mended))


def with_column(name: str, value: object) -> list[dict[str, Any]]:
    return [row | {name: value} for row in rows(*range(40, 70))]


INSTRUCTIONS = [{"instruction": f"Name the number {n * 7919}.", "output": f"It is {n}."} for n in range(30)]
OPTIONS: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "an unread column": (with_column("tools", "a calculator"), [], r"--ignore \w+"),
    "another language": (with_column("language", "German"), [], r"--language"),
    "instructions": (INSTRUCTIONS, [], r"--instructions"),
    "pairs as instructions": (with_column("licence", "MIT"), ["--instructions"], r"without (--instructions)"),
    "a pair format as instructions": (INSTRUCTIONS, ["--format", "instruction"], r"--instructions"),
}


@shows(
    "components/prepare/columns.py: --ignore",
    "components/prepare/convert.py: --language",
    "components/prepare/convert.py: --instructions",
    "pipelines/commands/data.py: --instructions",
)
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_read_with_the_option_in_the_message(project: Path, tmp_path: Path, name: str) -> None:
    content, words, pattern = OPTIONS[name]
    file = write(tmp_path / "own.jsonl", content)
    message = asked(project, file, *words)
    match = re.search(pattern, message)
    assert match, message
    option = match.group().removeprefix("without ").split()
    if match.group().startswith("without"):
        again = [word for word in words if word not in option]
    else:
        again = [*words, *option, *(["en"] if option == ["--language"] else [])]
    assert goes_on(asked(project, file, *again))


@shows("components/prepare/convert.py: --licence", "components/prepare/convert.py: --format")
def test_a_licence_and_a_format_are_given_as_the_message_says(project: Path, tmp_path: Path) -> None:
    pairs = rows(*range(40, 70))
    file = write(tmp_path / "own.jsonl", pairs)
    message = asked(project, file, licence="")
    for option in re.findall(r"--licence \S+", message):
        assert goes_on(asked(project, file, *option.split(), licence=""))
    turns = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs[15:]]
    mixed = write(tmp_path / "mixed.jsonl", [row for both in zip(pairs[:15], turns, strict=True) for row in both])
    message = asked(project, mixed)
    option, names = re.findall(r"(--format) to one of (.*)", message)[0]
    assert goes_on(asked(project, mixed, option, names.split(", ")[1])), message


def test_unknown_columns_are_renamed_as_a_format_has_them(project: Path, tmp_path: Path) -> None:
    own = [{"left": row["chosen"], "right": row["rejected"], "asked": row["prompt"]} for row in rows(*range(40, 70))]
    message = asked(project, write(tmp_path / "own.jsonl", own))
    assert "unknown format" in message and "trl" in message
    renamed = [{"chosen": row["left"], "rejected": row["right"], "prompt": row["asked"]} for row in own]
    assert goes_on(asked(project, write(tmp_path / "own.jsonl", renamed)))


@shows("pipelines/data/add.py: --source")
@pytest.mark.parametrize("names", [["a b.jsonl"], ["dpo_en_demo.jsonl"], ["x/a.jsonl", "a.json"]])
def test_a_source_is_named_with_the_option_in_the_message(project: Path, tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "x").mkdir()
    for number, name in enumerate(names, start=1):
        write(tmp_path / name, rows(*range(40 * number, 40 * number + 30)))
    paths = [str(tmp_path / name) for name in names]
    message = asked(project, Path(paths[0]), *paths[1:])
    (option,) = re.findall(r"--\w+", message)
    assert goes_on(asked(project, Path(paths[0]), *paths[1:], option, "own"))


@pytest.mark.parametrize("name", ["a b", "dpo_en_demo"])
def test_a_name_that_cannot_be_given_to_a_source_has_no_option(project: Path, name: str) -> None:
    refused = kubealign(project, "rename", "team", name)
    assert "choose another name" in refused.stderr and "--" not in refused.stderr
    assert goes_on(kubealign(project, "rename", "team", "another").stderr)


# ---- checks and settings


@shows("components/validate/checks.py: dvc repro", "components/validate/checks.py: kubealign data diff")
def test_what_the_checks_find_in_files_changed_by_hand_is_made_anew(project: Path, base_model: Path) -> None:
    config = load_config(project / "params.yaml", ["validate.min_rows=1"])

    def found() -> dict[str, str]:
        checked = check_rows(config.validate_, 400, project / "data", base_model, NoOpRun("validate"))
        result = summarize(checked)["preferences"]
        stops = " ".join(str(error) for error in refusals(config.validate_, summarize(checked)))
        assert ("split_leak" in stops) == any(c["failed"] for c in result["checks"] if c["name"] == "split_leak")
        return {check["name"]: check["advice"] for check in result["checks"] if check["failed"]}

    train, test = (project / "data" / "preferences" / f"{side}.jsonl" for side in ("train", "test"))
    lines = train.read_text().splitlines()
    moved = json.loads(lines[0])
    append(test, json.dumps(moved | {"chosen": "another"}) + "\n")
    before = found()
    assert {"split_leak", "repeated_id"} <= before.keys()
    assert "changed" in execute(project, "kubealign data diff")
    for name in ("split_leak", "repeated_id"):
        follow(project, before[name], "dvc repro")
    assert not {"split_leak", "repeated_id"} & found().keys()


def test_a_leak_that_only_validate_sees_is_mended_by_the_setting_in_the_message(
    base: Path, tmp_path: Path, base_model: Path
) -> None:
    """Prompts of which half is the same, on two sides: no near-duplicates to `prepare`, but to `validate`."""
    data = tmp_path / "data"
    shutil.copytree(base / "data", data)
    topics = ("lighthouse", "bakery", "violin", "glacier", "railway", "orchard", "submarine", "volcano", "library")
    texts = [
        f"Explain {n * 7919} facts about the {topic} that every visitor to {topic} number {n * 31} {end}"
        for end in ("ought to remember before noon", "should never forget at night")
        for n, topic in enumerate(topics)
    ]
    facts = {"chosen": "yes", "rejected": "no", "lang": "en", "source": "team", "license": "MIT"}
    file = data / "added" / "team" / "pairs.jsonl"
    write(file, [*read_lines(file), *({"prompt": [{"role": "user", "content": text}], **facts} for text in texts)])
    record_added(data / "sources.lock", {"team": Added(sha256=sha256_file(file), rows=30 + len(texts), files={})})

    def leaks(*settings: str) -> list[str]:
        config = load_config(ROOT / "params.yaml", ["prepare.preferences=[]", *settings])
        prepare_data(config.prepare, data)
        pairs = summarize(check_rows(config.validate_, 400, data, base_model, NoOpRun("validate")))["preferences"]
        return [check["advice"] for check in pairs["checks"] if check["name"] == "split_leak" and check["failed"]]

    strict = "validate.near_duplicate=0.3"
    assert not leaks()
    (advice,) = leaks(strict)
    key, limit = re.findall(r"(\w+\.\w+) not above (\w+\.\w+)", advice)[0]
    assert limit == strict.partition("=")[0] and not leaks(strict, f"{key}=0.3")


@shows("components/config/params.py: --project")
def test_the_project_is_named_with_the_option_in_the_message(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError) as error:
        load_config(elsewhere / "params.yaml")
    (option,) = re.findall(r"--\w+", str(error.value))
    nowhere = CliRunner().invoke(app, ["data", "log"])
    assert isinstance(nowhere.exception, InputError) and option in str(nowhere.exception)
    assert CliRunner().invoke(app, ["data", "log", option, str(project)]).exit_code == 0


def test_a_setting_is_written_as_the_message_shows_it() -> None:
    with pytest.raises(InputError) as error:
        load_config(ROOT / "params.yaml", ["beta"])
    key, value = re.findall(r"such as (\w+\.\w+)=(\S+)", str(error.value))[0]
    section, name = key.split(".")
    assert getattr(getattr(load_config(ROOT / "params.yaml", [f"{key}={value}"]), section), name) == float(value)


@shows("pipelines/platform.py: kubealign keys --secret")
def test_a_cluster_without_signing_keys_gets_the_secret_that_the_command_prints() -> None:
    config = load_config(ROOT / "params.yaml", ["cluster.signing_secret=", *CLUSTER])
    with pytest.raises(InputError) as error:
        check(config)
    (command,) = re.findall(r"`(kubealign [^`]+)`", str(error.value))
    done = CliRunner().invoke(app, [*command.split()[1:], "--project", str(ROOT)])
    secret = yaml.safe_load(done.output)
    assert secret["kind"] == "Secret" and secret["stringData"]["signing_key"].startswith("-----BEGIN")
    check(load_config(ROOT / "params.yaml", [f"cluster.signing_secret={secret['metadata']['name']}", *CLUSTER]))


@shows("pipelines/data/tokens.py: --set")
def test_tokens_are_shown_with_the_folder_that_the_message_asks_for(base_model: Path) -> None:
    shown = ["data", "show", "1", "--tokens", "--project", str(ROOT)]
    refused = CliRunner().invoke(app, [*shown, "--set", "model.base=s3://bucket/model"])
    (option, setting) = re.findall(r"(--set) (model\.base=)FOLDER", str(refused.exception))[0]
    assert CliRunner().invoke(app, [*shown, option, f"{setting}{base_model}"]).exit_code == 0


# ---- nothing is left out


def sentences(tree: ast.AST) -> Iterator[str]:
    """The texts of a file that people may see: no docstrings, no help, no words of command lines."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        if isinstance(node, ast.keyword) and node.arg in ("help", "description", "metavar"):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(value) for value in node.values}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else f"{{{ast.unparse(v.value)}}}" for v in node.values)  # type: ignore[attr-defined]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def advice(file: Path) -> Iterator[str]:
    for sentence in sentences(ast.parse(file.read_text(encoding="utf-8"))):
        if " " not in sentence:
            continue
        for match in ADVICE.finditer(sentence):
            if match.start() or not match.group().startswith("--"):  # an option in the first place is what was given
                yield f"{file.relative_to(ROOT)}: {next(filter(None, match.groups()))}"


def test_no_advice_is_given_that_no_situation_shows() -> None:
    files = [file for room in ROOMS for file in ([ROOT / room] if room.endswith(".py") else (ROOT / room).glob("*.py"))]
    given = {found for file in files for found in advice(file)}
    assert given == SHOWN | NOT_FOLLOWED.keys()
