"""What k8s/overlays/dev runs, as processes of this machine: the commands, environment and scripts of the manifests.

Only places differ: a pod's host names, ports and paths become 127.0.0.1, free ports and a temporary folder.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.services import await_bucket, free_ports, server
from tests.support.waiting import wait_until
from tests.tools.manifests import build

SECRETS = {
    "kubealign-database": {"password": "database-secret"},
    "kubealign-mlflow-server": {
        "admin_username": "admin",
        "admin_password": "an-admin-secret",
        "flask_secret_key": "a-flask-secret",
    },
    "kubealign-mlflow": {"username": "pipeline", "password": "a-pipeline-secret"},
    **{
        f"kubealign-s3-{name}": {"access_key": f"kubealign-{name}", "secret_key": f"a-secret-of-{name}"}
        for name in ("mlflow", "backups", "state", "data", "contributors")
    },
}
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]


class Cluster:
    """The dev overlay on this machine.

    Args:
        folder: for data, scripts and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests = build("dev")
        names = ("postgres", "mlflow", "seaweedfs", "master", "volume", "filer")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.mlflow_uri = f"http://127.0.0.1:{self.ports['mlflow']}"
        for name, place in (("scripts", "scripts"), ("identities", "scripts"), ("mlflow", "mlflow")):
            for key, text in self.find("ConfigMap", name)["data"].items():
                (folder / place).mkdir(exist_ok=True)
                (folder / place / key).write_text(text)

    def find(self, kind: str, name: str) -> Any:
        """A manifest; config maps by the name before their hash."""
        for manifest in self.manifests:
            found = manifest["metadata"]["name"]
            if manifest["kind"] == kind and (
                found == name or (kind == "ConfigMap" and found.rpartition("-")[0] == name)
            ):
                return manifest
        raise AssertionError(f"no {kind} {name}")

    def container(self, kind: str, name: str, number: int = 0) -> Any:
        """A container of a workload, init containers first."""
        spec = self.find(kind, name)["spec"]
        pod = (spec["jobTemplate"]["spec"] if kind == "CronJob" else spec)["template"]["spec"]
        return [*pod.get("initContainers", []), *pod["containers"]][number]

    def environment(self, container: Any) -> dict[str, str]:
        """A container's environment, secrets filled in, and nothing else but this machine's path."""
        found = {
            "PATH": ":".join(map(str, [Path(sys.executable).parent, *POSTGRES, "/usr/bin", "/bin"])),
            "HOME": str(self.folder),
        }
        found |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": ""}
        for source in container.get("envFrom", []):
            name = source["configMapRef"]["name"].rpartition("-")[0]
            found |= {key: self.here(value) for key, value in self.find("ConfigMap", name)["data"].items()}
        for entry in container.get("env", []):
            if "value" in entry:
                found[entry["name"]] = self.here(entry["value"])
            else:
                ref = entry["valueFrom"]["secretKeyRef"]
                found[entry["name"]] = SECRETS[ref["name"]][ref["key"]]
        if "PGHOST" in found:
            found |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        return found

    def here(self, text: str) -> str:
        """A word of a manifest with this machine's places."""
        for name, port in (("seaweedfs", 8333), ("mlflow", 5000)):
            text = text.replace(f"http://{name}:{port}", f"http://127.0.0.1:{self.ports[name]}")
        places = {"/etc/mlflow": "mlflow", "/scripts": "scripts", "/backup/": "backup/", "/identities/": "identities/"}
        for inside, outside in places.items():
            if text.startswith(inside):
                (self.folder / outside).mkdir(exist_ok=True)
                text = text.replace(inside, f"{self.folder}/{outside}", 1)
        return text

    def run(self, name: str, number: int = 0, **more: str) -> str:
        """Run a container of a cron job to its end; gives what it said."""
        container = self.container("CronJob", name, number)
        words = [self.here(word) for word in [*container.get("command", []), *container.get("args", [])]]
        words[0] = sys.executable if words[0] == "python" else words[0]
        environment = self.environment(container) | more
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        assert not any(
            secret in done.stdout + done.stderr
            for values in SECRETS.values()
            for secret in values.values()
            if "secret" in secret
        )
        return done.stdout

    @contextmanager
    def mlflow(self) -> Iterator[str]:
        """The Deployment's server; gives its address."""
        container = self.container("Deployment", "mlflow")
        changed = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self.ports['mlflow']}"}
        words = [changed.get(word, word) for word in container["args"]]
        assert not [word for word in changed if word not in container["args"]]
        words[0] = str(Path(sys.executable).with_name("mlflow"))
        path = container["readinessProbe"]["httpGet"]["path"]
        with server(words, self.environment(container), self.folder / "mlflow.log", f"{self.mlflow_uri}{path}"):
            yield self.mlflow_uri

    @contextmanager
    def seaweedfs(self) -> Iterator[None]:
        """The StatefulSet's S3."""
        (self.folder / "s3").mkdir()
        identities = self.container("StatefulSet", "seaweedfs")
        words = [self.here(word) for word in identities["command"]]
        subprocess.run(words, env=self.environment(identities), check=True, capture_output=True)
        container = self.container("StatefulSet", "seaweedfs", 1)
        port = self.ports["seaweedfs"]
        changed = {"-dir=/data": f"-dir={self.folder}/s3", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1"}
        changed |= {"-s3.port=8333": f"-s3.port={port}"}
        changed |= {"-s3.config=/identities/s3.json": f"-s3.config={self.folder}/identities/s3.json"}
        assert not [word for word in changed if word not in container["command"]]
        words = [changed.get(word, word) for word in container["command"]]
        words[0] = str(Path(sys.executable).with_name("weed"))
        words += [f"-{name}.port={self.ports[name]}" for name in ("master", "volume", "filer")]
        endpoint = f"http://127.0.0.1:{port}"
        with server(words, self.environment(container), self.folder / "weed.log", endpoint):
            for name in ("mlflow", "backups", "state", "data"):
                keys = SECRETS[f"kubealign-s3-{name}"]
                named = {"AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"]}
                await_bucket(endpoint, f"kubealign-{name}", named)
            yield

    @contextmanager
    def postgres(self) -> Iterator[None]:
        """A PostgreSQL with the StatefulSet's database, user and password, over TCP with a password."""
        values = self.environment(self.container("StatefulSet", "postgres"))
        # Not in pytest's folder, which every pytest that starts closes to other users, such as PostgreSQL's.
        place = Path(tempfile.mkdtemp(prefix="kubealign-postgres-"))
        data, password, port = place / "data", place / "password", str(self.ports["postgres"])
        data.mkdir()
        password.write_text(values["POSTGRES_PASSWORD"])
        owner: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (place, data, password):
                os.chown(path, user.pw_uid, user.pw_gid)
            owner = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        init = [*owner, str(POSTGRES[0] / "initdb"), f"--pgdata={data}", f"--username={values['POSTGRES_USER']}"]
        init += [f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run(init, check=True, capture_output=True, cwd="/")
        words = [*owner, str(POSTGRES[0] / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", port, "-k", str(data)]
        log = (self.folder / "postgres.log").open("w")
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd="/")
        try:
            ready = [str(POSTGRES[0] / "pg_isready"), "--host=127.0.0.1", f"--port={port}", "--timeout=30"]
            wait_until(
                lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0,
                "PostgreSQL",
                every_s=0.1,
            )
            self.sql(f"CREATE DATABASE {values['POSTGRES_DB']}", "postgres")
            yield
        finally:
            process.terminate()
            process.wait(30)
            log.close()
            shutil.rmtree(place)

    def sql(self, statement: str, database: str = "") -> str:
        """What a statement gives, as the manifests' own user."""
        environment = self.environment(self.container("CronJob", "mlflow-migrate"))
        environment |= {"PGDATABASE": database} if database else {}
        words = ["psql", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1", f"--command={statement}"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Database and S3 run; without PostgreSQL or kubectl on this machine there is nothing to try it with."""
    missing = [name for name, there in (("PostgreSQL", POSTGRES), ("kubectl", shutil.which("kubectl"))) if not there]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {' and '.join(missing)}")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed, so the manifests' server was not tried")
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    with found.postgres(), found.seaweedfs():
        yield found
