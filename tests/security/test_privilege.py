"""A step has its own secrets and rights, and no submitter's label or TrainJob gives it another's."""

import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.errors import InputError
from components.config import cluster as cluster_config
from components.config.cluster import ClusterConfig
from components.config.params import load_config
from components.stages import STAGE_NAMES
from components.training import train_job
from pipelines.alignment import compile_pipeline
from tests.cluster.conftest import SECRETS, Cluster
from tests.conftest import ROOT
from tests.stubs.kube_server import KubeServer
from tests.support.admission import ACCOUNT, policy, refusals
from tests.tools.manifests import build, pods

Manifest = dict[str, Any]
COMPONENT, PART_OF, NAME = (f"app.kubernetes.io/{word}" for word in ("component", "part-of", "name"))
REMOTE = ["data.repo=https://git.example.com/a.git", "data.revision=v1"]
NAMED = ["mlflow_secret=mlflow", "git_secret=git", "data_secret=s3-data", "state_secret=s3-state"]


def section(*settings: str) -> ClusterConfig:
    return load_config(ROOT / "params.yaml", [*REMOTE, *(f"cluster.{setting}" for setting in settings)]).cluster


def compiled_pods(folder: Path, *settings: str) -> dict[str, Manifest]:
    """What kfp-kubernetes makes of each step's pod."""
    config = load_config(ROOT / "params.yaml", [*REMOTE, *(f"cluster.{setting}" for setting in settings)])
    compile_pipeline(config, folder / "p.yaml", "kubeflow")
    _, platform = yaml.safe_load_all((folder / "p.yaml").read_text(encoding="utf-8"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor for name, executor in executors.items()}


# ---- secrets


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize(
    "settings", [[], ["state=s3://bucket/state"], ["nodes=2", "state=s3://bucket/state"]], ids=["claim", "s3", "nodes"]
)
def test_no_step_gets_a_secret_that_it_does_not_use(tmp_path: Path, settings: list[str]) -> None:
    steps = compiled_pods(tmp_path, *NAMED, *settings)
    holders: dict[str, set[str]] = {}
    for step, pod in steps.items():
        for entry in [*pod["secretAsEnv"], *pod.get("secretAsVolume", [])]:
            holders.setdefault(entry["secretName"], set()).add(step)
    several = {"kubealign-train-jobs": {"sft", "dpo"}} if "nodes=2" in settings else {}
    assert holders == several | {
        "git": {"resolve", "fetch"},
        "s3-data": {"resolve", "fetch"},
        "s3-state": {"sft", "dpo"},
        "mlflow": set(STAGE_NAMES),
        "kubealign-signing": set(STAGE_NAMES) - {"validate"},
    }


def test_no_secret_of_the_servers_is_one_of_a_step() -> None:
    """The keys of MLflow's artifacts and of the backups are named by no setting, and by no job but their own."""
    defaults = {value for key, value in section().model_dump().items() if key.endswith("_secret")}
    assert defaults == {"", "kubealign-signing", "kubealign-train-jobs"}
    base = ROOT / "k8s" / "base"
    users = {
        (document["metadata"]["name"], secret)
        for file in ("mlflow.yaml", "jobs.yaml")
        for document in yaml.safe_load_all((base / file).read_text(encoding="utf-8"))
        for pod in pods(document)
        for box in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        for entry in box.get("env", [])
        if (secret := entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name", "")).startswith("kubealign-s3")
    }
    backups = {(f"mlflow-{job}", "kubealign-s3-backups") for job in ("backup", "restore")}
    assert users == backups | {("mlflow", "kubealign-s3-mlflow")}


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl, so the dev overlay was not built")
def test_each_key_of_the_dev_store_opens_its_own_bucket_alone(tmp_path: Path) -> None:
    """The overlay's own commands, with a real SeaweedFS."""
    import boto3
    from botocore.exceptions import ClientError

    cluster = Cluster(tmp_path)
    owners = {"mlflow": "mlflow", "backups": "backups", "state": "state", "data": "data", "contributors": "data"}
    opened: dict[str, set[tuple[str, str]]] = {owner: set() for owner in owners}
    with cluster.seaweedfs():
        for owner, bucket in product(owners, sorted({*owners.values()})):
            keys = SECRETS[f"kubealign-s3-{owner}"]
            s3 = boto3.client(
                "s3",
                endpoint_url=f"http://127.0.0.1:{cluster.ports['seaweedfs']}",
                region_name="us-east-1",
                aws_access_key_id=keys["access_key"],
                aws_secret_access_key=keys["secret_key"],
            )
            named = {"Bucket": f"kubealign-{bucket}"}
            for verb, ask in (
                ("list", lambda s3=s3, named=named: s3.list_objects_v2(**named)),
                ("put", lambda s3=s3, named=named: s3.put_object(**named, Key="x", Body=b"x")),
                ("delete", lambda s3=s3, named=named: s3.delete_object(**named, Key="x")),
            ):
                try:
                    ask()
                except ClientError as error:
                    assert error.response["Error"]["Code"] == "AccessDenied"
                else:
                    opened[owner].add((bucket, verb))
    assert opened == {
        owner: {(bucket, verb) for verb in (("list",) if owner == "data" else ("list", "put", "delete"))}
        for owner, bucket in owners.items()
    }


@pytest.mark.integration
@pytest.mark.parametrize("key", ['a","actions":["Admin"]', "", "two\nlines"])
def test_a_key_that_would_write_an_identity_of_its_own_is_refused(tmp_path: Path, key: str) -> None:
    import subprocess

    names = [
        f"{owner}_{word}_KEY"
        for owner in ("MLFLOW", "BACKUPS", "STATE", "DATA", "CONTRIBUTORS")
        for word in ("ACCESS", "SECRET")
    ]
    script = ROOT / "k8s" / "overlays" / "dev" / "identities.sh"
    words = ["sh", str(script), str(tmp_path / "s3.json")]
    given = {"PATH": "/usr/bin:/bin"} | dict.fromkeys(names, "abc")
    assert subprocess.run(words, env=given, capture_output=True, check=False).returncode == 0
    done = subprocess.run(words, env=given | {"STATE_SECRET_KEY": key}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "kubealign-s3-state" in done.stderr and "Admin" not in done.stderr


# ---- TrainJobs


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    import sys

    with KubeServer(tmp_path / "nodes", {}) as server:
        server.command = [sys.executable, "-c", ""]
        monkeypatch.setattr(server, "_mount", lambda *_: None)
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig()))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(server.kubeconfig()))
        monkeypatch.setattr(train_job, "POLL_S", 0.05)
        monkeypatch.setattr(train_job, "parent_run", lambda: "")
        yield server


