"""The whole DAG in our images under a real container engine, and exit codes that can be trusted.

`make images` has built the images. Without an engine these tests are skipped with a line that says so; with CI=true
that is a failure.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError
from components.common.images import DATA_IMAGE, TRAIN_IMAGE
from components.stages import STAGE_NAMES
from pipelines.local import containers
from tests.conftest import ROOT, environment_without_home
from tests.containers.conftest import IMAGE_USER
from tests.support.waiting import wait_until

pytestmark = pytest.mark.containers

MB = 1_000_000
FEW_STEPS = [
    "model.max_length=256",
    "sft.max_steps=2",
    "dpo.max_steps=2",
    "evaluate.generations_per_language=1",
    "evaluate.max_new_tokens=8",
    "evaluate.bootstrap_resamples=1000",
    "validate.min_rows=4",
]


class Project:
    """A project folder with real data and a tiny model where the embedded one is; its home belongs to the images' user,
    who is not root.
    """

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.root = folder / "project"
        self.root.mkdir(mode=0o755)
        for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / ".dvc", self.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
        for name in ("preferences", "instructions"):
            shutil.copytree(ROOT / "data" / name, self.root / "data" / name)
        shutil.copytree(tiny, self.root / "data" / "base_model")
        (self.root / "data" / "base_model" / "model.safetensors").chmod(
            0o644
        )  # safetensors writes it for its owner alone
        self.home = self.root / ".kubealign"
        self.home.mkdir()
        os.chown(self.home, IMAGE_USER, 0)
        for parent in folder.parents:
            if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):  # noqa: S108 - pytest's folders are 0700
                parent.chmod(parent.stat().st_mode | 0o011)
        folder.chmod(0o755)
        self.environment = environment_without_home()

    def words(self, command: str, *sets: str) -> list[str]:
        options = [word for setting in [*FEW_STEPS, *sets] for word in ("--set", setting)] if command == "run" else []
        runner = ["--runner", "docker"] if command == "run" else ["--json"]
        program = [sys.executable, "-P", "-m", "pipelines.cli", command, "--project", str(self.root)]
        return [*program, *runner, *options]

    def run(self, *sets: str) -> subprocess.CompletedProcess[str]:
        words = self.words("run", *sets)
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def report(self) -> dict[str, Any]:
        words = self.words("report")
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def left(self, client: Any) -> list[Any]:
        found: list[Any] = client.containers.list(all=True, filters={"label": f"{containers.HOME_LABEL}={self.home}"})
        return found


@pytest.fixture(scope="module")
def project(client: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("containers"), tiny_model)


@pytest.fixture(scope="module")
def first(project: Project) -> dict[str, Any]:
    project.run()
    return project.report()


def test_the_whole_dag_runs_in_our_images_and_registers_a_model(
    project: Project, first: dict[str, Any], client: Any
) -> None:
    assert set(first["stages"]) == set(STAGE_NAMES)
    assert all(stage["seconds"] > 0 and not stage["cached"] for stage in first["stages"].values())
    assert first["model_uri"] == "models:/kubealign/1" and first["verdict"]["rules"]
    assert first["git_commit"] == client.images.get(DATA_IMAGE).labels["org.opencontainers.image.revision"]
    assert project.left(client) == []


def test_steps_are_not_root_and_what_they_write_belongs_to_the_homes_owner(
    project: Project, first: dict[str, Any]
) -> None:
    written = list((project.home / "steps").rglob("*.safetensors"))
    assert written and {path.stat().st_uid for path in written} == {IMAGE_USER}


def test_a_second_run_serves_all_but_resolve_and_register_from_the_cache(
    project: Project, first: dict[str, Any]
) -> None:
    assert project.run().stdout.count(": cached\n") == 5
    again = project.report()
    assert again["model_uri"] == first["model_uri"] and again["metrics"] == first["metrics"]


def test_the_registered_model_answers_outside_the_containers(project: Project, first: dict[str, Any]) -> None:
    import mlflow

    uri = f"sqlite:///{project.home}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    model = mlflow.pyfunc.load_model(first["model_uri"])
    answer = model.predict({"messages": [{"role": "user", "content": "Say yes."}]}, params={"max_new_tokens": 4})
    assert len(answer) == 1 and answer[0]


def ended_or_began(running: "subprocess.Popen[str]", checkpoints: Path, before: set[Path]) -> bool:
    """Whether a run has ended, or written a checkpoint of sft that was not there before."""
    return running.poll() is not None or bool(set(checkpoints.glob("sft-*/step-*")) - before)


def test_a_run_that_is_killed_in_training_goes_on_from_its_checkpoint(
    project: Project, first: dict[str, Any], client: Any, tmp_path: Path
) -> None:
    """After SIGKILL of everything the next run ends what was left, and resumes; SIGTERM leaves no container."""
    sets = ["sft.seed=7", "sft.max_steps=40", "sft.checkpoint_every_s=0.01", "sft.eval_every_steps=0"]
    checkpoints = project.home / "checkpoints"
    for number in (signal.SIGKILL, signal.SIGTERM):
        log = tmp_path / number.name
        with log.open("w") as out:
            running = subprocess.Popen(
                project.words("run", *sets), env=project.environment, stdout=out, start_new_session=True, text=True
            )
        before = set(checkpoints.glob("sft-*/step-*"))
        wait_until(partial(ended_or_began, running, checkpoints, before), "a checkpoint of sft", within_s=600)
        assert running.poll() is None, "the run ended before it could be killed"
        if number == signal.SIGKILL:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        running.wait()
    assert "resuming after step" in log.read_text()
    assert running.returncode == 128 + signal.SIGTERM and project.left(client) == []


@contextmanager
def cpu_load(n_processes: int) -> Iterator[None]:
    """Processes that only burn time, twice as many as there are cores."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def failing_runs(folder: Path, count: int, patch: pytest.MonkeyPatch) -> int:
    """Run a component that fails `count` times by KFP's DockerRunner as we set it up; returns how many runs failed."""
    from kfp import dsl, local

    @dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
    def fails() -> str:
        import os

        os._exit(3)

    arguments = {"data_section": '{"repo": "."}', "base_model": "none", "model_section": '{"chat_template": "model"}'}
    home = folder / "home"
    patch.setenv("KUBEALIGN_HOME", str(home))
    for name in ("steps", "workspace"):
        (home / name).mkdir(parents=True)
    runner = containers.runner(folder, arguments)
    local.init(runner, pipeline_root=str(home / "steps"), workspace_root=str(home / "workspace"))
    failed = 0
    with cpu_load(2 * (os.cpu_count() or 1)):
        for _ in range(count):
            try:
                fails()
            except RuntimeError:
                failed += 1
    return failed


