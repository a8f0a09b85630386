"""sft and dpo on several nodes, as a Kubeflow TrainJob whose log and outcome become the step's own.

The step uploads its inputs to the location that `cluster.state` names, starts a job whose nodes run
`python -m components sft` under torchrun, and downloads the output. A retried step finds the job of the previous
attempt and follows it; after a failed job it starts a new one, which resumes from the checkpoint.
"""

import functools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml

from components.common.documents import parse_document
from components.common.errors import KubealignError, KubernetesApiError, single_line
from components.common.files import digest, verify_manifest
from components.common.foreign import one_line
from components.common.images import TRAIN_IMAGE
from components.common.secrets import without_credentials
from components.config.cluster import ClusterConfig
from components.config.loading import validated
from components.config.model import ExecutionConfig
from components.tracking import events, storage, store
from components.tracking.keys import CACHE_KEY_VARIABLE
from components.tracking.result import StageResult
from components.tracking.run import parent_run
from components.tracking.store import KFP_RUN_VARIABLE
from components.training.config import OptimizerConfig

VARIABLE = "KUBEALIGN_CLUSTER"
"""Environment variable of a step that runs on several nodes: the section `cluster` as JSON."""
HOME = "/kubealign"
"""Mount path of the state volume, and KUBEALIGN_HOME of every step."""
SECRETS = "/var/run/kubealign"
"""Mount path of the secrets on the nodes: one file per secret, named as the environment variable it becomes."""
MLFLOW_KEYS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
S3_KEYS = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}
CACHE_KEYS = {"cache_key": CACHE_KEY_VARIABLE}
ACCOUNT = Path("/var/run/kubealign-train-jobs")
"""Mount path of `cluster.train_job_secret` in a step that starts TrainJobs: its own account has no right to."""
PASSED_ON = ("MLFLOW_EXPERIMENT_NAME", "AWS_DEFAULT_REGION", KFP_RUN_VARIABLE)
KEY_LABEL = "kubealign/key"
POLL_S = 5.0
RETRY_TIMEOUT_S = 600.0
"""Seconds for which requests to an unresponsive Kubernetes are retried."""
TAIL = 20
"""Lines of every other node's log that are shown after a failure."""


def several_nodes() -> ClusterConfig | None:
    """The section `cluster` if this step runs on several nodes, else None."""
    text = os.environ.get(VARIABLE)
    return validated(ClusterConfig, json.loads(text), VARIABLE) if text else None


def labels(step: str, cluster: ClusterConfig) -> dict[str, str]:
    """Labels of every pod of a step; network policies go by ours, so none of the configuration replaces them."""
    return cluster.labels | {"app.kubernetes.io/part-of": "kubealign", "app.kubernetes.io/component": step}


def run_on_nodes(
    cluster: ClusterConfig,
    stage: str,
    config: OptimizerConfig,
    model: ExecutionConfig,
    inputs: dict[str, Path],
    out: Path,
) -> StageResult:
    """Run `sft` or `dpo` as a TrainJob and wait for it to end.

    Args:
        cluster: nodes, image, resources, and the location that all nodes share.
        stage: `sft` or `dpo`.
        config: section of the stage.
        model: execution and fine-tuning settings of the model.
        inputs: folders with manifests, by CLI option (`dataset`, `base`, `sft-model`).
        out: gets the stage's output.

    Returns:
        the stage's result.

    Raises:
        KubealignError: the job failed, or Kubernetes rejected it or has not answered for `RETRY_TIMEOUT_S`.
    """
    sections = {stage: config.model_dump(mode="json"), "model": model.model_dump(mode="json")}
    digests = {name: verify_manifest(folder) for name, folder in inputs.items()}
    run = os.environ.get(KFP_RUN_VARIABLE, "")
    key = digest([stage, sections, digests, cluster.model_dump(mode="json"), run])[:12]
    state = str(store.home()) if cluster.state.startswith("pvc:") else cluster.state.rstrip("/")
    job = f"{state}/jobs/{stage}-{key}"
    if not storage.exists(f"{job}/result.json"):
        shared = {name: f"{state}/inputs/{digests[name]}" for name in inputs}
        for name, folder in inputs.items():
            storage.upload(folder, shared[name])
        storage.write(f"{job}/params.yaml", yaml.safe_dump(sections))
        args = [f"--{name}={location}" for name, location in shared.items()]
        args += [f"--params={job}/params.yaml", f"--out={job}/out", f"--result={job}/result.json"]
        TrainJob(cluster, stage, key, args).run()
    result = parse_document(storage.read(f"{job}/result.json"), StageResult, f"{job}/result.json")
    storage.download(f"{job}/out", out)
    storage.remove(job)
    return result