def made(kube: KubeServer, step: str, *settings: str) -> Manifest:
    """The TrainJob that a step makes, as the stub, which admits by the policy, got it."""
    secrets = ["mlflow_secret=kubealign-mlflow", "state_secret=kubealign-s3-state", "pull_secrets=[registry]"]
    train_job.TrainJob(section("nodes=2", *secrets, *settings), step, "k1", ["--dataset=/x"]).run()
    return kube.created[-1]


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        ("sft", []),
        ("dpo", ["state=s3://bucket/state", "train.gpus=8", "labels={team: nlp}"]),
        ("dpo", [f"train_image=kubealign/python-train@sha256:{'a' * 64}", "train.shm=''"]),
    ],
)
def test_the_jobs_of_our_steps_are_admitted(kube: KubeServer, step: str, settings: list[str]) -> None:
    assert refusals(made(kube, step, *settings), ACCOUNT) == []


def pod_of(job: Manifest) -> Manifest:
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    found: Manifest = node["template"]["spec"]["template"]
    return found


def with_volume(**volume: Any) -> Callable[[Manifest], Any]:
    return lambda job: pod_of(job)["spec"]["volumes"].append({"name": "more", **volume})


def projected(*sources: Manifest) -> Callable[[Manifest], Any]:
    return with_volume(projected={"sources": list(sources)})


def of_secret(name: str, *keys: str) -> Manifest:
    return {"secret": {"name": name, "items": [{"key": key, "path": key} for key in keys]}}


