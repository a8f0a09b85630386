"""Real servers that tests start for themselves, on 127.0.0.1 and free ports, and end again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STARTS_WITHIN_S = 60


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(words: list[str], environment: dict[str, str], log: Path, health: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until its health address answers (whatever the status), and end its process group."""
    with log.open("w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            _await(health, process, log)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


def _await(health: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=2).close()  # noqa: S310 - our own server
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{health} does not answer:\n{log.read_text()[-2000:]}")


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real MLflow server with SQLite and a folder of artifacts; gives its address."""
    address = f"http://127.0.0.1:{free_port()}"
    words = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--workers", "1"]
    words += ["--port", address.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    words += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with server(words, environment, folder / "mlflow.log", f"{address}/health"):
        yield address


@dataclass(frozen=True)
class S3:
    """A real S3-compatible store (SeaweedFS) with one bucket."""

    endpoint: str
    bucket: str
    environment: dict[str, str]


def _await_bucket(endpoint: str, keys: dict[str, str]) -> None:
    """It answers before it has made its bucket."""
    import boto3
    from botocore.exceptions import ClientError

    names = {"aws_access_key_id": keys["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": keys["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **names)
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            client.head_bucket(Bucket="kubealign")
            return
        except ClientError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def s3_server(folder: Path, port: int = 0) -> Iterator[S3]:
    """SeaweedFS with its data below `folder`; started again on the same folder and port it goes on as it was."""
    port = port or free_port()
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "kubealign", "AWS_SECRET_ACCESS_KEY": "a-key-for-tests-only"}
    environment = {**os.environ, **keys}
    words = [str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1"]
    words += ["-ip.bind=127.0.0.1", f"-s3.port={port}", "-bucket=kubealign", "-admin.ui=false", "-webdav=false"]
    words += ["-master.telemetry=false", "-s3.port.iceberg=0"]
    words += [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
    folder.mkdir(parents=True, exist_ok=True)
    more = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with server(words, environment, folder / "weed.log", endpoint):
        _await_bucket(endpoint, keys)
        yield S3(endpoint, "kubealign", keys | more)
