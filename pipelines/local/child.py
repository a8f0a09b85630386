"""The child process in which KFP's local runner runs the pipeline; `kubealign run` starts it and reads what it prints.

It leads a process group of its own, so that ending the group ends every step; it ends it itself when its parent dies.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1


def end_group(number: int = 0, frame: FrameType | None = None) -> None:
    """End this process and every step it started."""
    os.killpg(0, signal.SIGKILL)


def end_containers_too(number: int = 0, frame: FrameType | None = None) -> None:
    """The same, when the steps run in containers, which are no children of this process."""
    from pipelines.local.containers import end_containers, engine

    try:
        end_containers(engine())
    finally:
        end_group()


def main() -> None:
    """Run the pipeline described on standard input: {"project", "arguments", "home", "store", "runner",
    "caching"}."""
    signal.signal(signal.SIGTERM, end_group)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    order = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="kfp")
    # KFP says that a task was served from the cache only to the root logger.
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    from kfp import local

    from components.common.files import digest
    from components.config.loading import load_config
    from components.config.sections import PARAMS
    from components.tracking.run import explain_os_error, one_line
    from pipelines.alignment import build_pipeline
    from pipelines.local.containers import runner as container_runner

    home, project = Path(order["home"]), Path(order["project"])
    config = load_config(project / PARAMS)
    if order["runner"] == "docker":
        signal.signal(signal.SIGTERM, end_containers_too)
        runner = container_runner(project, order["arguments"])
    else:
        runner = local.SubprocessRunner(use_venv=False)
    local.init(
        runner=runner,
        pipeline_root=str(home / "steps"),
        workspace_root=str(home / "workspace"),
        enable_caching=order["caching"],
        # A cached step names its run in MLflow, so the cache belongs to one MLflow store.
        cache_root=str(home / "steps" / f"cache-{digest(order['store'])[:12]}"),
    )
    pipeline = build_pipeline(config)
    try:
        pipeline(**order["arguments"])
    except RuntimeError as error:
        # The step has said on its own what went wrong; KFP only adds which step it was.
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"[error:1] pipeline {one_line(explain_os_error(error))}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
