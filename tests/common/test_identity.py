"""Steps as a user who is only a number, with a home folder, without one, and with one that cannot be written."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repositories import dvc, git
from tests.support.services import git_http_server
from tests.support.users import NUMBERS, open_folder, run_as

pytestmark = pytest.mark.integration

RESOLVE = """
import getpass, json, os, sys
from components.tracking.errors import report_errors
with report_errors("resolve"):
    from components.sources.data import data_folders, resolve_data
    found = resolve_data(sys.argv[1], "HEAD", data_folders("data"))
    print(json.dumps([found.commit, getpass.getuser()]))
"""
ASK = """
import json, os
from components.common.identity import ensure_identity
ensure_identity()
from pathlib import Path
names = ("HOME", "USER", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
print(json.dumps({name: os.environ.get(name) for name in names} | {"home": str(Path.home())}))
Path(os.environ.get("XDG_CACHE_HOME") or os.environ["HOME"], "probe").write_text("")
"""

STEP = """
from pathlib import Path
from components.config.params import load_config, pipeline_arguments
from components.resolve.component import resolve
resolve.python_func(**pipeline_arguments(load_config(Path("params.yaml"))))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture(scope="module")
def repository(folder: Path) -> Iterator[dict[str, str]]:
    """Addresses of a repository with data, which belongs to root, and its commit."""
    root = folder / "repo"
    root.mkdir()
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "remote", "add", "-q", "-d", "store", str(folder / "store"))
    for name in ("preferences", "instructions"):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "test.jsonl").write_text("{}\n")
    dvc(root, "add", "-q", "data/preferences", "data/instructions")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "data")
    dvc(root, "push", "-q")
    with git_http_server(folder) as http:
        yield {"http": f"{http}/repo", "path": str(root), "commit": git(root, "rev-parse", "HEAD")}


@pytest.fixture
def work(folder: Path, tmp_path: Path) -> Path:
    """A folder that everyone may write to."""
    made = folder / tmp_path.name
    made.mkdir()
    made.chmod(0o777)
    return made


def homes(work: Path) -> dict[str, dict[str, str]]:
    """The environment of each kind of home folder."""
    for name, mode in (("own", 0o777), ("read-only", 0o555), ("closed", 0o700)):
        (work / name).mkdir()
        (work / name).chmod(mode)
    found = {name: {"HOME": str(work / name)} for name in ("own", "read-only", "closed", "missing")}
    return found | {"unset": {}, "empty": {"HOME": ""}, "root": {"HOME": "/"}}


@pytest.mark.parametrize(
    ("who", "by", "home"),
    [
        ("of the image", "http", "unset"),
        ("of the image", "path", "own"),
        ("without a group", "path", "unset"),
        ("drawn by OpenShift", "http", "read-only"),
        ("drawn by OpenShift", "path", "read-only"),
    ],
)
def test_data_is_resolved_as_any_number_from_a_url_and_a_path(
    repository: dict[str, str], work: Path, who: str, by: str, home: str
) -> None:
    user = NUMBERS[who]
    environment = homes(work)[home] | {"KUBEALIGN_HOME": str(work / "kubealign")}
    done = run_as(user, ["-c", RESOLVE, repository[by]], work, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f'["{repository["commit"]}", "uid-{user[0]}"]' in done.stdout


def test_a_home_that_can_be_read_stays_and_every_other_is_replaced(work: Path) -> None:
    """Keys and settings of git may be mounted into a home that is read-only."""
    for name, environment in homes(work).items():
        for more in ({}, {"XDG_CACHE_HOME": str(work / "own")}):
            done = run_as(NUMBERS["of the image"], ["-c", ASK], work, **environment, **more)
            assert done.returncode == 0, (name, done.stderr)
            found = json.loads(done.stdout)
            kept = name in ("own", "read-only", "root")
            assert (found["HOME"] == environment.get("HOME")) == kept and found["home"] == found["HOME"], (name, found)
            assert found["USER"] == "uid-10001"
            if more:
                assert found["XDG_CACHE_HOME"] == more["XDG_CACHE_HOME"]
            elif name in ("read-only", "root"):
                assert found["XDG_CACHE_HOME"] and found["XDG_CACHE_HOME"] == found["XDG_CONFIG_HOME"]
            else:
                assert found["XDG_CACHE_HOME"] is None


def test_a_user_with_a_name_and_a_home_is_left_alone(work: Path) -> None:
    home = {"HOME": str(homes(work)["own"]["HOME"])}
    for user, name in (({"USER": "anna"}, "anna"), ({"LOGNAME": "anna"}, None), ({"USER": ""}, "uid-10001")):
        done = run_as(NUMBERS["of the image"], ["-c", ASK], work, **home, **user)
        assert json.loads(done.stdout)["USER"] == name, done.stderr


def test_the_first_step_of_a_run_runs_as_a_number(repository: dict[str, str], work: Path) -> None:
    """The component's own function, with the data in a repository by URL, as on Kubeflow."""
    base = work / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (base / name).write_text("{}")
    (work / "params.yaml").write_text(
        f"data: {{repo: '{repository['http']}', revision: HEAD}}\nmodel: {{base: '{base}', hardware: cpu}}\n"
    )
    environment = {"KUBEALIGN_HOME": str(work / "kubealign")}
    done = run_as(NUMBERS["drawn by OpenShift"], ["-c", STEP], work, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"data {repository['commit'][:12]}" in done.stdout and "[stage] resolve finished" in done.stdout
    assert not (work / "~").exists(), "a home that is none is not made"
