"""The job of a retraining: the checked-out commit, its data, and the key derived from both."""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from components.common.errors import InputError
from components.common.urls import is_url
from components.config.params import Config
from components.orders import Facts, with_keys
from components.sources.facts import resolve_facts
from pipelines.ci import outcome
from pipelines.ci.revisions import find_repository, is_own, origin
from pipelines.git import changed_files, find_commit
from pipelines.local.runner import with_absolute_paths
from pipelines.platform import for_its_hardware
from pipelines.project import run_config
from pipelines.terminal import terminal


@dataclass(frozen=True)
class Job:
    """One call of `kubealign ci retrain`."""

    root: Path
    config: Config
    """Has the data repository and commit as passed to the runner."""
    runner: str
    commit: str
    judges: str
    """The commit again, if the run is made of that and nothing else; empty where settings were overridden."""
    facts: Facts
    """Without the registry's champion."""
    rerun: bool
    out: Path
    retry_timeout_s: float
    timeout_s: float
    console: Console

    @property
    def key(self) -> str:
        """Identifies the model that a retraining would produce and how it would be evaluated."""
        return self.facts.config[:16]

    @property
    def request(self) -> outcome.RetrainRequest:
        return outcome.RetrainRequest(self.commit, self.key, self.facts.preferences_digest)

    def log(self, message: str) -> None:
        for line in message.splitlines():
            self.console.print(terminal(line, indented=True), soft_wrap=True)


def make_job(
    root: Path,
    overrides: list[str],
    runner: str,
    rerun: bool,
    out: Path,
    retry_timeout_s: float,
    timeout_s: float,
    console: Console,
) -> Job:
    """Resolve what to train: the commit, the data, and the key derived from both.

    Raises:
        InputError: the project has uncommitted changes, or the configuration names something that does not exist.
    """
    config = run_config(root, overrides)
    commit, own = _checkout(root, config)
    if own and any(override.strip().startswith("data.") for override in overrides):
        raise InputError(
            "--set data.…: the data is in this repository, so a retraining takes it from the checked-out commit;"
            " check out the commit you want"
        )
    local = _with_data(config, str(root), commit) if own else config
    facts = _facts(for_its_hardware(with_absolute_paths(local, root), runner))
    config = _with_data(config, own, commit) if own and runner == "kubeflow" else local
    if runner == "kubeflow":
        _check_reachable_from_cluster(config, own)
    judges = commit if all(override.strip().startswith("cluster.") for override in overrides) else ""
    return Job(root, config, runner, commit, judges, facts, rerun, out, retry_timeout_s, timeout_s, console)


def _facts(config: Config) -> Facts:
    """The facts of a run, with the keys of its orders; independent of the current champion."""
    model = config.model.resolved(config.model.hardware)
    sections = config.model_copy(update={"model": model}).sections()
    return with_keys(sections, resolve_facts(config.data, model))


def _checkout(root: Path, config: Config) -> tuple[str, str]:
    """The checked-out commit, and the URL (or path) of its repository if it also holds the data (otherwise empty).

    Raises:
        InputError: tracked files differ from the commit.
    """
    repo, folder = find_repository(root)
    changed = changed_files(repo)
    if changed:
        raise InputError(f"uncommitted changes in {', '.join(changed[:3])}; commit them first")
    own = is_own(repo, folder, config.data.repo)
    return find_commit(repo, "HEAD"), (origin(repo) or str(root)) if own else ""


def _with_data(config: Config, repo: str, commit: str) -> Config:
    data = config.data.model_copy(update={"repo": repo, "revision": commit})
    return config.model_copy(update={"data": data})


def _check_reachable_from_cluster(config: Config, own: str) -> None:
    if own and not is_url(own):
        raise InputError(
            "the repository has no remote `origin` with a URL, so Kubeflow cannot fetch the data from it; add one"
        )
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise InputError(
            "MLFLOW_TRACKING_URI is not set; the verdict is read from there: set it to the server of cluster.mlflow_uri"
            f" ({config.cluster.mlflow_uri}), at its address as seen from here"
        )
