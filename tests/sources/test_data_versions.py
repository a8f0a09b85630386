"""Versions of the data in a real git and DVC repository."""

import shutil
from pathlib import Path

import pytest
import yaml

from components.common.errors import InputError
from components.sources.data import data_folders, resolve_data
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