FORBIDDEN: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "another runtime": (lambda job: job["spec"]["runtimeRef"].update(name="torch-distributed"), "runtimeRef"),
    "a runtime of the cluster": (
        lambda job: job["spec"]["runtimeRef"].update(kind="ClusterTrainingRuntime"),
        "runtimeRef",
    ),
    "another image": (
        lambda job: job["spec"]["trainer"].update(image="evil.example.com/python-train:1"),
        "trainer.image",
    ),
    "an image that begins alike": (
        lambda job: job["spec"]["trainer"].update(image="kubealign/python-train-evil:1"),
        "trainer.image",
    ),
    "no image": (lambda job: job["spec"]["trainer"].pop("image"), "trainer.image"),
    "an account": (lambda job: pod_of(job)["spec"].update(serviceAccountName="mlflow"), "serviceAccountName"),
    "the database's secret": (with_volume(secret={"secretName": "kubealign-database"}), "volumes"),
    "MLflow's administrator": (projected(of_secret("kubealign-mlflow-server", "admin_password")), "volumes"),
    "the signing key": (projected(of_secret("kubealign-signing", "cache_key", "signing_key")), "volumes"),
    "all keys of a secret": (projected({"secret": {"name": "kubealign-signing"}}), "volumes"),
    "a token": (projected({"serviceAccountToken": {"path": "token"}}), "volumes"),
    "a secret behind one of ours": (
        projected(of_secret("kubealign-mlflow", "username"), of_secret("kubealign-s3-backups", "secret_key")),
        "volumes",
    ),
    "the host": (with_volume(hostPath={"path": "/"}), "volumes"),
    "another claim": (with_volume(persistentVolumeClaim={"claimName": "data-postgres-0"}), "volumes"),
    "a secret in the environment": (
        lambda job: job["spec"]["trainer"]["env"].append(
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "kubealign-database", "key": "password"}}}
        ),
        "trainer.env",
    ),
    "an initializer": (
        lambda job: job["spec"].update(initializer={"model": {"secretRef": {"name": "kubealign-database"}}}),
        "initializer",
    ),
    "a second patch": (
        lambda job: job["spec"]["runtimePatches"].append(job["spec"]["runtimePatches"][0] | {"manager": "x.example/y"}),
        "runtimePatches",
    ),
    "a container before ours": (
        lambda job: pod_of(job)["spec"].update(initContainers=[{"name": "x"}]),
        "runtimePatches",
    ),
    "a pull secret": (
        lambda job: pod_of(job)["spec"].update(imagePullSecrets=[{"name": "kubealign-database"}]),
        "imagePullSecrets",
    ),
    "the backup's network": (lambda job: pod_of(job)["metadata"]["labels"].update({COMPONENT: "backup"}), "labels"),
    "a service's name": (lambda job: pod_of(job)["metadata"]["labels"].update({NAME: "postgres"}), "labels"),
    "no patch": (lambda job: job["spec"].pop("runtimePatches"), "runtimePatches"),
}


def test_a_job_with_more_than_training_needs_is_refused(kube: KubeServer) -> None:
    """And by the rule that stands for it: without that rule, it is let in or refused by fewer."""
    allowed = made(kube, "sft")
    for what, (change, rule) in FORBIDDEN.items():
        job = copy.deepcopy(allowed)
        change(job)
        refused = refusals(job, ACCOUNT)
        assert any(message.startswith(f"{rule}:") for message in refused), (what, refused)
        without = policy()
        without["spec"]["validations"] = [
            validation for validation in without["spec"]["validations"] if not validation["message"].startswith(rule)
        ]
        if what != "no patch":
            assert refusals(job, ACCOUNT, without) == [], what


def test_the_policy_holds_the_account_of_any_namespace_and_nobody_else(kube: KubeServer) -> None:
    job = made(kube, "sft")
    job["spec"]["runtimeRef"]["name"] = "torch-distributed"
    assert refusals(job, "system:serviceaccount:team-b:train-jobs")
    assert refusals(job, "alice") == refusals(job, "train-jobs") == []


def test_the_pods_of_a_run_have_no_right_to_start_pods(tmp_path: Path) -> None:
    """Only the account of k8s/several-nodes has one, and its token is no file of the run's own account."""
    base, several = (
        list(yaml.safe_load_all((ROOT / "k8s" / folder / "rights.yaml").read_text(encoding="utf-8")))
        for folder in ("base", "several-nodes")
    )
    for documents, creates in ((base, False), (several, True)):
        rules = [rule for document in documents for rule in document.get("rules", [])]
        creating = {resource for rule in rules if {"create", "*"} & {*rule["verbs"]} for resource in rule["resources"]}
        assert creating == ({"trainjobs"} if creates else {"workflowtaskresults"})
        readable = {
            name for rule in rules if "secrets" in rule["resources"] for name in rule.get("resourceNames", ["*"])
        }
        assert readable == (set() if creates else {"mlpipeline-minio-artifact"})
    subjects = [document["subjects"] for document in several if document["kind"] == "RoleBinding"]
    assert subjects == [[{"kind": "ServiceAccount", "name": "train-jobs"}]]


