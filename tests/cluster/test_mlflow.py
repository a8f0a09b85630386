"""MLflow as k8s/overlays/dev runs it, with real PostgreSQL and SeaweedFS: `make test-cluster`.

The tests run in order on one database: an empty one is filled, users are made, the whole local pipeline runs against
the server, the backup is taken, everything is lost, the backup is put back. The last one upgrades a database that
MLflow's minor version before has made.
"""

import base64
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import SECRETS, Cluster
from tests.support.project import ALL, Project
from tests.support.waiting import wait_until

pytestmark = pytest.mark.cluster

OLDER = "mlflow==3.16.*"
ADMIN = tuple(SECRETS["kubealign-mlflow-server"][key] for key in ("admin_username", "admin_password"))
PIPELINE = tuple(SECRETS["kubealign-mlflow"][key] for key in ("username", "password"))


def status(uri: str, user: tuple[str, ...] = (), host: str = "") -> int:
    """The status that a search for experiments is answered with."""
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1")  # noqa: S310
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(user).encode()).decode()}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def client(uri: str, monkeypatch: pytest.MonkeyPatch, user: tuple[str, ...] = PIPELINE) -> Any:
    import mlflow

    for name, value in zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), user, strict=True):
        monkeypatch.setenv(name, value)
    return mlflow.MlflowClient(uri, uri)


@pytest.fixture(scope="module")
def project(cluster: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    found = Project(tmp_path_factory.mktemp("pipeline"), tiny_model)
    found.environment |= {"MLFLOW_TRACKING_URI": cluster.mlflow_uri}
    found.environment |= dict(zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), PIPELINE, strict=True))
    yield found


def test_the_migration_fills_an_empty_database_and_does_nothing_the_second_time(cluster: Cluster) -> None:
    cluster.run("mlflow-migrate")
    first = cluster.sql("SELECT version_num FROM alembic_version"), cluster.sql("SELECT * FROM alembic_version_auth")
    assert all(first)
    cluster.run("mlflow-migrate")
    assert (
        cluster.sql("SELECT version_num FROM alembic_version"),
        cluster.sql("SELECT * FROM alembic_version_auth"),
    ) == first


def test_the_server_lets_in_known_users_by_known_names_alone(cluster: Cluster) -> None:
    with cluster.mlflow() as uri:
        assert "user pipeline is made" in cluster.run("mlflow-user")
        assert "was there" in cluster.run("mlflow-user")
        assert status(uri) == 401 and status(uri, ("pipeline", "wrong")) == 401
        assert status(uri, ADMIN) == 200 and status(uri, PIPELINE) == 200
        for host in ("mlflow:5000", "mlflow.kubealign.svc:5000", "localhost:1234"):
            assert status(uri, PIPELINE, host) == 200
        assert status(uri, PIPELINE, "elsewhere.example.com") == 403
    log = (cluster.folder / "mlflow.log").read_text()
    assert not any(secret in log for values in SECRETS.values() for secret in values.values() if "secret" in secret)


