"""A home folder may be moved, copied, have any name that a file system allows, and be opened by several at once."""

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from components.common.errors import InputError
from components.register.package import find_versions, register_base
from components.tracking import store
from components.tracking.run import StageRun
from pipelines.project import home_in_use
from tests.conftest import move_home

LOADED_FROM_CODE = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Echo(PythonModel):
    def predict(self, context, model_input):
        return model_input

set_model(Echo())
"""


def open_home(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The MLflow client of the project in a folder."""
    move_home(folder / ".kubealign", patch)
    return store.client()


def start_run(client: Any) -> StageRun:
    return StageRun("register", client, client.create_run(store.experiment_id(client)).info.run_id)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path) -> Path:
    """A project folder with a champion that was logged as models are, and a base model that was logged with a run."""
    folder = tmp_path / "first project"
    (folder / ".kubealign").mkdir(parents=True)
    shutil.copy(empty_mlflow, folder / ".kubealign")
    client = open_home(folder, monkeypatch)
    code = tmp_path / "echo.py"
    code.write_text(LOADED_FROM_CODE)
    run = start_run(client)
    with mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(name="model", python_model=str(code), pip_requirements=["mlflow"])
    client.create_registered_model("m")
    client.create_model_version("m", logged.model_uri, run_id=run.run_id, model_id=logged.model_id)
    client.set_registered_model_alias("m", "champion", "1")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    register_base(run, "m", base, "digest")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def artifacts(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "mlartifacts" in str(path)
    }


def check_models(folder: Path, client: Any) -> None:
    """What is registered is read from this folder, by kubealign and by the README's way, and so is what is added."""
    assert mlflow.pyfunc.load_model("models:/m@champion").predict(["hello"]) == ["hello"]
    assert find_versions(client, "m-base", "kubealign.base_content", "digest") == ["1"]
    for name in ("m", "m-base"):
        where = Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{name}/1"))
        assert names(where)
    assert client.get_model_version_download_uri("m", "1").startswith(folder.as_uri())
    run = start_run(client)
    client.log_text(run.run_id, "new", "new.txt")
    assert any(run.run_id in name for name in artifacts(folder))


def test_a_moved_project_goes_on_in_its_new_place_and_says_so_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = project.with_name("an other's 100 % #2 项目")
    project.rename(moved)
    capfd.readouterr()
    client = open_home(moved, monkeypatch)
    (said,) = capfd.readouterr().err.strip().splitlines()
    assert said.startswith(f"{moved}/.kubealign was moved from {project}/.kubealign: ")
    check_models(moved, client)
    store.client()
    assert "moved" not in capfd.readouterr().err and not project.exists()


def test_a_copied_project_and_the_original_go_on_without_each_other(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = project.with_name("copy")
    shutil.copytree(project, copy)
    before = artifacts(project)
    capfd.readouterr()
    check_models(copy, open_home(copy, monkeypatch))
    assert f"{copy}/.kubealign is a copy of {project}/.kubealign: " in capfd.readouterr().err
    assert artifacts(project) == before
    of_copy = artifacts(copy)
    check_models(project, open_home(project, monkeypatch))
    assert artifacts(copy) == of_copy and "is a copy" not in capfd.readouterr().err
    shutil.rmtree(project)
    check_models(copy, open_home(copy, monkeypatch))


def test_a_database_of_ones_own_goes_with_the_project_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow: Path
) -> None:
    """Not by its place alone: several projects may share one file."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    shared = tmp_path / "one" / "team.db"
    shutil.copy(empty_mlflow, shared)
    locations = {}
    for name, folder in (("first", "one"), ("shares it", "two"), ("copy", "three"), ("original", "one")):
        if name == "copy":
            shutil.copytree(tmp_path / "one", tmp_path / "three")
        move_home(tmp_path / folder / ".kubealign", monkeypatch)
        monkeypatch.setenv(
            "MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / ('three' if name == 'copy' else 'one')}/team.db"
        )
        client = store.client()
        client.log_text(start_run(client).run_id, "", "some.txt")
        locations[name] = client.get_experiment(store.experiment_id(client)).artifact_location
    one, three = ((tmp_path / name / ".kubealign" / "mlartifacts").as_uri() for name in ("one", "three"))
    assert locations == {"first": one, "shares it": one, "copy": three, "original": one}


def test_nothing_is_rebased_under_a_run_that_sees_the_home_by_another_path(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_home(project / ".kubealign", monkeypatch)
    with home_in_use():
        project.rename(project.with_name("elsewhere"))
        with pytest.raises(InputError, match="a run is using it under another path"):
            open_home(project.with_name("elsewhere"), monkeypatch)
    check_models(project.with_name("elsewhere"), open_home(project.with_name("elsewhere"), monkeypatch))


def first_run(barrier: Any) -> None:
    barrier.wait(60)
    start_run(store.client())


def test_several_first_runs_at_once_all_succeed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    started = [fork.Process(target=first_run, args=(barrier,)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0, 0]
    client = store.client()
    assert len(client.search_runs([store.experiment_id(client)])) == 3


ODD = 'it\'s "odd" #1 & 50% {a} [b] ;$c ~ +d=e @f, \\g 百分之百 ' + 120 * "x"


def test_a_first_run_works_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    client = open_home(folder, monkeypatch)
    run = start_run(client)
    client.log_text(run.run_id, "hello", "model/x.txt")
    client.create_registered_model("m")
    client.create_model_version("m", f"runs:/{run.run_id}/model", run_id=run.run_id)
    found = Path(mlflow.artifacts.download_artifacts(artifact_uri="models:/m/1", dst_path=str(tmp_path / "out")))
    assert (found / "x.txt").read_text() == "hello"
    assert names(folder) == {".kubealign"} and names(tmp_path) == {ODD, "out"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///.kubealign/mlflow.db")
    assert store.client().get_run(run.run_id).info.run_id == run.run_id


@pytest.mark.parametrize("name", ["why?", "a%20b", "per%cent", "two\nlines"])
@pytest.mark.parametrize("given", ["", "sqlite:///mlflow.db"])
def test_a_name_that_mlflow_cannot_have_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    move_home(folder / ".kubealign", monkeypatch)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(InputError, match="rename the folder"):
        store.client()
    assert not names(folder) and names(tmp_path) == {name}
