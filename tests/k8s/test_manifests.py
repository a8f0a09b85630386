"""k8s/ holds, and its check has teeth: each rule is broken once, and found."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.images import MLFLOW_IMAGE
from components.config.params import load_config
from components.stages import STAGE_NAMES
from pipelines.alignment import compile_pipeline
from tests.conftest import ROOT
from tests.k8s.conftest import Manifest
from tests.tools.manifests import OVERLAYS, STEPS, pods, problems, quantity
from tests.tools.pod_security import violations

pytestmark = pytest.mark.integration


@pytest.fixture
def dev(overlays: dict[str, list[Manifest]]) -> list[Manifest]:
    return copy.deepcopy(overlays["dev"])


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(m for m in manifests if m["kind"] == kind and m["metadata"]["name"].startswith(name))


def server(manifests: list[Manifest]) -> Manifest:
    """The pod of the MLflow server."""
    found: Manifest = find(manifests, "Deployment", "mlflow")["spec"]["template"]["spec"]
    return found


def box(manifests: list[Manifest]) -> Manifest:
    """Its container."""
    found: Manifest = server(manifests)["containers"][0]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_without_problems(overlays: dict[str, list[Manifest]], overlay: str) -> None:
    assert problems(overlays[overlay]) == []
    assert set(STAGE_NAMES) == STEPS


BROKEN: dict[str, tuple[Callable[[list[Manifest]], Any], str]] = {
    "unknown field": (lambda m: box(m).update(imagePullPolicies="x"), "Additional properties|was unexpected"),
    "wrong type": (lambda m: find(m, "Deployment", "mlflow")["spec"].update(replicas="one"), "spec.replicas"),
    "unknown kind": (
        lambda m: m.append({"apiVersion": "x.example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}),
        "has no Thing of x.example.com/v1",
    ),
    "no quantity": (lambda m: box(m)["resources"]["limits"].update(cpu="abc"), "'abc' is not a quantity"),
    "size": (lambda m: server(m)["volumes"][1]["emptyDir"].update(sizeLimit="4Gb"), "'4Gb' is not a quantity"),
    "quota": (
        lambda m: find(m, "ResourceQuota", "kubealign")["spec"]["hard"].update(pods="many"),
        "'many' is not a quantity",
    ),
    "more than the limit": (
        lambda m: box(m)["resources"]["requests"].update(memory="3Gi"),
        "more memory than its limit",
    ),
    "secret": (
        lambda m: box(m)["env"][-1]["valueFrom"]["secretKeyRef"].update(name="gone"),
        "Secret gone does not exist",
    ),
    "key of a secret": (
        lambda m: box(m)["env"][-1]["valueFrom"]["secretKeyRef"].update(key="gone"),
        "Secret kubealign-s3-mlflow has no key gone",
    ),
    "config map": (lambda m: box(m)["envFrom"][0]["configMapRef"].update(name="gone"), "ConfigMap gone does not exist"),
    "volume's map": (
        lambda m: server(m)["volumes"][0]["configMap"].update(name="gone"),
        "ConfigMap gone does not exist",
    ),
    "account": (lambda m: server(m).update(serviceAccountName="gone"), "service account gone does not exist"),
    "mount": (lambda m: box(m)["volumeMounts"][0].update(name="gone"), "mounts gone, which is no volume"),
    "claim": (
        lambda m: server(m)["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "gone"}}),
        "claim gone does not exist",
    ),
    "port of a probe": (lambda m: box(m)["readinessProbe"]["httpGet"].update(port="gone"), "asks the port gone"),
    "port of a service": (
        lambda m: find(m, "Service", "mlflow")["spec"]["ports"][0].update(targetPort="gone"),
        "port gone is no port of the pods",
    ),
    "service": (lambda m: find(m, "Service", "mlflow")["spec"].update(selector={"x": "y"}), "selects no pod"),
    "selector": (
        lambda m: find(m, "Deployment", "mlflow")["spec"]["selector"]["matchLabels"].update(x="y"),
        "does not match its own pods",
    ),
    "role": (lambda m: find(m, "RoleBinding", "pipeline")["roleRef"].update(name="gone"), "Role gone does not exist"),
    "address": (lambda m: m.remove(find(m, "Service", "postgres")), "service postgres does not exist"),
    "port of an address": (
        lambda m: find(m, "Service", "seaweedfs")["spec"]["ports"][0].update(port=1),
        "service seaweedfs has no port 8333",
    ),
    "script": (
        lambda m: find(m, "ConfigMap", "scripts")["data"].pop("dump.sh"),
        "/scripts/dump.sh is in no config map",
    ),
    "component": (
        lambda m: find(m, "NetworkPolicy", "names")["spec"].update(
            podSelector={"matchLabels": {"app.kubernetes.io/component": "gone"}}
        ),
        "selects the component gone",
    ),
    "port of a policy": (
        lambda m: find(m, "NetworkPolicy", "to-database")["spec"]["egress"][0]["ports"][0].update(port=5433),
        "opens port 5433 to pods that have",
    ),
    "latest": (lambda m: box(m).update(image="registry.example.com/mlflow:latest"), "no definite version"),
    "writable root": (lambda m: box(m)["securityContext"].pop("readOnlyRootFilesystem"), "can be written"),
    "no resources": (lambda m: box(m).pop("resources"), "no resources"),
    "security": (lambda m: server(m).update(hostNetwork=True), "hostNetwork is set"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(dev: list[Manifest], what: str) -> None:
    change, message = BROKEN[what]
    change(dev)
    found = problems(dev)
    assert any(re.search(message, problem) for problem in found), found


def test_a_field_that_trainers_runtime_does_not_know_is_found(overlays: dict[str, list[Manifest]]) -> None:
    prod = copy.deepcopy(overlays["prod"])
    find(prod, "TrainingRuntime", "kubealign")["spec"]["mlPolicy"]["torch"]["elastic"] = {"minNodes": 1}
    assert [problem for problem in problems(prod) if "elastic" in problem]


def test_quantities_are_read() -> None:
    assert [quantity(text) for text in ("500m", "2", "1Ki", "1.5G")] == [quantity("0.5"), 2, 1024, 1_500_000_000]
    assert [quantity(text) for text in ("abc", "1gb", "", "-1", "1 Gi")] == [None] * 5


def test_secrets_have_no_values_and_params_name_the_same_ones(overlays: dict[str, list[Manifest]]) -> None:
    secrets = [manifest for manifest in overlays["dev"] if manifest["kind"] == "Secret"]
    assert secrets and not any(value for secret in secrets for value in secret["stringData"].values())
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    names = {secret["metadata"]["name"] for secret in secrets}
    used = dict(re.findall(r"cluster\.(\w+_secret)=(kubealign-[\w-]+)", guide))
    assert used.keys() == {"mlflow_secret", "data_secret", "state_secret"} and set(used.values()) <= names
    assert MLFLOW_IMAGE.endswith(box(overlays["dev"])["image"].rpartition("/")[2])


# ---- pod security


def container(context: Manifest) -> Callable[[Manifest], Any]:
    return lambda spec: spec["containers"][0]["securityContext"].update(context)


FORBIDDEN: dict[str, Callable[[Manifest], Any]] = {
    "hostNetwork": lambda spec: spec.update(hostNetwork=True),
    "hostPID": lambda spec: spec.update(hostPID=True),
    "hostIPC": lambda spec: spec.update(hostIPC=True),
    "is a hostPath": lambda spec: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "is a nfs": lambda spec: spec["volumes"].append({"name": "x", "nfs": {"path": "/", "server": "x"}}),
    "sysctl kernel.msgmax": lambda spec: spec["securityContext"].update(
        sysctls=[{"name": "kernel.msgmax", "value": "1"}]
    ),
    "hostProcess": container({"windowsOptions": {"hostProcess": True}}),
    "seLinuxOptions": container({"seLinuxOptions": {"type": "spc_t"}}),
    "appArmorProfile": container({"appArmorProfile": {"type": "Unconfined"}}),
    "runAsUser is 0": container({"runAsUser": 0}),
    "seccompProfile is Unconfined": container({"seccompProfile": {"type": "Unconfined"}}),
    "no seccompProfile": lambda spec: spec["securityContext"].pop("seccompProfile"),
    "privileged": container({"privileged": True}),
    "allowPrivilegeEscalation": container({"allowPrivilegeEscalation": None}),
    "procMount": container({"procMount": "Unmasked"}),
    "do not drop ALL": container({"capabilities": {"drop": ["NET_RAW"]}}),
    "capability SYS_ADMIN": container({"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}),
    "runAsNonRoot": lambda spec: spec["securityContext"].update(runAsNonRoot=False),
    "hostPort": lambda spec: spec["containers"][0]["ports"][0].update(hostPort=80),
    "readinessProbe asks the host": lambda spec: spec["containers"][0]["readinessProbe"]["httpGet"].update(host="x"),
    "preStop asks the host": lambda spec: spec["containers"][0].update(
        lifecycle={"preStop": {"httpGet": {"host": "x", "port": 1}}}
    ),
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_every_rule_of_the_restricted_standard_is_checked(dev: list[Manifest], rule: str) -> None:
    spec = server(dev)
    assert list(violations(spec)) == []
    FORBIDDEN[rule](spec)
    assert [sentence for sentence in violations(spec) if rule in sentence]


def test_an_unconfined_apparmor_annotation_is_found(dev: list[Manifest]) -> None:
    annotation = {"container.apparmor.security.beta.kubernetes.io/mlflow": "unconfined"}
    assert [sentence for sentence in violations(server(dev), annotation) if "apparmor" in sentence]


def step_pod(step: str, documents: list[Manifest]) -> Manifest:
    """The pod that Kubeflow Pipelines 2.17 and Argo make of a step.

    backend/src/v2/compiler/argocompiler/security_context.go, applySecurityContextToExecutorTemplate (the pod's, the
    step's and the launcher's defaults) and backend/src/v2/driver/k8s.go (what kfp-kubernetes says); Argo's own two
    containers as in manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml.
    """
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
    identity = platform["securityContext"]
    seccomp = {"type": "RuntimeDefault"}
    safe = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "seccompProfile": seccomp}
    names = {"runAsUser": int, "runAsGroup": int, "runAsNonRoot": bool}
    own = safe | {name: kind(identity[name]) for name, kind in names.items() if name in identity}
    argo = safe | {"runAsNonRoot": True, "runAsUser": 65532}
    volumes: list[Manifest] = [
        {"name": mount["volumeName"], "emptyDir": {}} for mount in platform.get("emptyDirMounts", [])
    ]
    volumes += [{"name": "state", "persistentVolumeClaim": {}} for _ in platform.get("pvcMount", [])]
    return {
        "securityContext": {"seccompProfile": seccomp},
        "initContainers": [
            {"name": "init", "securityContext": argo},
            {"name": "kfp-launcher", "securityContext": safe | {"runAsNonRoot": True}},
        ],
        "containers": [{"name": "main", "securityContext": own}, {"name": "wait", "securityContext": argo}],
        "volumes": volumes,
    }


@pytest.mark.usefixtures("fast_compiler")
def test_the_steps_of_a_run_are_restricted(tmp_path: Path) -> None:
    remote = ["data.repo=https://git.example.com/a.git", "data.revision=v1", "cluster.train.gpus=1"]
    compile_pipeline(load_config(ROOT / "params.yaml", remote), tmp_path / "a.yaml", "kubeflow")
    documents = list(yaml.safe_load_all((tmp_path / "a.yaml").read_text(encoding="utf-8")))
    for step in STAGE_NAMES:
        assert list(violations(step_pod(step, documents))) == []
    platform = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-sft"]
    for key, rule in (("runAsNonRoot", "runAsNonRoot"), ("runAsUser", "runAsUser is 0")):
        broken = copy.deepcopy(platform["securityContext"])
        platform["securityContext"] |= {key: 0}
        assert [sentence for sentence in violations(step_pod("sft", documents)) if rule in sentence]
        platform["securityContext"] = broken


def test_every_pod_of_the_manifests_is_looked_at(overlays: dict[str, list[Manifest]]) -> None:
    """A kind that hides its pods from the check would pass it."""
    found = {name: sum(1 for _ in pods(manifests)) for name, manifests in overlays.items()}
    assert found == {"dev": 7, "prod": 6, "admission": 0}
