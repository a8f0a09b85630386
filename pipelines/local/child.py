"""The child process in which KFP's local runner executes the pipeline; `kubealign run` starts it and reads its events.

It leads its own process group, so killing the group ends every step; it kills the group itself when its parent dies.
"""

import ctypes
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1


def end_group(number: int = 0, frame: FrameType | None = None) -> None:
    """Kill this process and every step it started."""
    os.killpg(0, signal.SIGKILL)


def end_containers_too(number: int = 0, frame: FrameType | None = None) -> None:
    """Also end steps that run in containers, which are not children of this process."""
    from pipelines.local.containers import end_containers, engine

    try:
        end_containers(engine())
    finally:
        end_group()


def report_cached_steps(report: Callable[[str], None], home: Path, project: Path) -> None:
    """Make KFP's local runner report the name of each task that it serves from its cache, wherever the home folder is.

    KFP itself only logs a sentence for a cache hit. Its orchestrator calls `kfp.local.cache.LocalCache` for each task
    in turn: first for the key, with the component's name, then for the outputs under that key. KFP's keys and entries
    hold absolute paths; ours know those in the home and the project folder by their place in it.
    """
    from kfp.local import cache
    from kfp.local.cache import LocalCache

    root = f"{home}/"
    in_orders = json.dumps(str(project), ensure_ascii=False)[1:-1]

    class ReportingCache(cache.LocalCache):  # type: ignore[misc]
        """KFP's cache, reporting hits and holding no path of this machine."""

        @staticmethod
        def _serialize_value_for_key(value: Any) -> Any:
            if isinstance(value, str):
                return value.replace(in_orders, "<project>")
            found = LocalCache._serialize_value_for_key(value)
            if isinstance(found, dict) and "uri" in found:
                found["uri"] = found["uri"].removeprefix(root)
            return found

        @staticmethod
        def _serialize_artifact(artifact: Any) -> dict[str, Any]:
            found: dict[str, Any] = LocalCache._serialize_artifact(artifact)
            return found | {"uri": found["uri"].removeprefix(root)}

        @staticmethod
        def _deserialize_artifact(data: dict[str, Any]) -> Any:
            return LocalCache._deserialize_artifact(data | {"uri": str(home / data["uri"])})

        def __init__(self, cache_root: str) -> None:
            super().__init__(cache_root)
            self._stages: dict[str, str] = {}

        def compute_key(self, component_name: str, **inputs: Any) -> str:
            """Remember which stage a key belongs to."""
            key = str(super().compute_key(component_name=component_name, **inputs))
            self._stages[key] = component_name.removeprefix("comp-")
            return key

        def get(self, key: str) -> Any:
            """Report a hit."""
            outputs = super().get(key)
            if outputs is not None:
                report(self._stages[key])
            return outputs

    cache.LocalCache = ReportingCache


def main() -> None:
    """Run the pipeline described on standard input: {"project", "arguments", "home", "store", "runner",
    "caching"}."""
    signal.signal(signal.SIGTERM, end_group)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    request = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="kfp")
    from kfp import local
    from kfp.local import subprocess_task_handler

    from components.common.files import digest
    from components.common.foreign import one_line
    from components.config.params import PARAMS, load_config
    from components.tracking import events
    from components.tracking.errors import explain_os_error
    from pipelines.alignment import build_pipeline
    from pipelines.local.containers import runner as container_runner
    from pipelines.local.steps import run_step

    home, project = Path(request["home"]), Path(request["project"])
    config = load_config(project / PARAMS)
    if request["runner"] == "docker":
        signal.signal(signal.SIGTERM, end_containers_too)
        runner = container_runner(project, request["arguments"])
    else:
        subprocess_task_handler.run_local_subprocess = run_step
        runner = local.SubprocessRunner(use_venv=False)
    report_cached_steps(events.cached, home, project)
    local.init(
        runner=runner,
        pipeline_root=str(home / "steps"),
        workspace_root=str(home / "workspace"),
        enable_caching=request["caching"],
        # Cached outputs contain MLflow run ids, so each MLflow store has a cache of its own.
        cache_root=str(home / "steps" / f"cache-{digest(request['store'].replace(str(home), ''))[:12]}"),
    )
    pipeline = build_pipeline(config)
    try:
        pipeline(**request["arguments"])
    except RuntimeError as error:
        # The step has reported its own error; KFP only adds the step's name.
        print(one_line(error), file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        events.error("pipeline", explain_os_error(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
