"""Versions of the data in a real git and DVC repository."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from components.common.errors import InputError
from components.sources.data import commit_of, data_folders, history, recorded_outs, resolve_data
from tests.support.repositories import dvc, git

pytestmark = pytest.mark.integration

DATA = data_folders("data")


@pytest.fixture
def data_repo(tmp_path: Path) -> Path:
    """A git and DVC repository with two versions of the data, and a commit that leaves the data alone."""
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    dvc(repo, "init", "-q")
    (repo / "source").mkdir()
    stage = "mkdir -p data && cp -r source data/preferences && cp -r source data/instructions"
    (repo / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "prepare": {"cmd": stage, "deps": ["source"], "outs": ["data/preferences", "data/instructions"]}
                }
            }
        )
    )
    for number in (1, 2):
        (repo / "source" / "rows.jsonl").write_text(f'{{"version": {number}}}\n')
        dvc(repo, "repro", "-q")
        git(repo, "add", "-A")
        git(repo, "commit", "-qm", f"data {number}")
        git(repo, "tag", f"v{number}")
    (repo / "README").write_text("words\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "words")
    return repo


def test_a_revision_is_the_commit_that_gave_the_data_its_content(data_repo: Path) -> None:
    second, head = git(data_repo, "rev-parse", "v2"), git(data_repo, "rev-parse", "HEAD")
    assert second != head
    now, then = resolve_data(str(data_repo), "HEAD", DATA), resolve_data(str(data_repo), "v1", DATA)
    assert now.commit == second and then.commit == git(data_repo, "rev-parse", "v1")
    assert now.digests != then.digests
    for same in ("v2", second, head[:10]):
        assert resolve_data(str(data_repo), same, DATA) == now, "so the cache serves a run on any of these names"


def test_the_workspace_has_dvcs_own_digest_and_follows_every_change(data_repo: Path) -> None:
    committed, workspace = resolve_data(str(data_repo), "HEAD", DATA), resolve_data(str(data_repo), "workspace", DATA)
    assert workspace.digests == committed.digests and workspace.commit == "workspace"
    (data_repo / "data" / "preferences" / "rows.jsonl").write_text("changed\n")
    changed = resolve_data(str(data_repo), "workspace", DATA).digests
    assert changed["data/preferences"] != committed.digests["data/preferences"]
    assert changed["data/instructions"] == committed.digests["data/instructions"]


def test_data_that_is_not_there_is_a_clear_error(data_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.revision=nowhere.*expected a git repository with DVC data"):
        resolve_data(str(data_repo), "nowhere", DATA)
    with pytest.raises(InputError, match=r"data.revision=workspace needs a local repository"):
        resolve_data("https://example.org/repo.git", "workspace", DATA)
    shutil.rmtree(data_repo / "data" / "preferences")
    with pytest.raises(InputError, match=r"data/preferences: not found or empty; `dvc repro`"):
        resolve_data(str(data_repo), "workspace", DATA)


def test_a_shallow_clone_says_so_rather_than_naming_another_commit(data_repo: Path, tmp_path: Path) -> None:
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{data_repo}", str(clone))
    shutil.copytree(data_repo / ".dvc" / "cache", clone / ".dvc" / "cache")
    with pytest.raises(InputError, match="history ends before the data's does; this is a shallow clone: `git fetch"):
        resolve_data(str(clone), "HEAD", DATA)
    git(clone, "fetch", "-q", "--unshallow")
    assert resolve_data(str(clone), "HEAD", DATA) == resolve_data(str(data_repo), "HEAD", DATA)


def test_a_clone_that_ends_below_what_was_asked_is_as_good_as_the_whole(data_repo: Path, tmp_path: Path) -> None:
    lock = data_repo / "dvc.lock"
    lock.write_text(re.sub(r"md5: \w{32}", f"md5: {'5' * 32}", lock.read_text()))
    git(data_repo, "commit", "-qam", "data 3")
    head, digests = git(data_repo, "rev-parse", "HEAD"), dict.fromkeys(DATA, f"{'5' * 32}.dir")
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "2", f"file://{data_repo}", str(clone))
    assert commit_of(clone, head, digests) == head
    with pytest.raises(InputError, match="a shallow clone"):
        list(history(clone, head, DATA))
    (clone / ".git" / "shallow").unlink()
    with pytest.raises(InputError, match="the history ends before the data's does"):
        list(history(clone, head, DATA))
    git(data_repo, "fetch", "-q", "--depth", "1", f"file://{data_repo}", "HEAD")
    assert (data_repo / ".git" / "shallow").is_file(), "a whole repository of which one fetch was shallow"
    assert len(list(history(data_repo, head, DATA))) == 3


def test_a_graft_renames_no_commit(data_repo: Path) -> None:
    head, expected = git(data_repo, "rev-parse", "HEAD"), resolve_data(str(data_repo), "HEAD", DATA)
    (data_repo / ".git" / "info" / "grafts").write_text(f"{head}\n")
    assert resolve_data(str(data_repo), "HEAD", DATA) == expected and len(list(history(data_repo, head, DATA))) == 2


def test_a_clone_without_old_objects_says_so(data_repo: Path, tmp_path: Path) -> None:
    git(data_repo, "config", "uploadpack.allowFilter", "true")
    digests = resolve_data(str(data_repo), "HEAD", DATA).digests
    for number, kind in enumerate(("blob:none", "tree:0")):
        clone = tmp_path / str(number)
        git(tmp_path, "clone", "-q", f"--filter={kind}", f"file://{data_repo}", str(clone))
        head = git(clone, "rev-parse", "HEAD")
        with pytest.raises(InputError, match="a partial clone, which lacks old objects: clone all of it"):
            commit_of(clone, head, digests)
        with pytest.raises(InputError, match="a partial clone"):
            list(history(clone, head, DATA))


MARKERS = "<<<<<<< HEAD\nstages: {}\n=======\n>>>>>>> other\n"


def test_a_commit_whose_records_cannot_be_read_is_passed_over(data_repo: Path) -> None:
    expected, lock = resolve_data(str(data_repo), "HEAD", DATA), data_repo / "dvc.lock"
    text = lock.read_text()
    lock.write_text(MARKERS)
    git(data_repo, "commit", "-qam", "a merge gone wrong")
    broken = git(data_repo, "rev-parse", "HEAD")
    with pytest.raises(InputError, match="expected a git repository with DVC data"):
        resolve_data(str(data_repo), "HEAD", DATA)
    lock.write_text(text)
    git(data_repo, "commit", "-qam", "mended")
    assert resolve_data(str(data_repo), "HEAD", DATA) == expected
    told: list[str] = []
    head = git(data_repo, "rev-parse", "HEAD")
    found = [entry.id.decode() for entry, _ in history(data_repo, head, DATA, warn=told.append)]
    assert found == [git(data_repo, "rev-parse", tag) for tag in ("v2", "v1")]
    assert len(told) == 1 and told[0].startswith(f"{broken[:12]}:dvc.lock: not valid YAML"), told


@pytest.mark.parametrize(
    "text",
    [
        MARKERS,
        "- stages",
        "stages",
        "stages: 3",
        "stages: {prepare: 3}",
        "stages: {prepare: {outs: 3}}",
        "stages: {prepare: {outs: [data]}}",
        "stages: {prepare: {outs: [{md5: x}]}}",
        "stages: 2020-99-99",
        "\0",
    ],
)
def test_records_that_are_none_are_an_error_that_names_them(text: str) -> None:
    with pytest.raises(InputError, match="^c0ffee:dvc.lock: (not valid YAML: .|expected stages and outputs)"):
        recorded_outs(text.encode(), "c0ffee:dvc.lock")
    assert (
        recorded_outs(b"", "x") == recorded_outs(b"stages:", "x") == recorded_outs(b"stages: {a: {outs:}}", "x") == []
    )


def test_a_merge_that_keeps_the_data_of_one_side_is_no_version(data_repo: Path) -> None:
    """Whatever the other side did, and however late."""
    expected = resolve_data(str(data_repo), "HEAD", DATA)
    git(data_repo, "checkout", "-q", "-b", "side", "v1")
    (data_repo / "dvc.lock").write_text((data_repo / "dvc.lock").read_text().replace("md5: ", "md5: 0"))
    git(data_repo, "commit", "-qam", "other data")
    git(data_repo, "checkout", "-q", "-")
    git(data_repo, "merge", "-q", "-s", "ours", "-m", "ours", "side")
    assert resolve_data(str(data_repo), "HEAD", DATA) == expected
    found = [entry.id.decode() for entry, _ in history(data_repo, git(data_repo, "rev-parse", "HEAD"), DATA)]
    assert sorted(found) == sorted(git(data_repo, "rev-parse", name) for name in ("v1", "v2", "side"))


def test_data_in_a_submodule_is_none_of_this_repository(data_repo: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(data_repo), "data")
    git(outer, "commit", "-qm", "data")
    assert [outs for _, outs in history(outer, git(outer, "rev-parse", "HEAD"), DATA)] == [{}]


def test_a_worktree_and_a_project_in_a_folder_are_read_like_any_other(data_repo: Path, tmp_path: Path) -> None:
    git(data_repo, "worktree", "add", "-q", str(tmp_path / "tree"), "v1")
    shutil.copytree(data_repo / ".dvc" / "cache", tmp_path / "tree" / ".dvc" / "cache")
    assert resolve_data(str(tmp_path / "tree"), "HEAD", DATA).commit == git(data_repo, "rev-parse", "v1")
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    shutil.copytree(data_repo, outer / "inner", ignore=shutil.ignore_patterns(".git"))
    dvc(outer / "inner", "config", "core.no_scm", "false")
    git(outer, "add", "-A")
    git(outer, "commit", "-qm", "all")
    assert resolve_data(str(outer / "inner"), "workspace", DATA).clean
    with pytest.raises(InputError, match="a folder of the git repository .*only data.revision=workspace"):
        resolve_data(str(outer / "inner"), "HEAD", DATA)


def test_a_repository_without_a_commit_is_a_clear_error(data_repo: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    shutil.copytree(data_repo, empty, ignore=shutil.ignore_patterns(".git"))
    git(empty, "init", "-q")
    assert not resolve_data(str(empty), "workspace", DATA).clean
    with pytest.raises(InputError, match="data.revision=HEAD: .*expected a git repository with DVC data and a branch"):
        resolve_data(str(empty), "HEAD", DATA)
