"""Real servers for tests, as context managers, on 127.0.0.1 and free ports."""

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.support import programs
from tests.support.waiting import wait_until

STARTS_WITHIN_S = 180
GRPC_ABOVE = 10_000


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> list[int]:
    """Distinct ports that are currently free, as are those 10 000 above, which SeaweedFS uses for gRPC."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = free_port()
            # In use, already ours, or above the highest port: try another.
            with suppress(OSError, OverflowError), ExitStack() as pair:
                for number in (port, port + GRPC_ABOVE):
                    pair.enter_context(socket.socket()).bind(("127.0.0.1", number))
                held.push(pair.pop_all())
                ports.append(port)
    return ports


@contextmanager
def server(
    command: list[str], environment: dict[str, str], log: Path, health: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until its health address answers with any status, and finally end its process group."""
    programs.check(command[0])
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            _await(health, process, log)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


class QuietHandler(BaseHTTPRequestHandler):
    """What the tests' own servers answer with; they write no log."""

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def serving(handler: type[QuietHandler], encrypted: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve in a thread of this process; gives the address."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if encrypted:
        listener.socket = encrypted.wrap_socket(listener.socket, server_side=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if encrypted else 'http'}://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        listener.server_close()


def make_certificate(key: Path, certificate: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that it signed itself, as PEM."""
    private = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")]), datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(address, critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key.write_bytes(pem)
    certificate.write_bytes(made.public_bytes(Encoding.PEM))


def _await(health: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    with suppress(AssertionError):  # the assertion below also shows the log
        wait_until(lambda: process.poll() is not None or _answers(health), f"{health} answers", STARTS_WITHIN_S, 0.1)
    assert process.poll() is None and _answers(health), f"{health} does not answer:\n{log.read_text()[-2000:]}"


def _answers(health: str) -> bool:
    """Whether the address answers, with any status."""
    try:
        urllib.request.urlopen(health, timeout=2).close()  # noqa: S310 - our own server
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def mlflow_server(folder: Path, *more: str, **environment: str) -> Iterator[str]:
    """A real MLflow server with SQLite and a folder for artifacts; yields its address."""
    address = f"http://127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", address.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *more]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment
    with server(command, environment, folder / "mlflow.log", f"{address}/health"):
        yield address


ADMIN = ("admin", "a-password-for-tests")


@contextmanager
def mlflow_server_with_users(folder: Path) -> Iterator[str]:
    """A real MLflow server with basic-auth: ADMIN may do everything, other users may only read what is not theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "only-for-tests"}
    with mlflow_server(folder, "--app-name", "basic-auth", **secrets) as address:
        yield address


@dataclass
class Faulty:
    """A proxy in front of a server; `fails` maps a request (method, path) to a fault: `500`, `close`, or empty."""

    address: str
    fails: Callable[[str, str], str] = lambda method, path: ""
    seen: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def faulty_proxy(target: str) -> Iterator[Faulty]:
    """Start a proxy that fails on demand in front of a server."""
    host = target.removeprefix("http://")

    class Handler(QuietHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            proxy.seen.append((self.command, path))
            fault = proxy.fails(self.command, path)
            if fault == "close":
                self.close_connection = True
                return
            if fault:
                status, content, kind = int(fault), b'{"error_code": "INTERNAL_ERROR"}', "application/json"
                if fault == "404":  # as a server says it that has no such route
                    content, kind = b"<!doctype html><title>404 Not Found</title>", "text/html"
            else:
                upstream = http.client.HTTPConnection(host)
                headers = {name: value for name, value in self.headers.items() if name != "Host"}
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                status, content = response.status, response.read()
                kind = response.headers.get("Content-Type", "application/octet-stream")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    with serving(Handler) as address:
        proxy = Faulty(address)
        yield proxy


@contextmanager
def git_http_server(folder: Path) -> Iterator[str]:
    """Serve the git repositories in a folder over HTTP with git's own backend; yields the address."""

    class Handler(QuietHandler):
        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self) -> None:
            body, (path, _, query) = self.body(), self.path.partition("?")
            request = {"PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": self.command}
            request |= {"CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body))}
            request |= {"HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", "")}
            served = {"GIT_PROJECT_ROOT": str(folder), "GIT_HTTP_EXPORT_ALL": "1"}
            backend = subprocess.run(
                ["git", "http-backend"], input=body, env=os.environ | served | request, capture_output=True, check=True
            )
            head, _, content = backend.stdout.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
            self.send_response(int(fields.pop("Status", "200").split()[0]))
            for name, value in (fields | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

    with serving(Handler) as address:
        yield address


@dataclass(frozen=True)
class S3:
    """A real S3-compatible store (SeaweedFS) with one bucket."""

    endpoint: str
    bucket: str
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]"


@contextmanager
def s3_server(folder: Path, port: int = 0) -> Iterator[S3]:
    """SeaweedFS with its data below `folder`; restarted with the same folder and port, it has the same content."""
    first, *others = free_ports(4)
    port = port or first
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "kubealign", "AWS_SECRET_ACCESS_KEY": "a-key-for-tests-only"}
    environment = {**os.environ, **keys}
    command = [str(Path(sys.executable).with_name("weed")), "mini", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", f"-s3.port={port}", "-bucket=kubealign", "-admin.ui=false", "-webdav=false"]
    command += ["-master.telemetry=false", "-s3.port.iceberg=0"]
    command += [f"-{name}.port={number}" for name, number in zip(("master", "volume", "filer"), others, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    more = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with server(command, environment, folder / "weed.log", endpoint) as process:
        await_bucket(endpoint, "kubealign", keys)
        yield S3(endpoint, "kubealign", keys | more, process)


def await_bucket(endpoint: str, bucket: str, keys: dict[str, str]) -> None:
    """Wait for the bucket: the store answers before it has created it."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    named = {name.lower(): value for name, value in keys.items()}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **named)

    def exists() -> bool:
        try:
            client.head_bucket(Bucket=bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    wait_until(exists, f"the bucket {bucket}", STARTS_WITHIN_S)