def test_failing_steps_under_load_are_failures(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing_runs(tmp_path, 4, monkeypatch) == 4


@pytest.mark.long
def test_two_hundred_failing_steps_under_load_are_two_hundred_failures(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing_runs(tmp_path, 200, monkeypatch) == 200


def said(client: Any, image: str, words: list[str], **settings: Any) -> bytes:
    """All that a program in a container writes."""
    container = client.containers.create(image, words, **settings)
    try:
        return b"".join(containers.output(container))
    finally:
        container.remove(force=True)


@pytest.mark.parametrize("image", [DATA_IMAGE, TRAIN_IMAGE])
def test_an_image_works_with_a_read_only_root_no_network_and_no_root_user(client: Any, image: str) -> None:
    program = (
        "import os, sys, pathlib\n"
        "assert os.getuid() == 10001 and os.getgid() == 0\n"
        "assert pathlib.Path.cwd() == pathlib.Path('/work') and not list(pathlib.Path.cwd().iterdir())\n"
        "assert sys.flags.safe_path\n"
        "import components.config.loading, components.tracking.run\n"
        "assert not [p for p in pathlib.Path(components.__path__[0]).rglob('tests')]\n"
        "print('fine')\n"
    )
    confined = {"read_only": True, "network_mode": "none", "cap_drop": ["ALL"], "tmpfs": {"/tmp": ""}}  # noqa: S108
    assert said(client, image, ["python", "-c", program], **confined).strip() == b"fine"


def test_images_keep_to_their_sizes_and_hold_only_what_their_steps_import(client: Any) -> None:
    sizes = {image: client.images.get(image).attrs["Size"] for image in (DATA_IMAGE, TRAIN_IMAGE)}
    assert sizes[DATA_IMAGE] <= 900 * MB and sizes[TRAIN_IMAGE] <= 1900 * MB, sizes
    absent = {DATA_IMAGE: ("torch", "peft", "matplotlib"), TRAIN_IMAGE: ("dvc", "great_expectations", "pytest", "trl")}
    for image, modules in absent.items():
        program = "import importlib.util as u, sys; print([m for m in sys.argv[1:] if u.find_spec(m)])"
        assert said(client, image, ["python", "-c", program, *modules]).strip() == b"[]"


@pytest.mark.parametrize("image", [DATA_IMAGE, TRAIN_IMAGE])
def test_an_image_says_what_it_is_and_keeps_no_secret(client: Any, image: str) -> None:
    found = client.images.get(image)
    for name in ("source", "revision", "version", "licenses"):
        assert found.labels[f"org.opencontainers.image.{name}"]
    told = json.dumps([found.attrs["Config"]["Env"], found.history()])
    assert not re.search("(PASSWORD|TOKEN|SECRET|_KEY|INDEX_URL)=", told), told
    bill = json.loads(said(client, image, ["cat", "/opt/venv/sbom.cdx.json"]))
    names = {component["name"] for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX" and {"kfp", "mlflow-skinny"} <= names
    assert ("torch" in names) == (image == TRAIN_IMAGE)


def test_images_of_other_code_are_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "code_in_images", lambda: "other")
    with pytest.raises(InputError, match="`make images`"):
        containers.check_images(client)