def test_a_step_starts_jobs_as_the_account_of_the_mounted_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("token", "t0ken"), ("ca.crt", "-----BEGIN"), ("namespace", "team-b\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(train_job, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    backend = train_job._account()
    assert backend.namespace == "team-b" and backend.client_configuration.host == "https://10.0.0.1:443"
    assert backend.client_configuration.get_api_key_with_prefix("authorization") == "bearer t0ken"
    assert backend.client_configuration.ssl_ca_cert == str(tmp_path / "ca.crt")


# ---- labels and network policies

HOSTILE = [
    {PART_OF: "other", COMPONENT: "backup"},
    {COMPONENT: "database", NAME: "postgres"},
    {NAME: "mlflow", "kubealign/role": "node"},
    {"workflows.argoproj.io/workflow": "other", "pipeline/runid": "a-run-of-others"},
    {"trainer.kubeflow.org/x": "y", "batch.kubernetes.io/job-name": "mlflow-backup-1"},
]


@pytest.mark.parametrize("labels", HOSTILE)
def test_a_label_that_something_is_selected_by_is_refused(labels: dict[str, str]) -> None:
    for label, value in labels.items():
        with pytest.raises(InputError, match=rf"cluster.labels.*{label}") as error:
            section(f"labels={{{label}: {value}}}")
        assert error.value.exit_code == 2
    assert section("labels={kueue.x-k8s.io/queue-name: q, sidecar.istio.io/inject: 'false', team: nlp}").labels


def selected(policy_: Manifest, labels: dict[str, str]) -> bool:
    """Whether a network policy is about a pod with these labels."""
    selector = policy_["spec"]["podSelector"]
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        by_operator = {"Exists": value is not None, "DoesNotExist": value is None}
        wanted &= by_operator.get(expression["operator"], value in expression.get("values", []))
    return wanted


@functools.cache
def network(overlay: str) -> list[Manifest]:
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl, so no manifest was checked")
    return [manifest for manifest in build(overlay) if manifest["kind"] in ("NetworkPolicy", "Service")]


@pytest.mark.integration
@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_hostile_labels_open_no_port_and_make_no_server_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: str
) -> None:
    """Were they not refused, ours would still win, in pods of steps and in TrainJobs."""
    manifests = network(overlay)
    policies = [manifest for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    services = [manifest["spec"]["selector"] for manifest in manifests if manifest["kind"] == "Service"]
    monkeypatch.setattr(cluster_config, "RESERVED_LABELS", ())
    claimed = HOSTILE[0] | HOSTILE[1] | {"app": "ml-pipeline-ui-artifact"}
    hostile = "labels={" + ", ".join(f"{key}: {value}" for key, value in claimed.items()) + "}"
    plain, attacked = (
        {step: pod["podMetadata"]["labels"] for step, pod in compiled_pods(tmp_path, *more).items()}
        for more in ([], [hostile])
    )
    spec: Any = train_job.pod_patch(section("nodes=2", hostile), "sft").training_runtime_spec.template.spec
    job = spec.replicated_jobs[0].template.spec.template.metadata["labels"]
    assert job[COMPONENT] == "sft" and job[PART_OF] == "kubealign"
    for step in STAGE_NAMES:
        assert attacked[step][NAME] == "postgres", "the labels arrived"
        rules = [[p["metadata"]["name"] for p in policies if selected(p, labels[step])] for labels in (plain, attacked)]
        assert rules[0] == rules[1] and "deny-all" in rules[0]
        assert not [selector for selector in services if selector.items() <= attacked[step].items()]


@pytest.mark.integration
@pytest.mark.parametrize("overlay", ["dev", "prod"])
@pytest.mark.parametrize("labels", [{}, {PART_OF: "other"}, {"app": "miner", "team": "nlp"}, *HOSTILE])
def test_default_deny_is_for_every_pod_of_the_namespace(overlay: str, labels: dict[str, str]) -> None:
    denying = [
        policy_
        for policy_ in network(overlay)
        if policy_["kind"] == "NetworkPolicy" and not {"ingress", "egress"} & policy_["spec"].keys()
    ]
    assert [selected(policy_, labels) for policy_ in denying] == [True]
    assert denying[0]["spec"]["policyTypes"] == ["Ingress", "Egress"]
