"""`kubealign run --runner docker`: run the steps in our images on this machine, with reliable exit codes.

KFP's DockerRunner removes a container as soon as it exits and treats a missing one as a success, so under load a failed
step can pass; `run_container` replaces that part. Containers are labeled with the project's home folder, which only one
run at a time may use: whatever a killed run left behind is removed before the next one starts.
"""

import configparser
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import InputError, KubealignError, single_line
from components.common.files import digest, sha256_file
from components.common.images import DATA_IMAGE, TRAIN_IMAGE
from components.common.provenance import PACKAGES
from components.common.urls import is_url
from components.tracking import store
from components.tracking.keys import CACHE_KEY_VARIABLE, PUBLIC_KEYS_VARIABLE, SIGNING_KEY_VARIABLE, given_key

HOME_LABEL = "kubealign.home"
CODE_LABEL = "kubealign.code"
INHERITED = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_EXPERIMENT_NAME"),
    *("GIT_USERNAME", "GIT_PASSWORD", "GIT_HOST"),
    *("KUBEALIGN_EVENTS", "KUBEALIGN_PARENT_RUN", "KUBEALIGN_STATE"),
    *(PUBLIC_KEYS_VARIABLE, CACHE_KEY_VARIABLE),
    *("OMP_NUM_THREADS", "GOMP_SPINCOUNT"),
)
"""The environment variables that a step's container inherits from this process; no other does, whatever its name."""
STEP_FOLDERS = ("steps", "workspace", "checkpoints", "cache", "mlartifacts")
"""Folders below the home folder that steps write to, as its owner."""
SERVER_STARTS_WITHIN_S = 120
IN_IMAGES = (".py", ".html", ".jinja", ".css", ".js")
"""Suffixes of the files of the package `components` that the images contain."""
BUILT_BY = ("Containerfile", "build_image.sh", "gitconfig", "empty.cfg")
"""Files of it that decide how they are built."""


def code_in_images() -> str:
    """Digest of this project's part of the images: the package `components` and the locked package versions."""
    folder = PACKAGES / "components"
    kept = [path for path in folder.rglob("*") if path.suffix in IN_IMAGES or path.name in BUILT_BY]
    files = [path for path in kept if "tests" not in path.parts]
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    lock = PACKAGES / "requirements.lock"
    return digest([hashes, sha256_file(lock) if lock.is_file() else ""])[:16]


def engine() -> Any:
    """A client of the container engine (DOCKER_HOST, or the default socket).

    Raises:
        InputError: no container engine answers.
    """
    import docker

    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise InputError(
            "no container engine answers; start Docker, or name its socket in DOCKER_HOST, or run without"
            f" `--runner docker` ({single_line(str(error))[:200]})"
        ) from error
    return client


def check_images(client: Any) -> None:
    """Check that the images exist and were built from this code.

    Raises:
        InputError: an image is missing or outdated; `make images` builds it.
    """
    import docker

    for image in (DATA_IMAGE, TRAIN_IMAGE):
        try:
            labels = client.images.get(image).labels
        except docker.errors.ImageNotFound as error:
            raise InputError(f"image {image} is not built; `make images` builds it") from error
        if labels.get(CODE_LABEL) != code_in_images():
            raise InputError(f"image {image} was built from different code; `make images` rebuilds it")


def pushed_reference(client: Any, image: str) -> str:
    """An image's name with the digest that a registry gave it, which no later push moves.

    Raises:
        InputError: the image does not exist, or was not pushed.
    """
    import docker

    try:
        digests = client.images.get(image).attrs.get("RepoDigests") or []
    except docker.errors.ImageNotFound as error:
        raise InputError(f"image {image} is not built; `make images` builds it") from error
    repository = image.rpartition(":")[0]
    pushed: list[str] = [name for name in digests if name.startswith(f"{repository}@sha256:")]
    if not pushed:
        raise InputError(f"image {image} has no digest, because it was not pushed; run `docker push {image}`")
    return pushed[0]


def end_containers(client: Any) -> int:
    """Kill and remove every container of this home folder's steps; returns how many there were."""
    import docker

    containers = client.containers.list(all=True, filters={"label": f"{HOME_LABEL}={store.home()}"})
    for container in containers:
        try:
            container.remove(force=True)
        except docker.errors.NotFound:
            continue
        except docker.errors.APIError as error:
            if error.status_code != 409:  # its removal is already in progress
                raise
    return len(containers)


