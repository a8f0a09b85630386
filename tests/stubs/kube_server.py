"""A stub of a Kubernetes API server with Kubeflow Trainer, as strict as the real ones where our client could go wrong.

It grants exactly what the Role in k8s/several-nodes grants the account train-jobs, and refuses what the policy in
k8s/overlays/admission refuses. TrainJobs are parsed with Kubeflow's own models; unknown fields are refused. Every
refusal names the rule that it stands for: `K8s` is https://kubernetes.io/docs, other paths are files of this project or
of kubeflow/trainer v2.3.0. Jobs really run: one local process per node, with the environment that Trainer's torch
plugin sets.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubeflow_trainer_api import models

from tests.conftest import ROOT
from tests.support.admission import ACCOUNT, refusals
from tests.support.services import free_port
from tests.tools.manifests import dropped

NAMESPACE = "kubealign"
GROUP = "trainer.kubeflow.org"
NOW = "2026-01-01T00:00:00Z"
RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
"""pkg/constants/constants.go, TorchRunReservedEnvNames."""
Manifest = dict[str, Any]


class RefusalError(Exception):
    """An error response, and the rule that it stands for."""

    def __init__(self, status: int, message: str, rule: str) -> None:
        super().__init__(f"{message} [{rule}]")
        self.status = status


class Node:
    """A pod of a job: a process on this machine."""

    def __init__(self, name: str, index: int, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name, self.index, self.log = name, index, log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def phase(self) -> str:
        code = self.process.poll()
        return "Running" if code is None else "Succeeded" if code == 0 else "Failed"

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Job:
    """A TrainJob and its nodes."""

    def __init__(self, manifest: Manifest, nodes: list[Node]) -> None:
        self.manifest, self.nodes = manifest, nodes

    def seen(self) -> Manifest:
        """The object with its status, derived from its nodes."""
        phases = {node.phase() for node in self.nodes}
        kind = "Failed" if "Failed" in phases else "Complete" if phases == {"Succeeded"} else ""
        if kind == "Failed":  # failurePolicy maxRestarts 0: the JobSet ends the other nodes
            for node in self.nodes:
                node.end()
        messages = {"Failed": "jobset failed due to one or more job failures", "Complete": "all jobs are done"}
        condition = {"type": kind, "status": "True", "reason": f"Jobs{kind}", "lastTransitionTime": NOW}
        status = {"conditions": [condition | {"message": messages[kind]}]} if kind else {}
        return self.manifest | {"status": status}


class KubeServer:
    """The stub; a context manager. `faults` are statuses with which the next requests fail."""

    def __init__(self, folder: Path, secrets: dict[str, dict[str, str]] | None = None) -> None:
        self.folder = folder
        self.secrets = secrets or {}
        self.runtime = next(yaml.safe_load_all((ROOT / "k8s" / "several-nodes" / "runtime.yaml").read_text()))
        role = yaml.safe_load_all((ROOT / "k8s" / "several-nodes" / "rights.yaml").read_text())
        self.rules = next(manifest for manifest in role if manifest["kind"] == "Role")["rules"]
        self.jobs: dict[str, Job] = {}
        self.created: list[Manifest] = []
        self.asked: set[tuple[str, str, str]] = set()
        self.faults: list[int] = []
        self.command: list[str] = []
        """The command that nodes run instead of their job's."""
        self.creation_answered = threading.Event()
        """While this is not set, a request to create a job gets no response, although the job exists."""
        self.creation_answered.set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.kube = self  # type: ignore[attr-defined]
        self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "KubeServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for job in self.jobs.values():
            for node in job.nodes:
                node.end()
        self._http.shutdown()
        self._http.server_close()

    def kubeconfig(self) -> Path:
        """Write a kubeconfig that points to this server."""
        path = self.folder / "kubeconfig"
        server = f"http://127.0.0.1:{self._http.server_address[1]}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": server}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
            "users": [{"name": "me", "user": {}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # ---- rights

    def allow(self, verb: str, group: str, resource: str, name: str) -> None:
        """Check that the Role grants an action.

        Raises:
            RefusalError: it does not.
        """
        self.asked.add((verb, group, resource))
        for rule in self.rules:
            granted = group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            if granted and name in rule.get("resourceNames", [name]):
                return
        message = f'{resource}.{group} "{name}" is forbidden: cannot {verb} in the namespace "{NAMESPACE}"'
        raise RefusalError(403, message, "K8s/reference/access-authn-authz/rbac")

    # ---- the API

    def route(self, method: str, path: str, query: dict[str, str], body: bytes) -> Manifest:
        """Answer a request."""
        if path == "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public":
            # manifests/base/rbac/public_configmap_role.yaml grants it to everyone
            return {"kind": "ConfigMap", "data": {"kubeflow_trainer_version": "v2.3.0"}}
        verbs = {"GET": "get", "POST": "create", "DELETE": "delete"}
        if match := re.fullmatch(rf"/apis/{GROUP}/v1alpha1/namespaces/{NAMESPACE}/trainjobs(?:/([\w.-]+))?", path):
            name = match[1] or ""
            self.allow("list" if method == "GET" and not name else verbs[method], GROUP, "trainjobs", name)
            return self._trainjobs(method, name, query, body)
        if match := re.fullmatch(rf"/apis/{GROUP}/v1alpha1/(?:namespaces/{NAMESPACE}/)?(\w+)/([\w.-]+)", path):
            self.allow("get", GROUP, match[1], match[2])
            if match[2] == self.runtime["metadata"]["name"]:
                runtime: Manifest = self.runtime
                return runtime
        if path == f"/api/v1/namespaces/{NAMESPACE}/pods":
            self.allow("list", "", "pods", "")
            return self._pods(query["labelSelector"])
        raise RefusalError(
            404, f"{method} {path}: the server could not find the requested resource", "K8s/reference/using-api"
        )

    def _trainjobs(self, method: str, name: str, query: dict[str, str], body: bytes) -> Manifest:
        if method == "POST":
            return self._create(json.loads(body), query)
        if method == "GET" and not name:
            key, _, value = query.get("labelSelector", "").partition("=")
            jobs = [job.seen() for job in self.jobs.values()]
            return {"items": [job for job in jobs if not key or job["metadata"]["labels"].get(key) == value]}
        if name not in self.jobs:
            raise RefusalError(404, f'trainjobs.{GROUP} "{name}" not found', "K8s/reference/using-api")
        if method == "DELETE":
            job = self.jobs.pop(name)
            for node in job.nodes:
                node.end()
            return {"kind": "Status", "status": "Success"}
        return self.jobs[name].seen()

    def _create(self, manifest: Manifest, query: dict[str, str]) -> Manifest:
        if query.get("fieldValidation") != "Strict":
            raise RefusalError(
                400,
                "this stub requires strict field validation",
                "K8s/reference/using-api/api-concepts, field validation",
            )
        lost = list(dropped(manifest, models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict()))
        if lost:
            raise RefusalError(
                400, f"strict decoding error: {lost}", "K8s/reference/using-api/api-concepts, field validation"
            )
        name = manifest["metadata"]["name"]
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63:
            raise RefusalError(
                422, f"metadata.name {name}: must be an RFC 1035 label", "trainjob_types.go, XValidation"
            )
        if name in self.jobs:
            raise RefusalError(409, f'trainjobs.{GROUP} "{name}" already exists', "K8s/reference/using-api")
        if refused := refusals(manifest, ACCOUNT):
            raise RefusalError(422, f"denied request: {refused}", "k8s/overlays/admission")
        self._admit(manifest["spec"])
        self.created.append(manifest)
        whole = manifest | {"metadata": manifest["metadata"] | {"namespace": NAMESPACE, "creationTimestamp": NOW}}
        self.jobs[name] = Job(whole, self._run(manifest))
        self.creation_answered.wait(60)
        return whole

    def _admit(self, spec: Manifest) -> None:
        """Apply the checks of Trainer's validating webhook."""
        variables = {env["name"] for env in spec["trainer"].get("env") or []}
        if variables & RESERVED:
            rule = "pkg/runtime/framework/plugins/torch/torch.go, Validate"
            raise RefusalError(403, f"must not have reserved envs: {variables & RESERVED}", rule)
        rule = "pkg/runtime/framework/plugins/jobset/jobset.go, Validate"
        for patch in spec.get("runtimePatches") or []:
            if "/" not in patch["manager"]:
                raise RefusalError(403, "manager must be a domain-prefixed path", rule)
            for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
                if job["name"] != "node":
                    raise RefusalError(403, "must not have replicated job that doesn't exist in the runtime", rule)
                for container in job["template"]["spec"]["template"]["spec"]["containers"]:
                    if container["name"] != "node":
                        raise RefusalError(403, "must not have container that doesn't exist in the runtime job", rule)
                    if container.get("env"):
                        raise RefusalError(403, "must not have envs for the node container", rule)

    # ---- the pods of a job

    def pod(self, manifest: Manifest) -> Manifest:
        """The pod template of a job: the runtime's, with the job's patches merged in the way Trainer does.

        pkg/runtime/core/trainingruntime.go: a strategic merge; lists by their keys in the API (volumes by name, mounts
        by path, containers by name).
        """
        job = self.runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
        pod: Manifest = job["template"]["spec"]["template"]
        for patch in manifest["spec"].get("runtimePatches") or []:
            node = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
            pod = merge(pod, node["template"]["spec"]["template"])
        trainer = manifest["spec"]["trainer"]
        container = pod["spec"]["containers"][0] | {key: trainer[key] for key in ("image", "command", "args")}
        container |= {"env": trainer["env"], "resources": trainer["resourcesPerNode"]}
        return merge(pod, {"spec": {"containers": [container]}})

    def _run(self, manifest: Manifest) -> list[Node]:
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        port, count = free_port(), spec["trainer"]["numNodes"]
        pod = self.pod(manifest)
        command = [*spec["trainer"]["command"], *spec["trainer"]["args"]]
        if command[0] == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
        nodes = []
        for index in range(count):
            home = self.folder / f"{name}-{index}"
            home.mkdir()
            environment = {key: value for key, value in os.environ.items() if key not in OWN}
            environment |= {"KUBEALIGN_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            environment |= {env["name"]: env["value"] for env in spec["trainer"]["env"]}
            environment |= {"PET_NNODES": str(count), "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": str(index)}
            environment |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
            self._mount(pod, home, environment)
            node_command = self.command or command
            nodes.append(Node(f"{name}-node-0-{index}-x", index, node_command, environment, home / "log"))
        return nodes

    def _mount(self, pod: Manifest, home: Path, environment: dict[str, str]) -> None:
        """Write the pod's projected secrets as files; the state claim is mounted as this process's own home folder."""
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            if "persistentVolumeClaim" in volume and environment["KUBEALIGN_HOME"] == mounts[volume["name"]]:
                environment["KUBEALIGN_HOME"] = os.environ["KUBEALIGN_HOME"]
            for source in (volume.get("projected") or {}).get("sources", []):
                folder = home / "secrets"
                folder.mkdir(exist_ok=True)
                for item in source["secret"]["items"]:
                    (folder / item["path"]).write_text(self.secrets[source["secret"]["name"]][item["key"]])
                assert environment["KUBEALIGN_SECRETS"] in (mounts[volume["name"]], str(folder))
                environment["KUBEALIGN_SECRETS"] = str(folder)

    def _pods(self, selector: str) -> Manifest:
        name = re.search(r"jobset.sigs.k8s.io/jobset-name=([\w-]+)", selector)
        job = self.jobs.get(name[1]) if name else None
        return {
            "kind": "PodList",
            "apiVersion": "v1",
            "items": [self._seen_pod(node) for node in job.nodes] if job else [],
        }

    def _seen_pod(self, node: Node) -> Manifest:
        names = {
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(node.index),
        }
        return {
            "metadata": {"name": node.name, "labels": names, "creationTimestamp": NOW},
            "spec": {"containers": [{"name": "node", "image": "x"}]},
            "status": {"phase": node.phase()},
        }

    def log(self, name: str) -> Node:
        """The node with a pod's name, if its log may be read."""
        self.allow("get", "", "pods/log", name)
        for job in list(self.jobs.values()):
            for node in job.nodes:
                if node.name == name:
                    return node
        raise RefusalError(404, f'pods "{name}" not found', "K8s/reference/using-api")


OWN = ("MLFLOW_TRACKING_URI", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "KUBEALIGN_STATE")
OWN += ("KUBEALIGN_CLUSTER", "KUBEALIGN_KFP_RUN", "KUBEALIGN_PARENT_RUN", "KUBECONFIG")
"""Variables of the step that a node does not have unless its job sets them."""
KEYS = {"volumes": "name", "containers": "name", "volumeMounts": "mountPath"}


def merge(base: Any, patch: Any, key: str = "") -> Any:
    """A strategic merge of a patch into a value."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {name: merge(base[name], value, name) if name in base else value for name, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and key in KEYS:
        entries = {entry[KEYS[key]]: entry for entry in base}
        for entry in patch:
            name = entry[KEYS[key]]
            entries[name] = merge(entries[name], entry) if name in entries else entry
        return list(entries.values())
    return patch


class Handler(BaseHTTPRequestHandler):
    """HTTP around `KubeServer.route`."""

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        kube: KubeServer = self.server.kube  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            if kube.faults:
                raise RefusalError(kube.faults.pop(0), "the server is currently unable to handle the request", "K8s")
            if match := re.fullmatch(rf"/api/v1/namespaces/{NAMESPACE}/pods/([\w.-]+)/log", url.path):
                self._stream(kube.log(match[1]), query.get("follow") == "True")
                return
            self._answer(200, kube.route(self.command, url.path, query, body))
        except RefusalError as error:
            self._answer(error.status, {"kind": "Status", "message": str(error), "code": error.status})

    def _answer(self, status: int, value: Manifest) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, node: Node, follow: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        with node.log.open("rb") as log:
            while True:
                ended = node.phase() != "Running"
                try:
                    self.wfile.write(log.read())
                    self.wfile.flush()
                except OSError:
                    return
                if ended or not follow:
                    return
                time.sleep(0.05)

    def do_GET(self) -> None:
        """Serve a read."""
        self._serve()

    def do_POST(self) -> None:
        """Serve a write."""
        self._serve()

    def do_DELETE(self) -> None:
        """Serve a deletion."""
        self._serve()