class TrainJob:
    """A training on several nodes.

    Args:
        cluster: nodes, image and resources.
        stage: `sft` or `dpo`.
        key: identifies the training; a job that already exists under it is followed, not duplicated.
        args: arguments of the stage's command.
    """

    def __init__(self, cluster: ClusterConfig, stage: str, key: str, args: list[str]) -> None:
        from kubeflow.trainer import TrainerClient

        logging.getLogger("kubeflow").setLevel(logging.ERROR)
        self.cluster, self.stage, self.key, self.args = cluster, stage, key, args
        with _explained("reach Kubernetes"):
            self.client = TrainerClient(_account())
        self.api = self.client.backend.custom_api
        # By default the client requests no field validation: Kubernetes would silently drop unknown fields.
        self.api.create_namespaced_custom_object = functools.partial(
            self.api.create_namespaced_custom_object, field_validation="Strict"
        )
        self.name = ""

    def run(self) -> None:
        """Start or find the job and follow it to its end; it is removed in any case.

        Raises:
            KubealignError: the job failed.
        """
        with _cancelled_by_sigterm() as held:
            try:
                with held():
                    self.name = self._running() or self._start()
                self._follow()
            finally:
                self._remove(self.name)

    def _start(self) -> str:
        from kubeflow.trainer.options import ActiveDeadlineSeconds, Labels, Name, TrainerArgs, TrainerCommand
        from kubeflow.trainer.types.types import CustomTrainerContainer

        cluster = self.cluster
        train = cluster.train
        resources = {"cpu": train.cpu, "memory": train.memory} | ({train.gpu_type: train.gpus} if train.gpus else {})
        name = f"kubealign-{self.stage}-{self.key}-{int(time.time()):x}"
        command = ["torchrun", f"--nproc-per-node={max(1, train.gpus)}", "-m", "components", self.stage]
        with _explained(f"start the TrainJob {name}"):
            self.client.train(
                runtime=cluster.runtime,
                trainer=CustomTrainerContainer(
                    image=cluster.train_image or TRAIN_IMAGE,
                    num_nodes=cluster.nodes,
                    resources_per_node=resources,
                    env=self._environment(),
                ),
                options=[
                    Name(name),
                    Labels(labels(self.stage, cluster) | {KEY_LABEL: self.key}),
                    TrainerCommand(command),
                    TrainerArgs(self.args),
                    ActiveDeadlineSeconds(cluster.timeout_s),
                    pod_patch(cluster, self.stage),
                ],
            )
        events.note(self.stage, f"started TrainJob {name} on {cluster.nodes} nodes")
        return name

    def _environment(self) -> dict[str, str]:
        cluster = self.cluster
        known = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
        known |= {"MLFLOW_TRACKING_URI": cluster.mlflow_uri, "KUBEALIGN_PARENT_RUN": parent_run()}
        known |= {"AWS_ENDPOINT_URL": cluster.s3_endpoint} if cluster.s3_endpoint else {}
        state = {"KUBEALIGN_HOME": HOME} if cluster.state.startswith("pvc:") else {"KUBEALIGN_STATE": cluster.state}
        secrets = {"KUBEALIGN_SECRETS": SECRETS}
        return {name: value for name, value in (known | state | secrets).items() if value}

    def _running(self) -> str:
        """The name of a previous attempt's job, or an empty string; a failed job is removed."""
        with _explained("list TrainJobs"):
            jobs = self.api.list_namespaced_custom_object(*self._kind(), label_selector=f"{KEY_LABEL}={self.key}")
        for job in jobs["items"]:
            name = str(job["metadata"]["name"])
            if job["metadata"].get("deletionTimestamp") or _condition(job)[0] == "Failed":
                self._remove(name)
            else:
                events.note(self.stage, f"following TrainJob {name} of a previous attempt")
                return name
        return ""

    def _follow(self) -> None:
        """Wait for the job to end while copying the first node's log to this step's output."""
        ended = threading.Event()
        log = threading.Thread(target=self._print_log, args=(ended,), daemon=True)
        log.start()
        state, message = "", ""
        last_answer = time.monotonic()
        while state not in ("Complete", "Failed"):
            try:
                with _explained(f"ask for the TrainJob {self.name}"):
                    state, message = _condition(self.api.get_namespaced_custom_object(*self._kind(), self.name))
                last_answer = time.monotonic()
            except KubernetesApiError as error:
                if not error.retryable or time.monotonic() - last_answer > RETRY_TIMEOUT_S:
                    raise
            ended.wait(POLL_S if state not in ("Complete", "Failed") else 0)
        ended.set()
        log.join(timeout=60)
        if state == "Failed":
            self._print_other_logs()
            raise KubealignError(f"the TrainJob {self.name} failed: {message}; the log of its first node is above")

    def _print_log(self, ended: threading.Event) -> None:
        """Print the first node's log as it grows; a broken stream is reopened after the last printed line."""
        printed = 0
        last = False
        while not last:
            last = ended.is_set()
            try:
                for index, line in enumerate(self.client.get_job_logs(self.name, follow=True)):
                    if index >= printed:
                        print(one_line(line, indented=True), flush=True)
                        printed = index + 1
            except (RuntimeError, TimeoutError) as error:
                if last and not printed:
                    events.note(self.stage, f"no log from the first node: {error}")
            ended.wait(POLL_S)

    def _print_other_logs(self) -> None:
        with _explained("read the logs of the nodes"):
            for step in self.client.get_job(self.name).steps[: self.cluster.nodes]:
                if step.name != "node-0":
                    for line in list(self.client.get_job_logs(self.name, step=step.name))[-TAIL:]:
                        print(one_line(f"{step.name}: {line}"), flush=True)

    def _remove(self, name: str) -> None:
        from kubernetes.client import ApiException

        if not name:
            return
        try:
            with _explained(f"remove the TrainJob {name}"):
                self.client.delete_job(name)
        except KubernetesApiError as error:
            cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
            if isinstance(cause, ApiException) and cause.status == 404:
                return
            events.note(self.stage, str(error))

    def _kind(self) -> tuple[str, str, str, str]:
        return "trainer.kubeflow.org", "v1alpha1", self.client.backend.namespace, "trainjobs"