def run_container(
    client: Any, image: str, command: list[str], volumes: dict[str, Any], **container_run_args: Any
) -> int:
    """Run a step's container and stream its output to ours; returns the exit code that the engine recorded.

    Replaces `kfp.local.docker_task_handler.run_docker_container`, with the same arguments.
    """
    container = client.containers.create(image=image, command=command, volumes=volumes, **container_run_args)
    try:
        for chunk in output(container):
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)


def output(container: Any) -> Iterator[bytes]:
    """Start a container and yield all its output, by attaching: following its log occasionally loses the end."""
    chunks: Iterator[bytes] = container.attach(stream=True)
    container.start()
    return chunks


def runner(project: Path, arguments: dict[str, Any]) -> Any:
    """KFP's DockerRunner with our settings and `run_container`.

    A step's container uses this machine's network. It can read the data repository, the content of its local remotes,
    and a base model given as a path; it can write only to the home folder and /tmp, as the home
    folder's owner, without capabilities.
    """
    from docker.types import Mount
    from kfp import local
    from kfp.local import docker_task_handler

    docker_task_handler.run_docker_container = run_container
    home = store.home()
    owner = home.stat()
    return local.DockerRunner(
        network_mode="host",
        read_only=True,
        tmpfs={"/tmp": "rw,exec,mode=1777"},  # noqa: S108 - the container's own
        user=f"{owner.st_uid}:{owner.st_gid}",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        labels={HOME_LABEL: str(home)},
        environment=_environment(),
        mounts=[
            *(Mount(str(path), str(path), type="bind", read_only=True) for path in _read_only(project, arguments)),
            Mount(str(home), str(home), type="bind"),
        ],
    )


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name in INHERITED}
    if key := given_key():  # the text, as the path of a file means nothing in a container
        inherited[SIGNING_KEY_VARIABLE] = key.decode()
    return inherited | {"MLFLOW_TRACKING_URI": store.tracking_uri(), store.HOME_VARIABLE: str(store.home())}


def _read_only(project: Path, arguments: dict[str, Any]) -> list[Path]:
    """The local folders that the steps of a run with these arguments read, and no others; without nested ones."""
    repo = json.loads(arguments["data_section"])["repo"]
    paths = [project / arguments["base_model"]]
    if not is_url(repo):
        paths += [Path(repo), *_local_stores(Path(repo))]
    existing = {path.resolve() for path in paths if path.exists()} - {store.home().resolve()}
    nested = {path for path in existing if any(path != parent and path.is_relative_to(parent) for parent in existing)}
    return sorted(existing - nested)


def _local_stores(repo: Path) -> Iterator[Path]:
    """The content in the local folders that a DVC repository uses as remotes and cache.

    A commit of the repository chooses the folders, so of each no more than DVC's own part of it is mounted.
    """
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser()
        parser.read(repo / ".dvc" / name)
        for section in parser.values():
            for key in ("url", "dir"):
                if section.get(key) and "://" not in section[key]:
                    yield repo / ".dvc" / section[key] / "files" / "md5"


@contextmanager
def containers_for_a_run() -> Iterator[None]:
    """Prepare a run in containers: an engine, current images and an MLflow server; clean up afterwards.

    Raises:
        InputError: no container engine, no current images, or another run in containers uses this home folder.
    """
    client = engine()
    check_images(client)
    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    for name in STEP_FOLDERS:
        (home / name).mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(home / name, home.stat().st_uid, home.stat().st_gid)
    with (home / ".containers.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run in containers uses {home}; wait for it, or use another --project") from error
        end_containers(client)
        try:
            with mlflow_server():
                yield
        finally:
            end_containers(client)
            client.close()


@contextmanager
def mlflow_server() -> Iterator[None]:
    """Serve the local MLflow store over HTTP to steps that cannot open its SQLite file.

    No server is started if MLFLOW_TRACKING_URI already names one.
    """
    uri = store.tracking_uri()
    if uri.startswith("http"):
        yield
        return
    # Created here, the experiment stores artifacts in the home folder, where they can be read without the server.
    store.experiment_id(store.client())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
    args = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    args += ["--artifacts-destination", (store.home() / "mlartifacts").as_uri()]
    with (store.home() / "mlflow-server.log").open("w") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("mlflow")), *args], env=environment, stdout=log, stderr=log
        )
        try:
            _wait_until_healthy(address, server, Path(log.name))
            os.environ["MLFLOW_TRACKING_URI"] = address
            yield
        finally:
            os.environ["MLFLOW_TRACKING_URI"] = uri
            server.terminate()
            server.wait()


def _wait_until_healthy(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + SERVER_STARTS_WITHIN_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()  # noqa: S310 - our own server
            return
        except OSError:
            time.sleep(0.2)
    raise KubealignError(f"the MLflow server for this run did not start; see its log: {log}")