def test_the_compiled_yaml_runs_under_the_local_runner_against_it(
    cluster: Cluster, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    project.environment["KUBEALIGN_HOME"] = str(home)
    with cluster.mlflow() as uri:
        result = project.run_compiled(tmp_path)
        found = client(uri, monkeypatch)
        challenger = found.get_model_version_by_alias("kubealign", "challenger")
        assert challenger.version == result["version"] and challenger.tags["kubealign.lineage"] == result["lineage"]
        assert not (home / "mlflow.db").exists()
        version = found.get_model_version("kubealign", "1")
        found.set_registered_model_alias("kubealign", "champion", version.version)
        stage_runs = found.search_runs([found.get_experiment_by_name("kubealign").experiment_id])
        assert {run.data.tags.get("kubealign.stage") for run in stage_runs} >= ALL


def test_the_backup_brings_back_a_database_that_was_lost_and_the_champion_with_it(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cluster.sql("SELECT count(*) FROM runs"), cluster.sql("SELECT count(*) FROM metrics")
    assert "dumped" in cluster.run("mlflow-backup", 0)
    assert "backup s3://kubealign-backups/mlflow/" in cluster.run("mlflow-backup", 1)
    cluster.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    assert cluster.sql("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'") == "0"
    (cluster.folder / "backup" / "mlflow.dump").unlink()
    cluster.run("mlflow-restore", 0)
    assert "restored" in cluster.run("mlflow-restore", 1)
    assert (cluster.sql("SELECT count(*) FROM runs"), cluster.sql("SELECT count(*) FROM metrics")) == before
    with cluster.mlflow() as uri:
        found = client(uri, monkeypatch)
        assert found.get_model_version_by_alias("kubealign", "champion").version == "1"
        import mlflow

        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        where = mlflow.artifacts.download_artifacts("models:/kubealign@champion", dst_path=str(tmp_path))
        assert list(Path(where).rglob("*.safetensors"))


def test_a_restore_that_fails_leaves_the_database_as_it_was(cluster: Cluster) -> None:
    before = cluster.sql("SELECT count(*) FROM runs")
    dump = cluster.folder / "backup" / "mlflow.dump"
    whole = dump.read_bytes()
    dump.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AssertionError, match="mlflow-restore"):
        cluster.run("mlflow-restore", 1)
    assert cluster.sql("SELECT count(*) FROM runs") == before
    with pytest.raises(AssertionError, match="no backup 1999.dump"):
        cluster.run("mlflow-restore", 0, BACKUP="1999.dump")


def test_old_backups_are_removed(cluster: Cluster) -> None:
    before = cluster.run("mlflow-backup", 1)
    made_s = int(time.time())
    wait_until(lambda: int(time.time()) > made_s, "the next second, which backups are named by")
    said = cluster.run("mlflow-backup", 1, KEEP="1")
    name = before.split()[1].rstrip(",")
    assert f"removed {name}" in said
    with pytest.raises(AssertionError, match="no backup"):
        cluster.run("mlflow-restore", 0, BACKUP=name.rpartition("/")[2])


def test_a_database_of_the_minor_version_before_is_migrated(cluster: Cluster, tmp_path: Path) -> None:
    """The job brings the old schema to the new one; runs, versions and aliases are kept, and the server serves them."""
    older = tmp_path / "older"
    pip = sys.executable if importlib.util.find_spec("pip") else sys._base_executable
    words = [pip, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", f"--target={older}"]
    packages = [OLDER, OLDER.replace("mlflow", "mlflow-skinny"), OLDER.replace("mlflow", "mlflow-tracing")]
    subprocess.run([*words, *packages], check=True, capture_output=True)
    environment = cluster.environment(cluster.container("CronJob", "mlflow-migrate")) | {"PYTHONPATH": str(older)}
    cluster.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    program = (
        "import json, mlflow\n"
        "client = mlflow.MlflowClient('postgresql+psycopg2://', 'postgresql+psycopg2://')\n"
        "run = client.create_run(client.create_experiment('old', 's3://kubealign-mlflow/old'))\n"
        "client.log_metric(run.info.run_id, 'loss', 0.5)\n"
        "client.create_registered_model('old')\n"
        "client.create_model_version('old', 's3://kubealign-mlflow/old', run.info.run_id)\n"
        "client.set_registered_model_alias('old', 'champion', '1')\n"
        "print(json.dumps([mlflow.__version__, run.info.run_id]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, run_id = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("3.16.")
    before = cluster.sql("SELECT version_num FROM alembic_version")
    cluster.run("mlflow-migrate")
    assert cluster.sql("SELECT version_num FROM alembic_version") != before
    assert cluster.sql(f"SELECT value FROM metrics WHERE run_uuid = '{run_id}'") == "0.5"  # noqa: S608 - our own id
    with cluster.mlflow() as uri, pytest.MonkeyPatch.context() as patch:
        found = client(uri, patch, ADMIN)
        assert found.get_model_version_by_alias("old", "champion").run_id == run_id
    assert os.environ.get("PGPASSWORD") is None
