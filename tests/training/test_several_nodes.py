"""sft and dpo on several nodes: the TrainJob that a step makes, its fate, and what the nodes compute.

The cluster is a stub that refuses what Kubernetes, the Role in k8s/several-nodes, the policy in k8s/overlays/admission
and Kubeflow Trainer refuse, and runs the nodes as processes, each with a disk of its own.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import InputError, KubealignError
from components.common.files import write_manifest
from components.config.cluster import ClusterConfig
from components.config.params import load_config
from components.sft.stage import run_sft
from components.tracking import storage, store
from components.training import train_job
from components.training.train_job import run_on_nodes, several_nodes
from pipelines import platform as cluster_module
from tests.conftest import ROOT
from tests.stubs.kube_server import KubeServer
from tests.support.services import S3, mlflow_server, s3_server
from tests.support.stages import SHORT, Stages
from tests.support.waiting import wait_until
from tests.tools.manifests import dropped
from tests.tools.pod_security import violations

SECRETS = {
    "kubealign-s3-state": {"access_key": "pipeline", "secret_key": "a-password-for-tests"},
    "kubealign-mlflow": {"username": "pipeline", "password": "a-password-for-tests"},
    "kubealign-signing": {"cache_key": "a-key-for-tests-that-is-long-enough"},
}
TRUE = [sys.executable, "-c", "print('done')"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_job, "POLL_S", 0.05)


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    with KubeServer(tmp_path / "nodes", {name: dict(values) for name, values in SECRETS.items()}) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig()))
        # Kubernetes' client reads the variable when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(server.kubeconfig()))
        yield server


def section(*settings: str) -> ClusterConfig:
    wanted = ["nodes=2", "mlflow_uri=", "train.shm=1Gi", *settings]
    return load_config(ROOT / "params.yaml", [f"cluster.{setting}" for setting in wanted]).cluster


FULL = [
    "mlflow_uri=http://mlflow.kubealign.svc:5000",
    "mlflow_secret=kubealign-mlflow",
    "state_secret=kubealign-s3-state",
    "s3_endpoint=http://seaweedfs:8333",
    "pull_secrets=[registry]",
    "train.gpus=4",
    "train.node_selector={pool: gpu}",
    "train.tolerations=[{key: gpu, operator: Exists, value: '', effect: NoSchedule}]",
    "labels={team: nlp}",
    "timeout_s=7200",
]


def start(kube: KubeServer, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The object that Kubernetes gets for a job of this section; its nodes do nothing."""
    kube.command = TRUE
    monkeypatch.setattr(train_job, "parent_run", lambda: "parent")
    train_job.TrainJob(cluster, "dpo", "k1", ["--dataset=/x"]).run()
    return kube.created[-1]


# ---- the object


