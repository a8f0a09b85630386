"""What a data repository may say about where its data is: an allow-list over its DVC configuration and its imports.

Whoever may push to a data repository decides over rows, never over the machine that reads them. DVC's configuration
could name files with programs in them (`configpath`, `credentialpath`, `profile`), other keys, other servers to sign
requests for, and folders to write to; a DVC import, a repository to log in to. Such options belong to the machine:
.dvc/config.local, which git does not track, or the environment.
"""

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components.common.errors import InputError
from components.common.limits import ANSWER_S
from components.common.urls import parse_url
from components.tracking.store import in_pod

ALLOWED = {
    "core": {"remote", "analytics", "check_update", "autostage", "no_scm", "hardlink_lock"},
    "cache": {"type", "shared", "slow_link_warning"},
    "remote": {"url", "endpointurl", "region", "version_aware"},
}
"""The options that .dvc/config of a data repository may set, by section."""
CONFIG, LOCAL_CONFIG = ".dvc/config", ".dvc/config.local"
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
SSH_COMMAND = f"ssh -o StrictHostKeyChecking=yes -o ConnectTimeout={ANSWER_S:.0f}"
AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn")


def check_repository(repo: Any, name: str, url: bool) -> None:
    """Check an opened DVC repository, before anything is read through its remotes.

    Args:
        repo: DVC's `Repo`, at the revision that is read.
        name: the repository and revision, for messages.
        url: whether it was cloned from a URL, so that every file in it is its owner's word.

    Raises:
        InputError: its configuration sets an option that is not its to set, or it imports from elsewhere.
    """
    from dvc.config import Config
    from dvc.fs import localfs

    root = Path(getattr(repo.scm, "root_dir", repo.root_dir))
    if (root / LOCAL_CONFIG).exists() if url else _is_tracked(root, LOCAL_CONFIG):
        raise InputError(f"{name}: {LOCAL_CONFIG} is committed; it belongs to one machine: `git rm --cached` it")
    # At the revision, and as checked out: DVC takes the default remote of a local repository from there.
    configs = ((repo.fs, repo.dvc_dir and repo.fs.join(repo.dvc_dir, "config")), (localfs, str(root / CONFIG)))
    for fs, path in configs:
        if path and fs.exists(path):
            _check_config(Config.load_file(path, fs), name)
    for stage in repo.index.stages:
        if stage.is_import:
            raise InputError(
                f"{name}: {stage.relpath} is a DVC import ({stage.deps[0]}), which is read from elsewhere; commit the"
                " data itself: `dvc add` it"
            )


def require_host_keys() -> None:
    """Let git over ssh go through OpenSSH, which knows the keys of hosts; DVC's own ssh accepts every host.

    Raises:
        InputError: OpenSSH is not installed.
    """
    if os.environ.get("GIT_SSH_COMMAND") or os.environ.get("GIT_SSH"):
        return
    if not shutil.which("ssh"):
        raise InputError("ssh: no such program on the PATH, and a repository by ssh needs it; name its https URL")
    os.environ["GIT_SSH_COMMAND"] = SSH_COMMAND


def _is_tracked(root: Path, path: str) -> bool:
    from dulwich.repo import Repo

    with Repo(str(root)) as repo:
        return path.encode() in repo.open_index()


def _check_config(config: dict[str, Any], name: str) -> None:
    for section, options in config.items():
        named = options.items() if section == "remote" else [("", options)]
        for entry, values in named:
            where = f"{name}: {CONFIG}: {section}{f' {entry}' if entry else ''}"
            unknown = sorted(set(values) - ALLOWED.get(section, set()))
            if unknown:
                expected = ", ".join(sorted(ALLOWED.get(section, ()))) or "no such section"
                raise InputError(
                    f"{where}: {', '.join(unknown)} may not be set by a data repository; expected {expected}: set it in"
                    f" {LOCAL_CONFIG} (`dvc config --local`) or by environment variables"
                )
            if section == "remote":
                _check_remote(values, where)


def _check_remote(values: dict[str, str], where: str) -> None:
    """Check where a remote is: in S3, at an https address, or in a folder of this machine."""
    url, endpoint = values.get("url", ""), values.get("endpointurl", "")
    pod = in_pod()
    try:
        if "://" in url:
            parse_url(url, ("s3", "https") if pod else ("s3", "https", "http"))
        elif pod:
            raise ValueError("a pod sees no folder of another machine; expected s3://bucket/prefix")
        if endpoint:
            _check_endpoint(endpoint)
    except ValueError as error:
        raise InputError(f"{where}: {error}, found {urlsplit(endpoint or url).hostname or 'a path'}") from error


def _check_endpoint(endpoint: str) -> None:
    """An endpoint gets requests signed with this machine's key: only AWS itself, and the one the machine names.

    Raises:
        ValueError: another host.
    """
    ours = {os.environ.get(variable, "").rstrip("/") for variable in ENDPOINT_VARIABLES} - {""}
    if endpoint.rstrip("/") in ours:
        return
    host = parse_url(endpoint, ("https",)).hostname or ""
    if not host.endswith(AWS_DOMAINS):
        raise ValueError(
            "endpointurl is neither AWS's nor the one of this machine; expected the value of AWS_ENDPOINT_URL"
            " (cluster.s3_endpoint)"
        )
