"""Steps of a run on this machine: forked from the run's child, which imports for all of them what they import.

A training step imports for about 10 s, any other for 3 to 6 s, mostly libraries that the steps before have imported.
"""

import atexit
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

from components.common.provenance import code_digest
from components.stages import STAGE_NAMES

EXECUTOR = "kfp.dsl.executor_main"
WITHOUT_TOKENIZER = ("resolve", "register")
"""Stages that need nothing of transformers, which imports torch: all that run when nothing has changed."""
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices of CUDA and ROCm, which a process that has touched them cannot hand to a fork."""


def run_step(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """Run a step with this process's own standard output; returns its exit code.

    Replaces `kfp.local.subprocess_task_handler.run_local_subprocess`, with the same arguments. KFP's decodes the output
    line by line: a byte that is not UTF-8 would end the run, and an endless line would have to fit in memory.
    """
    environment = {**os.environ, **(env_vars or {})}
    stage = _stage(full_command)
    if stage:
        _import(f"components.{stage}.stage", "components.engine.hardware", EXECUTOR, "mlflow")
        if stage not in WITHOUT_TOKENIZER:
            _import("transformers.models.auto.tokenization_auto", "transformers.modeling_rope_utils")
        if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("sqlite:"):
            _import("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store")
    if not stage or threading.active_count() > 1:
        return subprocess.run(full_command, env=environment, check=False).returncode
    _parse_the_code()
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "component.py"
        module.write_text(full_command[3], encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _execute(environment, ["--component_module_path", str(module), *full_command[4:]])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _stage(full_command: list[str]) -> str:
    """The stage that a command of KFP executes, if it may be forked here; else "".

    KFP's command is a line of sh that writes its second argument, the component, to a file for KFP's executor.
    """
    if sys.platform != "linux" or any(Path(device).exists() for device in GPUS):
        return ""
    if (
        full_command[:2] != ["sh", "-ec"]
        or EXECUTOR not in full_command[2]
        or "--function_to_execute" not in full_command
    ):
        return ""
    name = full_command[full_command.index("--function_to_execute") + 1]
    return name if name in STAGE_NAMES else ""


def _import(*modules: str) -> None:
    for module in modules:
        with suppress(ImportError):  # the step says what is missing
            importlib.import_module(module)


@cache
def _parse_the_code() -> None:
    """Digest each module's code here, once, for all steps that are forked later and ask for it."""
    for stage in STAGE_NAMES:
        code_digest(stage)


def _execute(environment: dict[str, str], arguments: list[str]) -> NoReturn:
    """Be the step: run KFP's executor in this process, which was just forked, and end."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment, _KFP_RUNTIME="true")
        sys.argv = [EXECUTOR, *arguments]
        del sys.modules[EXECUTOR]  # it runs as the main module
        runpy.run_module(EXECUTOR, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
