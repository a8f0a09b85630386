"""How the parent of a local run reads its steps: by events, from whatever KFP's local runner and the steps print."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local
from kfp.local import cache, subprocess_task_handler
from kfp.local.config import LocalExecutionConfig
from rich.console import Console

from components.common.errors import StepFailedError
from components.tracking.events import EVENTS_VARIABLE, EventReader
from pipelines.local import child, runner, steps
from pipelines.local.display import Display


@pytest.fixture
def events_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events.jsonl"
    path.touch()
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    return path


CHATTY = r"""
import os, sys
from components.tracking import events
raw = sys.stdout.buffer
raw.write(b"[error:1] sft a sentence is no event\n    [stage] evaluate started\n")
raw.write(b"Task \x1b[96m'dpo'\x1b[0m cache hit (key=1); skipping execution.\n\xff\xfe 12%|#\r13%|#")
raw.flush()
events.cached("fetch")
events.started("sft")
events.note("sft", "resuming after step 3")
raw.write(b"x" * 300_000)
raw.flush()
events.error("sft", "rows.jsonl:17: no", 2)
os.write(2, b"no newline at the end")
sys.exit(2)
"""


def follow(program: str, events_file: Path, folder: Path) -> tuple[str, bytes, runner.ChildState, int]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ)
    )
    state = runner.ChildState()
    console = Console(record=True, force_terminal=False, file=io.StringIO(), width=200)
    runner._follow(process, folder / "log.txt", EventReader(events_file), state, Display(console))
    return console.export_text(), (folder / "log.txt").read_bytes(), state, process.wait()


def test_the_parent_believes_events_and_keeps_the_output_as_it_is(events_file: Path, tmp_path: Path) -> None:
    shown, log, state, code = follow(CHATTY, events_file, tmp_path)
    assert shown.splitlines() == ["fetch: cached", "sft: started", "sft: resuming after step 3"]
    assert code == 2 and state.stage == "sft"
    assert b"\xff\xfe 12%|#\r13%|#" in log and b"x" * 300_000 in log and log.endswith(b"no newline at the end")
    with pytest.raises(StepFailedError, match=r"^sft: rows.jsonl:17: no\n\(full log: ") as error:
        runner._fail(state, tmp_path / "log.txt")
    assert error.value.exit_code == 2


def test_a_step_that_dies_without_a_word_is_named(events_file: Path, tmp_path: Path) -> None:
    program = "import os; from components.tracking import events; events.started('sft'); os.kill(os.getpid(), 9)"
    _, _, state, code = follow(program, events_file, tmp_path)
    with pytest.raises(StepFailedError, match="sft ended without a message, possibly killed: out of memory"):
        runner._fail(state, tmp_path / "log.txt")
    assert code == -9


# ---- KFP's local runner


@pytest.fixture
def kfp_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP's local runner with a cache; everything that is changed in KFP is changed back."""
    monkeypatch.setattr(LocalExecutionConfig, "instance", None)
    monkeypatch.setattr(cache, "LocalCache", cache.LocalCache)
    run_subprocess = subprocess_task_handler.run_local_subprocess
    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", run_subprocess)
    monkeypatch.chdir(tmp_path)


def start_kfp(folder: Path) -> None:
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "steps"),
        workspace_root=str(folder / "workspace"),
        enable_caching=True,
        cache_root=str(folder / "cache"),
    )


@dsl.component(base_image="python", install_kfp_package=False)
def double(value: int) -> int:
    return 2 * value


@dsl.component(base_image="python", install_kfp_package=False)
def increment(value: int) -> int:
    return value + 1


@dsl.pipeline(name="two-steps")
def two_steps(value: int = 1) -> None:
    first = increment(value=value)
    double(value=first.output)


def test_kfp_reports_each_step_that_it_serves_from_its_cache(kfp_local: None, tmp_path: Path) -> None:
    cached: list[str] = []
    child.report_cached_steps(cached.append, tmp_path, tmp_path)
    start_kfp(tmp_path)
    two_steps(value=1)
    assert cached == []
    two_steps(value=1)
    assert cached == ["increment", "double"]
    two_steps(value=2)
    assert cached == ["increment", "double"]


@dsl.component(base_image="python", install_kfp_package=False)
def copy(order: str, made: dsl.Output[dsl.Artifact]) -> None:
    from pathlib import Path

    Path(made.path).write_text(order)


@dsl.component(base_image="python", install_kfp_package=False)
def read(made: dsl.Input[dsl.Artifact]) -> str:
    from pathlib import Path

    return Path(made.path).read_text()


@dsl.pipeline(name="with-files")
def with_files(order: str) -> None:
    read(made=copy(order=order).outputs["made"])


@pytest.mark.parametrize("remains", [False, True])
def test_a_moved_or_copied_project_is_served_from_its_own_cache(kfp_local: None, tmp_path: Path, remains: bool) -> None:
    cached: list[str] = []

    def run(name: str) -> None:
        project = tmp_path / name
        child.report_cached_steps(cached.append, project / "home", project)
        start_kfp(project / "home")
        with_files(order=json.dumps({"data_repo": str(project), "beta": 0.1}))

    original_cache = cache.LocalCache
    run('first "one"')
    assert cached == []
    shutil.copytree(tmp_path / 'first "one"', tmp_path / "second")
    if not remains:
        shutil.rmtree(tmp_path / 'first "one"')
    cache.LocalCache = original_cache
    run("second")
    assert cached == ["copy", "read"]
    shutil.rmtree(tmp_path / "second" / "home" / "steps")
    cache.LocalCache = original_cache
    run("second")
    assert cached == ["copy", "read"]  # the other's files are not ours


@dsl.component(base_image="python", install_kfp_package=False)
def speak(code: int) -> None:
    import os

    os.write(1, b"\xff\xfe colours \x1b[31m and no end")
    os._exit(code)


@dsl.pipeline(name="speaks")
def speaks(code: int = 0) -> None:
    speak(code=code)


def test_a_byte_that_is_not_utf8_ends_a_run_by_kfps_own_function_and_not_by_ours(
    kfp_local: None, tmp_path: Path, capfdbinary: Any
) -> None:
    start_kfp(tmp_path)
    with pytest.raises(UnicodeDecodeError):  # should KFP have fixed this, ours can go
        speaks(code=0)
    subprocess_task_handler.run_local_subprocess = steps.run_step
    with pytest.raises(RuntimeError):
        speaks(code=3)
    assert b"\xff\xfe colours \x1b[31m and no end" in capfdbinary.readouterr().out
