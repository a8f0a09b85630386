"""`kubealign data add`, `diff` and `log`, on a real project with git and DVC and no data of anybody else's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError
from components.config.params import load_config
from components.dataset.records import read_lines
from components.dataset.sketches import prompt_key, prompt_text
from components.prepare.convert import RowDefaults
from components.prepare.sources import Added, added_rows, read_sources, record_added
from components.prepare.split import assign_split, read_splits
from components.prepare.stage import prepare_data
from pipelines.data import add as data_add
from pipelines.data.add import Preview, add
from tests.conftest import ROOT
from tests.support.data_project import kubealign, make_project, question, rows, write
from tests.support.prompts import LONG
from tests.support.repositories import dvc, git
from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration

TEAM = RowDefaults("", "auto", "MIT", "")
SPLITS = ("train", "validation", "test")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_project(tmp_path / "project")
    monkeypatch.setenv("KUBEALIGN_HOME", str(root / ".kubealign"))
    return root


def state(root: Path) -> dict[str, str]:
    """Every file of the project's data and locks, by content."""
    files = [root / "dvc.lock", *(root / "data").rglob("*")]
    return {str(path.relative_to(root)): path.read_text() for path in files if path.is_file()}


def table(text: str) -> list[list[str]]:
    """The cells of the last table that was printed."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_version_is_shown_then_made_and_its_history_is_told(project: Path, tmp_path: Path) -> None:
    team = write(tmp_path / "team.jsonl", [*rows(*range(20)), {"prompt": "no answers"}])
    words = ("add", str(team), "--licence", "MIT")
    before = state(project)
    asked = kubealign(project, *words)
    assert asked.returncode == 2 and "there is no terminal; pass --yes" in asked.stderr
    assert "quarantined: 1 because no 'chosen', first at" in asked.stdout and "team.jsonl:21" in asked.stdout
    assert ["preferences", "en", "team", "10", "0", "0"] in table(asked.stdout)
    assert ["preferences", "zh", "team", "10", "0", "0"] in table(asked.stdout)
    assert state(project) == before, "nothing is written before the answer"

    done = kubealign(project, *words, "--yes")
    assert done.returncode == 0, done.stderr
    assert sum(len(read_lines(project / "data" / "preferences" / f"{side}.jsonl")) for side in SPLITS) == 20
    assert [entry["where"] for entry in read_lines(project / "data/added/team/quarantine.jsonl")] == [f"{team}:21"]
    subprocess.run([sys.executable, "-P", "-m", "dvc", "diff"], cwd=project, check=True, capture_output=True)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "the team's pairs")
    git(project, "tag", "v1")
    tracked = git(project, "ls-files", "data")
    assert "data/added/team.dvc" in tracked and "pairs.jsonl" not in tracked and "train.jsonl" not in tracked

    changed = rows(*range(1, 19)) + rows(19, chosen="better 19") + rows(30)
    again = kubealign(project, "add", str(write(team, changed)), "--licence", "MIT", "--yes")
    assert again.returncode == 0, again.stderr
    assert table(again.stdout)[-2:] == table(kubealign(project, "diff").stdout)[-2:]
    found = json.loads(kubealign(project, "diff", "v1", "workspace", "--json").stdout)
    pairs = {row["language"]: row for row in found if row["data_set"] == "preferences"}
    assert {lang: (row["added"], row["removed"], row["changed"]) for lang, row in pairs.items()} == {
        "en": (1, 1, 0),  # 30 came, 0 went
        "zh": (0, 0, 1),  # 19 has another answer
    }
    git(project, "add", "-A")
    git(project, "commit", "-qm", "one more, one less")
    log = json.loads(kubealign(project, "log", "--json").stdout)
    assert [(entry["message"], entry["tags"], entry["added"]) for entry in log] == [
        ("one more, one less", [], ["team"]),
        ("the team's pairs", ["v1"], ["team"]),
    ]
    assert log[0]["preferences"] != log[1]["preferences"]
    assert kubealign(project, "diff", "v1", "v1").stdout.strip() == "v1 and v1 hold the same rows"
    nowhere = kubealign(project, "diff", "v1", "nowhere")
    assert nowhere.returncode == 2 and "data.revision=nowhere" in nowhere.stderr


class Crash(BaseException):
    """The process is gone at this point."""


def run(project: Path, *files: Path) -> dict[str, Path] | None:
    return add(project, load_config(project / "params.yaml"), list(files), TEAM, lambda preview: True)


@pytest.mark.parametrize("at", ["mkdir", "moved", "tracked", "recorded"])
def test_an_interrupted_add_is_finished_by_the_same_command(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The commands of DVC are stubs that count, as it is the order of our own steps that is tried here."""
    team = write(tmp_path / "team.jsonl", rows(*range(24)))
    calls: list[str] = []
    crash = {"moved": "add", "recorded": "repro"}.get(at)

    def fake(root: Path, *words: str) -> None:
        calls.append(words[0])
        if words[0] == crash:
            raise Crash
        if words[0] == "repro":
            prepare_data(load_config(root / "params.yaml").prepare, root / "data")

    monkeypatch.setattr(data_add, "_dvc", fake)
    with monkeypatch.context() as patch:
        if at == "mkdir":
            (project / "data" / "added" / ".team.killed").mkdir(parents=True)
            patch.setattr(shutil, "move", lambda *_: (_ for _ in ()).throw(Crash))
        if at == "tracked":
            patch.setattr(data_add, "replacing", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run(project, team)
    if at in ("mkdir", "moved", "tracked"):
        assert not read_sources(project / "data" / "sources.lock").added, "the lock names nothing that is not there"
    crash = None
    assert run(project, team) == {"team": project / "data" / "added" / "team"}
    after = state(project)
    assert calls[-2:] == ["add", "repro"] and not list((project / "data" / "added").glob(".team*"))
    added = read_sources(project / "data" / "sources.lock").added["team"]
    assert added.rows == 24 and added_rows(project / "data", "team", added).is_file()
    seen: list[Preview] = []
    add(project, load_config(project / "params.yaml"), [team], TEAM, lambda preview: bool(seen.append(preview)))
    assert seen[0].known and not seen[0].difference and state(project) == after, "the third time changes nothing"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_killed_add_goes_on_with_dvc_and_all(project: Path, tmp_path: Path, number: int) -> None:
    """The signal comes as soon as the lock file names the new source, which is before `dvc repro` has made the data:
    SIGKILL to every process, SIGTERM to the command alone, which ends the others.
    """
    team = write(tmp_path / "team.jsonl", rows(*range(24)))
    words = [sys.executable, "-P", "-m", "pipelines.cli", "data", "add", str(team), "--licence", "MIT", "--yes"]
    child = subprocess.Popen(
        words, cwd=project, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lock = project / "data" / "sources.lock"
    wait_until(lambda: "team" in lock.read_text(), "the new source in the lock file", every_s=0.005)
    (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert "team" in (project / "data" / "sources.lock").read_text()
    if number == signal.SIGTERM:
        assert child.returncode == 128 + number and said.strip() == "error: interrupted; run the same command to resume"
        assert not list((project / ".kubealign" / "workspace").iterdir())
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "status"], cwd=project, capture_output=True, text=True, check=True
    )
    assert "prepare" not in status.stdout and "team" not in status.stdout, status.stdout
    pairs = [row for side in SPLITS for row in _rows(project / "data" / "preferences" / f"{side}.jsonl")]
    assert len(pairs) == 24


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("names", "facts", "message"),
    [
        (["a b.jsonl"], TEAM, "'a b' cannot be a source name, .*--source"),
        (["alpaca_en_demo.jsonl"], TEAM, "data/sources.lock .*alpaca_en_demo; .*--source"),
        (["x/a.jsonl", "a.json"], TEAM, "would both be source a; .*--source"),
        (
            ["half.jsonl"],
            TEAM,
            r"4 of 8 rows .* \(50.0%; .* allows 10.0%\); .*\(4 rows\): no 'chosen'",
        ),
        (["."], TEAM, "a folder; expected a file of rows"),
        (["none.jsonl"], TEAM, "none.jsonl: not found"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_is_written(
    project: Path, tmp_path: Path, names: list[str], facts: RowDefaults, message: str
) -> None:
    (tmp_path / "x").mkdir()
    for name in ("a b.jsonl", "alpaca_en_demo.jsonl", "x/a.jsonl", "a.json"):
        write(tmp_path / name, rows(1))
    write(tmp_path / "half.jsonl", [*rows(1, 2, 3, 4), *({"prompt": str(i), "rejected": "x"} for i in range(4))])
    before = state(project)
    changed = RowDefaults(facts.format, facts.language, facts.licence, "team" if names == ["."] else facts.source)
    with pytest.raises(InputError, match=message):
        add(project, load_config(project / "params.yaml"), [tmp_path / name for name in names], changed, lambda _: True)
    assert state(project) == before and not list((project / ".kubealign" / "workspace").iterdir())


def test_what_the_checks_say_of_the_new_pairs_is_known_before_anything_is_written(
    project: Path, tmp_path: Path, tiny_model: Path
) -> None:
    same = rows(90, chosen="the  same", rejected="the same")
    team = write(
        tmp_path / "team.jsonl", [*rows(*range(40)), *same, *rows(91, chosen="write to li.wei@kubealign-team.cn")]
    )
    config = load_config(project / "params.yaml", [f"model.base={tiny_model}"])
    seen: list[Preview] = []
    assert add(project, config, [team], TEAM, lambda preview: bool(seen.append(preview))) is None
    found = {finding.check: (finding.severity, finding.rows) for finding in seen[0].findings or []}
    assert found["same_answer"] == ("error", 1) and found["email"] == ("warn", 1)
    assert "schema" not in found and "license" not in found and not (project / "data" / "added").exists()


# ---- the split


def put(data: Path, name: str, texts: list[str]) -> None:
    """A source of texts, as `data add` leaves it."""
    from components.common.files import sha256_file

    file = data / "added" / name / "pairs.jsonl"
    file.parent.mkdir(parents=True)
    prompt = [[{"role": "user", "content": text}] for text in texts]
    facts = {"chosen": "yes", "rejected": "no", "lang": "en", "source": name, "license": "MIT"}
    write(file, [{"prompt": turns, **facts} for turns in prompt])  # type: ignore[misc]
    record_added(data / "sources.lock", {name: Added(sha256=sha256_file(file), rows=len(texts), files={})})


def sides_after(data: Path, *adds: tuple[str, list[str]]) -> dict[str, tuple[str, str]]:
    data.mkdir()
    shutil.copy(ROOT / "data" / "sources.lock", data)
    config = load_config(ROOT / "params.yaml", ["prepare.preferences=[]"]).prepare
    for name, texts in adds:
        put(data, name, texts)
        prepare_data(config, data)
    return {key: (assignment.group, assignment.split) for key, assignment in read_splits(data / "splits.lock").items()}


def test_adding_in_another_order_gives_the_same_sides(tmp_path: Path) -> None:
    """Near-duplicates inside a file are a group of it; prompts that stand in both files are one prompt."""
    one = ("one", [*(question(i) for i in range(0, 60, 2)), LONG, LONG + " today"])
    other = ("other", [*(question(i) for i in range(20, 90, 2)), LONG, LONG + " today"])
    first, second = sides_after(tmp_path / "1", one, other), sides_after(tmp_path / "2", other, one)
    assert first == second and {side for _, side in first.values()} == set(SPLITS)
    assert sides_after(tmp_path / "3", ("both", one[1] + other[1])) == first, "nor does it matter how often"


def test_a_row_that_bridges_two_sides_stands_in_the_quarantine_with_its_reason(tmp_path: Path) -> None:
    others = [question(number) for number in range(60)]
    for number in range(40):
        left = f"{LONG} {number}"
        right = f"the weather in the town of {number} was bad on the day that we came home from it"
        data = tmp_path / str(number)
        sides = sides_after(data, ("ends", [left, right, *others]))
        if sides[key_of(left)][1] != sides[key_of(right)][1]:
            break
    bridge = f"{left}. {right}"
    put(data, "bridge", [bridge])
    prepare_data(load_config(ROOT / "params.yaml", ["prepare.preferences=[]"]).prepare, data)
    (entry,) = read_lines(data / "quarantine.jsonl")
    assert entry["reason"].startswith("bridge: its prompt asks the same as prompts in both the ")
    assert entry["row"]["prompt"][0]["content"] == bridge
    after = {key: (assignment.group, assignment.split) for key, assignment in read_splits(data / "splits.lock").items()}
    assert after == sides, "and what was there stays where it was"


def key_of(text: str) -> str:
    return prompt_key(prompt_text([{"role": "user", "content": text}]))


# ---- names, removal, two people


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("prefs.part1.jsonl", "prefs.part1"),
        ("prefs.jsonl.gz", "prefs"),
        ("Team-B.parquet", "Team-B"),
        ("偏好.json", "偏好"),
        (unicodedata.normalize("NFD", "préférences.csv"), "préférences"),
    ],
)
def test_a_source_has_the_whole_stem_of_its_file(file: str, name: str) -> None:
    sources = read_sources(ROOT / "data" / "sources.lock")
    assert list(data_add._files_by_source([Path(file)], TEAM, sources)) == [name]


def names_of(root: Path) -> set[str]:
    return {row["source"] for side in SPLITS for row in _rows(root / "data" / "preferences" / f"{side}.jsonl")}


def test_a_source_is_replaced_renamed_and_removed_and_each_says_so(project: Path, tmp_path: Path) -> None:
    for name, first in (("one", 0), ("two", 40)):
        file = write(tmp_path / f"{name}.jsonl", rows(*range(first, first + 30)))
        done = kubealign(project, "add", str(file), "--licence", "MIT", "--yes")
        assert done.returncode == 0, done.stderr
    git(project, "add", "-A")
    assert "pairs.jsonl" not in git(project, "ls-files", "data"), "git never sees the rows"
    write(tmp_path / "two.jsonl", rows(*range(40, 66)))
    again = kubealign(project, "add", str(tmp_path / "two.jsonl"), "--licence", "MIT", "--yes")
    assert "replaces the source two of now (30 rows)" in again.stdout
    assert "preference pairs afterwards: " in again.stdout
    renamed = kubealign(project, "rename", "two", "three", "--yes")
    assert renamed.returncode == 0 and names_of(project) == {"one", "three"}, renamed.stderr
    assert not (project / "data/added/two.dvc").exists() and not (project / "data/added/two").exists()
    assert kubealign(project, "rename", "one", "three", "--yes").returncode == 2
    gone = kubealign(project, "remove", "three", "--yes")
    assert "removes the source three of now (26 rows)" in gone.stdout and names_of(project) == {"one"}
    assert not (project / "data/added/three.dvc").exists()
    nobody = kubealign(project, "remove", "three", "--yes")
    assert nobody.returncode == 2 and "no added source named three; expected one of: one" in nobody.stderr


def test_what_came_while_somebody_was_asked_is_not_lost(project: Path, tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", rows(*range(n, n + 30))) for name, n in (("one", 0), ("two", 40)))
    config = load_config(project / "params.yaml")
    seen: list[set[str]] = []

    def confirm(preview: Preview) -> bool:
        seen.append(set(preview.converted))
        if len(seen) == 1:
            assert add(project, config, [two], TEAM, lambda _: True)
        return True

    assert add(project, config, [one], TEAM, confirm)
    assert seen == [{"one"}, {"one"}], "asked again, since the data changed meanwhile"
    assert names_of(project) == {"one", "two"}


def page_commands(theirs: str) -> str:
    """The commands of docs/data.md for two people, with the other branch's name in them."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Two people add data")[2]
    return page.partition("```sh\n")[2].partition("```")[0].replace("git merge theirs", f"git merge {theirs}")


def test_two_people_who_add_data_merge_as_the_page_says(project: Path, tmp_path: Path) -> None:
    """Ann's prompt and Bob's ask the same, and each branch remembers another side for it."""
    shares = load_config(project / "params.yaml").prepare.split.model_dump()
    for number in range(200):
        asked = {"ann": f"{LONG} {number}", "bob": f"{LONG} {number} today"}
        sides = {name: assign_split(key_of(text), shares) for name, text in asked.items()}
        if sides == {"ann": "train", "bob": "test"}:
            break
    shutil.copy(ROOT / ".gitattributes", project)
    run(project, write(tmp_path / "one.jsonl", rows(*range(30))))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "one")
    git(project, "branch", "bob")
    for name, first in (("ann", 40), ("bob", 80)):
        git(project, "checkout", "-q", *(["-b"] if name == "ann" else []), name)
        own = {"prompt": asked[name], "chosen": "yes", "rejected": "no"}
        run(project, write(tmp_path / f"{name}.jsonl", [*rows(*range(first, first + 30)), own]))
        git(project, "add", "-A")
        git(project, "commit", "-qm", name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = f"set -e\n{page_commands('ann')}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=project,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "splits.lock has 1 prompts that ask the same as one nearer to the test" in done.stdout
    assert names_of(project) == {"one", "ann", "bob"} and not git(project, "status", "--porcelain")
    (entry,) = _rows(project / "data" / "quarantine.jsonl")
    assert entry["row"]["prompt"][0]["content"] == asked["ann"] and "the test split, which keeps it" in entry["reason"]


def test_a_file_that_leaves_a_side_empty_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing would be left for"):
        run(project, write(tmp_path / "few.jsonl", rows(1, 2)))


def test_the_preview_says_what_a_run_would_refuse(project: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Half of the rows of one source are repeated: few among all rows, too many of the source."""
    config = load_config(project / "params.yaml", [f"model.base={tiny_model}", "validate.min_rows=1"])
    run(project, write(tmp_path / "many.jsonl", rows(*range(300))))
    seen: list[Preview] = []
    few = write(tmp_path / "few.jsonl", rows(*range(400, 412)) * 2)
    assert add(project, config, [few], TEAM, lambda preview: bool(seen.append(preview))) is None
    assert any("rows of source few are bad (50.0%" in refusal for refusal in seen[0].refusals), seen[0].refusals


def test_instructions_of_ones_own_are_trained_in_sft_alone(project: Path, tmp_path: Path) -> None:
    run(project, write(tmp_path / "pairs.jsonl", rows(*range(30))))
    taught = [{"instruction": question(n), "input": "", "output": f"taught {n}"} for n in range(50, 80)]
    file = write(tmp_path / "sft.jsonl", taught)
    done = kubealign(project, "add", str(file), "--instructions", "--licence", "MIT", "--yes")
    assert done.returncode == 0, done.stderr
    assert names_of(project) == {"pairs"}
    found = [row for side in SPLITS for row in _rows(project / "data" / "instructions" / f"{side}.jsonl")]
    assert sum(row["source"] == "sft" for row in found) == 30 and len(found) == 60
    assert "response: taught" in " ".join(done.stdout.split()), "the preview shows a row as it will be trained"


# ---- from the cache and the remote


def test_a_fresh_clone_makes_the_data_from_the_remote_and_from_nothing_else(project: Path, tmp_path: Path) -> None:
    team = write(tmp_path / "team.jsonl", rows(*range(24)))
    run(project, team)
    dvc(project, "push", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "data")
    made = state(project)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    shutil.copytree(project / ".kubealign" / "remote", clone / ".kubealign" / "remote")
    config = load_config(clone / "params.yaml").prepare
    prepare_data(config, clone / "data")
    found = state(clone)
    pairs = clone / "data" / "added" / "team" / "pairs.jsonl"
    for name in ("data/added/team/pairs.jsonl", "data/preferences/train.jsonl", "data/splits.lock"):
        assert found[name] == made[name]
    with pairs.open("a") as file:
        file.write("{}\n")
    with pytest.raises(InputError, match=r"pairs.jsonl: sha256 is .*, data/sources.lock says .*; `dvc pull --force"):
        prepare_data(config, clone / "data")
    for left in (clone / ".kubealign", clone / ".dvc" / "cache", pairs.parent):
        shutil.rmtree(left, ignore_errors=True)
    with pytest.raises(InputError, match="not found here, nor in the DVC cache or remote; `dvc pull` shows why"):
        prepare_data(config, clone / "data")