def test_the_object_has_every_setting_and_survives_kubeflows_own_model(
    kube: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start(kube, section(*FULL), monkeypatch)
    assert made["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "kubealign",
        "app.kubernetes.io/component": "dpo",
        "team": "nlp",
        "kubealign/key": "k1",
    }
    amounts = {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 4}
    spec = made["spec"]
    assert spec["runtimeRef"]["name"] == "kubealign-torch" and spec["runtimeRef"]["kind"] == "TrainingRuntime"
    assert spec["activeDeadlineSeconds"] == 7200
    trainer = spec["trainer"]
    assert trainer["numNodes"] == 2
    assert trainer["command"] == ["torchrun", "--nproc-per-node=4", "-m", "components", "dpo"]
    assert trainer["args"] == ["--dataset=/x"] and trainer["image"].endswith("python-train:0.1.0")
    assert trainer["resourcesPerNode"] == {"requests": amounts, "limits": amounts}
    assert {env["name"]: env["value"] for env in trainer["env"]} == {
        "MLFLOW_TRACKING_URI": "http://mlflow.kubealign.svc:5000",
        "KUBEALIGN_PARENT_RUN": "parent",
        "AWS_ENDPOINT_URL": "http://seaweedfs:8333",
        "KUBEALIGN_HOME": "/kubealign",
        "KUBEALIGN_SECRETS": "/var/run/kubealign",
    }
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]
    assert pod["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert pod["spec"]["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {"state", "shm", "secrets"}
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    assert not list(dropped(made, TrainerV1alpha1TrainJob.from_dict(made).to_dict()))


def test_a_field_that_kubernetes_does_not_know_is_refused_and_not_dropped(
    kube: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_job.pod_patch

    def with_a_slip(cluster: ClusterConfig, stage: str) -> Any:
        patch = original(cluster, stage)

        def option(job_spec: dict[str, Any], trainer: Any, backend: Any) -> None:
            patch(job_spec, trainer, backend)
            before = backend.custom_api.create_namespaced_custom_object

            def create(*words: Any, **named: Any) -> Any:
                words[-1]["spec"]["podSpecOverrides"] = [{"volumes": []}]  # the field's name before Trainer 2.2
                return before(*words, **named)

            backend.custom_api.create_namespaced_custom_object = create

        return option

    monkeypatch.setattr(train_job, "pod_patch", with_a_slip)
    with pytest.raises(
        KubealignError, match="cannot start the TrainJob .* 400 strict decoding error.*podSpecOverrides"
    ):
        start(kube, section(), monkeypatch)


@pytest.mark.parametrize("settings", [FULL, ["state=s3://b/p"], ["train.shm="]])
def test_the_pods_of_a_job_are_restricted(
    kube: KubeServer, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = kube.pod(start(kube, section(*settings), monkeypatch))
    assert list(violations(pod["spec"])) == []
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    assert "/tmp" in mounted and ("/kubealign" in mounted) == (settings != ["state=s3://b/p"])  # noqa: S108


def test_no_secret_is_in_the_object(kube: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cr3t")
    assert "s3cr3t" not in json.dumps(start(kube, section(*FULL), monkeypatch))


def test_the_role_grants_what_a_job_needs_and_nothing_more(kube: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    start(kube, section(), monkeypatch)
    rules = [rule for rule in kube.rules if rule["apiGroups"] == ["trainer.kubeflow.org"]]
    granted = {
        (verb, "trainer.kubeflow.org", what) for rule in rules for verb in rule["verbs"] for what in rule["resources"]
    }
    assert granted == {asked for asked in kube.asked if asked[1] == "trainer.kubeflow.org"}
    kube.rules = [rule for rule in kube.rules if rule["resources"] != ["trainjobs"]]
    with pytest.raises(KubealignError, match="cannot list TrainJobs: 403 .*forbidden"):
        start(kube, section(), monkeypatch)


def test_a_runtime_that_is_not_there_is_named(kube: KubeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KubealignError, match="Runtime: gone"):
        start(kube, section("runtime=gone"), monkeypatch)


# ---- its fate


def waits_for(file: Path) -> str:
    """A node's program that goes on as soon as the file is there."""
    return f"import pathlib, time\nwhile not pathlib.Path({str(file)!r}).exists():\n    time.sleep(0.01)\n"


def job(kube: KubeServer, program: str, monkeypatch: pytest.MonkeyPatch) -> train_job.TrainJob:
    monkeypatch.setattr(train_job, "parent_run", lambda: "")
    kube.command = [sys.executable, "-u", "-c", program]
    return train_job.TrainJob(section(), "sft", "k2", [])


def test_the_log_of_the_first_node_is_the_steps_own_and_the_job_is_removed(
    kube: KubeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import os\nfor n in range(5): print('line', n, 'of', os.environ['PET_NODE_RANK'])"
    job(kube, program, monkeypatch).run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line")]
    assert said == [f"line {n} of 0" for n in range(5)] and kube.jobs == {}


def test_a_failed_node_fails_the_step_with_the_reason_and_its_log(
    kube: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = tmp_path / "spoken"
    program = "import os, pathlib, signal, sys\nif os.environ['PET_NODE_RANK'] == '0':\n    print('I am 0')\n"
    program += f"    pathlib.Path({str(spoken)!r}).touch()\n    signal.pause()\n"
    program += f"{waits_for(spoken)}sys.exit('no memory')"
    with pytest.raises(KubealignError, match="TrainJob kubealign-sft-k2-.* failed: JobsFailed: jobset failed"):
        job(kube, program, monkeypatch).run()
    said = capsys.readouterr().out
    assert "I am 0" in said and "node-1: no memory" in said and kube.jobs == {}


def test_a_server_that_is_away_for_a_while_does_not_end_the_step(
    kube: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = tmp_path / "back"
    made = job(kube, waits_for(back), monkeypatch)
    start_ = made._start

    def end_when_back() -> None:
        wait_until(lambda: not kube.faults, "every fault was met")
        back.touch()

    def then_away() -> str:
        name = start_()
        kube.faults += [503] * 6
        threading.Thread(target=end_when_back, daemon=True).start()
        return name

    monkeypatch.setattr(made, "_start", then_away)
    made.run()
    assert not kube.faults and kube.jobs == {}


def test_a_step_that_is_started_again_follows_the_job_that_runs(
    kube: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    followed = tmp_path / "followed"
    first = job(kube, waits_for(followed), monkeypatch)
    first._start()  # and the pod of the step is gone
    second = job(kube, "raise SystemExit('a second job')", monkeypatch)
    follow = second._follow
    monkeypatch.setattr(second, "_follow", lambda: (followed.touch(), follow()))
    second.run()
    assert len(kube.created) == 1 and "following TrainJob" in capsys.readouterr().out


def test_a_failed_job_of_an_attempt_before_is_removed_and_a_new_one_started(
    kube: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(kube, "raise SystemExit(1)", monkeypatch)
    name = first._start()
    for node in kube.jobs[name].nodes:
        node.process.wait()
    started_s = int(time.time())
    wait_until(lambda: int(time.time()) > started_s, "the next second, which names of jobs tell")
    job(kube, "pass", monkeypatch).run()
    assert len(kube.created) == 2 and kube.jobs == {}


@pytest.mark.parametrize("during", ["creation", "training"])
def test_a_step_that_is_cancelled_removes_its_job(kube: KubeServer, tmp_path: Path, during: str) -> None:
    """The job is there before Kubernetes has answered that it is."""
    if during == "creation":
        kube.creation_answered.clear()
    kube.command = [sys.executable, "-c", "import signal; signal.pause()"]
    cluster = section().model_dump_json()
    program = (
        "from components.training import train_job\n"
        "from components.config.cluster import ClusterConfig\n"
        "train_job.parent_run = lambda: ''\n"
        f"cluster = ClusterConfig.model_validate_json({cluster!r})\n"
        "train_job.TrainJob(cluster, 'sft', 'k3', []).run()\n"
    )
    with (tmp_path / "log").open("w") as log:
        step = subprocess.Popen(
            [sys.executable, "-c", program], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        started = "" if during == "creation" else "started TrainJob"
        wait_until(
            lambda: step.poll() is not None or (kube.jobs and started in (tmp_path / "log").read_text()), "the job"
        )
        assert step.poll() is None, (tmp_path / "log").read_text()
        step.send_signal(signal.SIGTERM)
        kube.creation_answered.set()
        assert step.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert kube.jobs == {}


# ---- what is computed


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.integration
@pytest.mark.parametrize("state", ["s3", pytest.param("pvc", marks=pytest.mark.long)])
def test_two_nodes_give_the_losses_of_one_process(
    kube: KubeServer, stages: Stages, s3: S3, tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bucket the nodes share no disk."""
    import boto3

    config = load_config(ROOT / "params.yaml", [*SHORT, "sft.checkpoint_every_s=0.001"])
    run_sft(config.sft, config.model, stages.folder / "clean", stages.base, tmp_path / "one")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    names = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}
    kube.secrets["kubealign-s3-state"] = {key: s3.environment[name] for key, name in names.items()}
    location = f"s3://{s3.bucket}/{tmp_path.name}" if state == "s3" else "pvc:kubealign-state"
    with mlflow_server(tmp_path) as address:
        more = ["state_secret=kubealign-s3-state", f"s3_endpoint={s3.endpoint}", f"mlflow_uri={address}"]
        more.append("train.gpus=0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        cluster = section(f"state={location}", *more)
        inputs = {"dataset": stages.folder / "clean", "base": stages.base}
        run_id, metrics = run_on_nodes(cluster, "sft", config.sft, config.model, inputs, tmp_path / "two")
        assert store.client().get_run(run_id).data.params["batch_size"] == "3"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (
        metrics["validation_loss"]
        == json.loads((tmp_path / "two" / "training.json").read_text())["metrics"]["validation_loss"]
    )
    left = location if state == "s3" else str(train_job.store.home())
    assert not storage.exists(f"{left}/jobs/anything")
    # Objects, not what s3fs calls found: SeaweedFS keeps the emptied folder, and s3fs takes it for a file.
    listing = boto3.client("s3").list_objects_v2(Bucket=s3.bucket, Prefix=f"{tmp_path.name}/jobs/")
    assert "Contents" not in listing


@pytest.mark.integration
@pytest.mark.long
def test_only_the_first_nodes_disk_has_checkpoints_and_every_node_resumes_from_them(
    stages: Stages, tmp_path: Path
) -> None:
    """Two nodes with a home of their own each: stopped in the middle, both go on, to the losses of one process."""
    import yaml

    from tests.support.services import free_port

    config = load_config(ROOT / "params.yaml", [*SHORT, "sft.checkpoint_every_s=0.001"])
    run_sft(config.sft, config.model, stages.folder / "clean", stages.base, tmp_path / "one")
    params = tmp_path / "params.yaml"
    words = ["-m", "components", "sft", "--params", str(params), "--dataset", str(stages.folder / "clean")]
    words += ["--base", str(stages.base), "--out", str(tmp_path / "two")]

    def run() -> str:
        port, nodes = str(free_port()), []
        for rank in ("0", "1"):
            environment = os.environ | {"KUBEALIGN_HOME": str(tmp_path / f"home-{rank}"), "OMP_NUM_THREADS": "1"}
            environment |= {"PET_NNODES": "2", "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1"}
            environment |= {
                "PET_MASTER_PORT": port,
                "PYTHONPATH": str(ROOT),
                "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db",
            }
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", *words]
            nodes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        said = [node.communicate()[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
        return said[0]

    params.write_text(yaml.safe_dump(config.sections()))
    run()
    checkpoints = list((tmp_path / "home-0" / "checkpoints").glob("sft-*/step-*"))
    assert checkpoints and not list((tmp_path / "home-1").glob("checkpoints/sft-*/step-*"))
    newest = max(checkpoints)
    import shutil

    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "two")
    assert "resuming after step" in run()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


# ---- settings


def test_a_step_follows_several_nodes_alone_when_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert several_nodes() is None
    monkeypatch.setenv("KUBEALIGN_CLUSTER", section(*FULL).model_dump_json())
    assert several_nodes() == section(*FULL)


def test_several_nodes_need_a_place_that_all_of_them_see() -> None:
    remote = ["data.repo=https://git.example.com/a.git", "data.revision=v1", "cluster.nodes=2", "cluster.state="]
    with pytest.raises(InputError, match="cluster.nodes=.*cluster.state is empty: .*pvc:CLAIM"):
        cluster_module.check(load_config(ROOT / "params.yaml", remote))


@pytest.mark.integration
def test_what_comes_back_damaged_is_refused(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("right")
    write_manifest(folder)
    location = f"s3://{s3.bucket}/{tmp_path.name}/x"
    storage.upload(folder, location)
    boto3.client("s3").put_object(Bucket=s3.bucket, Key=f"{tmp_path.name}/x/a.txt", Body=b"wrong")
    with pytest.raises(KubealignError, match="a.txt changed since it was written"):
        storage.download(location, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(KubealignError, match="no manifest.json there"):
        storage.download(f"{location}/nothing", tmp_path / "back")