def pod_patch(cluster: ClusterConfig, stage: str) -> Any:
    """Additions to the runtime's pods: labels, the state volume, /dev/shm, secrets as files, scheduling constraints.

    Trainer does not support environment variables from secrets, hence files. The pods get the restricted Pod Security
    Standard whatever the runtime sets.
    """
    from kubeflow.trainer import options

    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []

    def mount(name: str, path: str, volume: dict[str, Any], read_only: bool = False) -> None:
        volumes.append({"name": name} | volume)
        mounts.append({"name": name, "mountPath": path} | ({"readOnly": True} if read_only else {}))

    kind, _, claim = cluster.state.partition(":")
    if kind == "pvc":
        mount("state", HOME, {"persistentVolumeClaim": {"claimName": claim}})
    if cluster.train.shm:
        mount("shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": cluster.train.shm}})  # noqa: S108
    named = (
        (cluster.mlflow_secret, MLFLOW_KEYS),
        (cluster.state_secret, S3_KEYS),
        (cluster.signing_secret, CACHE_KEYS),
    )
    sources = [
        {"secret": {"name": secret, "items": [{"key": key, "path": path} for key, path in keys.items()]}}
        for secret, keys in named
        if secret
    ]
    if sources:
        mount("secrets", SECRETS, {"projected": {"sources": sources}}, read_only=True)
    spec = options.PodSpecPatch(
        volumes=volumes or None,
        containers=[
            options.ContainerPatch(
                name="node",
                volume_mounts=mounts or None,
                security_context={"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            )
        ],
        security_context={
            "runAsNonRoot": True,
            "runAsUser": cluster.run_as_user,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        image_pull_secrets=[{"name": name} for name in cluster.pull_secrets] or None,
        node_selector=dict(cluster.train.node_selector) or None,
        tolerations=[
            {key: value for key, value in toleration.model_dump().items() if value}
            for toleration in cluster.train.tolerations
        ]
        or None,
    )
    pod = options.PodTemplatePatch(metadata={"labels": labels(stage, cluster)}, spec=spec)
    node = options.ReplicatedJobPatch(
        name="node", template=options.JobTemplatePatch(spec=options.JobSpecPatch(template=pod))
    )
    return options.RuntimePatch(
        training_runtime_spec=options.TrainingRuntimeSpecPatch(
            template=options.JobSetTemplatePatch(spec=options.JobSetSpecPatch(replicated_jobs=[node]))
        )
    )


def _account() -> Any:
    """Kubeflow's client as the account of the mounted secret; outside of a pod, as a kubeconfig says."""
    from kubeflow.trainer import KubernetesBackendConfig
    from kubernetes.client import Configuration
    from kubernetes.config.incluster_config import InClusterConfigLoader

    if not (ACCOUNT / "token").is_file():
        return KubernetesBackendConfig()
    configuration = Configuration()
    InClusterConfigLoader(str(ACCOUNT / "token"), str(ACCOUNT / "ca.crt")).load_and_set(configuration)
    namespace = (ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    return KubernetesBackendConfig(namespace=namespace, client_configuration=configuration)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Report errors of Kubeflow's client as one sentence, with the server's reason."""
    import urllib3
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException

    try:
        yield
    except (RuntimeError, ValueError, ApiException, urllib3.exceptions.HTTPError, OSError, ConfigException) as error:
        cause = error.__cause__ or error
        status = int(cause.status or 0) if isinstance(cause, ApiException) else 0
        reason = f"{status} {_message(cause)}" if status else str(cause)
        reason = f"{error}: {reason}" if cause is not error else reason
        if isinstance(error, ConfigException):
            reason = f"{reason}; a step on several nodes has to run in a cluster"
        text = without_credentials(single_line(reason))[:600]
        raise KubernetesApiError(f"cannot {what}: {text}", not 400 <= status < 500 or status == 429) from error


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _condition(job: dict[str, Any]) -> tuple[str, str]:
    """A job's final state (`Complete` or `Failed`; empty before the end) and its reason."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition["type"], f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return "", ""


@contextmanager
def _cancelled_by_sigterm() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Turn SIGTERM, by which Kubernetes ends the pods of a cancelled run, into an exit that leaves no job behind.

    Yields:
        `held`: a context that defers SIGTERM to its end, so that the name of a job being created is known.
    """
    holding, received = False, False

    def cancel(signal_number: int, frame: Any) -> None:
        nonlocal received
        received = True
        if not holding:
            raise SystemExit(128 + signal_number)

    @contextmanager
    def held() -> Iterator[None]:
        nonlocal holding
        holding = True
        try:
            yield
        finally:
            holding = False
        if received:
            raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    previous = signal.signal(signal.SIGTERM, cancel)
    try:
        yield held
    finally:
        signal.signal(signal.SIGTERM, previous)
