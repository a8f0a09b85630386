"""What a retraining is to train: the commit that is checked out, its data, and the key that they have."""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from components.common.errors import InputError
from components.config.params import Config
from components.orders import Facts, with_keys
from components.sources.data import is_url
from components.sources.facts import resolve_facts
from pipelines.ci import outcome
from pipelines.ci.revisions import find_repository, is_own, origin
from pipelines.git import changed_files, find_commit
from pipelines.local.runner import with_absolute_paths
from pipelines.platform import for_its_hardware
from pipelines.project import run_config


@dataclass(frozen=True)
class Job:
    """One call of the command."""

    root: Path
    config: Config
    """With the data's repository and commit as the runner gets them."""
    runner: str
    commit: str
    facts: Facts
    """Without the champion of the registry."""
    rerun: bool
    out: Path
    retry_timeout_s: float
    timeout_s: float
    console: Console

    @property
    def key(self) -> str:
        """Names what a retraining would make and how it would be judged."""
        return self.facts.config[:16]

    @property
    def request(self) -> outcome.RetrainRequest:
        return outcome.RetrainRequest(self.commit, self.key, self.facts.preferences_digest)

    def log(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


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
    """Settle what is to be trained: which commit, which data, and the key that they have.

    Raises:
        InputError: the project has uncommitted changes, or something that is named is not there.
    """
    config = run_config(root, overrides)
    commit, own = _checkout(root, config)
    if own and any(override.strip().startswith("data.") for override in overrides):
        raise InputError("the data is in this repository: a retraining takes it from the commit that is checked out")
    local = _with_data(config, str(root), commit) if own else config
    facts = _facts(for_its_hardware(with_absolute_paths(local, root), runner))
    config = _with_data(config, own, commit) if own and runner == "kubeflow" else local
    if runner == "kubeflow":
        _refuse_what_only_this_machine_has(config, own)
    return Job(root, config, runner, commit, facts, rerun, out, retry_timeout_s, timeout_s, console)


def _facts(config: Config) -> Facts:
    """The facts of a run, with the keys that its orders have, whoever is champion."""
    model = config.model.resolved(config.model.hardware)
    sections = config.model_copy(update={"model": model}).sections()
    return with_keys(sections, resolve_facts(config.data, model))


def _checkout(root: Path, config: Config) -> tuple[str, str]:
    """The commit that is checked out, and the URL (or path) of its repository when the data is in it.

    Raises:
        InputError: tracked files differ from the commit.
    """
    repo, folder = find_repository(root)
    changed = changed_files(repo)
    if changed:
        raise InputError(f"{', '.join(changed[:3])} differ from the commit that is checked out; commit first")
    own = is_own(repo, folder, config.data.repo)
    return find_commit(repo, "HEAD"), (origin(repo) or str(root)) if own else ""


def _with_data(config: Config, repo: str, commit: str) -> Config:
    data = config.data.model_copy(update={"repo": repo, "revision": commit})
    return config.model_copy(update={"data": data})


def _refuse_what_only_this_machine_has(config: Config, own: str) -> None:
    if own and not is_url(own):
        raise InputError("the repository has no remote `origin` with a URL, from which Kubeflow could get the data")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise InputError(
            f"MLFLOW_TRACKING_URI is not set; the verdict is read there: the server of cluster.mlflow_uri"
            f" ({config.cluster.mlflow_uri}), as it is reached from here"
        )
