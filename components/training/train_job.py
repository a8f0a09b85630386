"""sft and dpo on several nodes: the step becomes a Kubeflow TrainJob, whose log and fate are the step's own.

The step uploads its inputs to the location that `cluster.state` names, starts a job whose nodes run
`python -m components sft` under torchrun, and downloads the output. A step that is started again finds the job of the
previous attempt and follows it; after a failed one it starts a new job, which resumes from the checkpoint.
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
from components.common.images import TRAIN_IMAGE
from components.config.cluster import ClusterConfig
from components.config.loading import validated
from components.config.model import ExecutionConfig
from components.tracking import events, storage, store
from components.tracking.result import StageResult
from components.tracking.run import KFP_RUN_VARIABLE, parent_run
from components.training.config import OptimizerConfig

VARIABLE = "KUBEALIGN_CLUSTER"
"""Environment variable of a step that is to run on several nodes: the section `cluster` as JSON."""
HOME = "/kubealign"
"""Where the state volume is mounted, and KUBEALIGN_HOME of every step."""
SECRETS = "/var/run/kubealign"
"""Where the nodes find a file for every secret, named as the environment variable that it becomes."""
MLFLOW_KEYS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
S3_KEYS = {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}
PASSED_ON = ("MLFLOW_EXPERIMENT_NAME", "AWS_DEFAULT_REGION", KFP_RUN_VARIABLE)
KEY_LABEL = "kubealign/key"
POLL_S = 5.0
PATIENCE_S = 600.0
"""How long the step puts up with a Kubernetes that does not answer."""
TAIL = 20
"""Lines of the further nodes' logs that are shown after a failure."""


def several_nodes() -> ClusterConfig | None:
    """The section `cluster` when this step is to run on several nodes."""
    text = os.environ.get(VARIABLE)
    return validated(ClusterConfig, json.loads(text), VARIABLE) if text else None


def labels(step: str, cluster: ClusterConfig) -> dict[str, str]:
    """Labels of every pod of a step."""
    return {"app.kubernetes.io/part-of": "kubealign", "app.kubernetes.io/component": step} | cluster.labels


def run_on_nodes(
    cluster: ClusterConfig,
    stage: str,
    config: OptimizerConfig,
    model: ExecutionConfig,
    inputs: dict[str, Path],
    out: Path,
) -> StageResult:
    """Run `sft` or `dpo` as a TrainJob and wait for its end.

    Args:
        cluster: nodes, image, resources, and the location that all of them see.
        stage: `sft` or `dpo`.
        config: of the stage.
        model: how the model is run and tuned.
        inputs: folders with manifests by the name of their option (`dataset`, `base`, `sft-model`).
        out: gets what the stage writes.

    Returns:
        what the stage returned.

    Raises:
        KubealignError: the job failed, or Kubernetes refused it or has not answered for `PATIENCE_S`.
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
        words = [f"--{name}={location}" for name, location in shared.items()]
        words += [f"--params={job}/params.yaml", f"--out={job}/out", f"--result={job}/result.json"]
        TrainJob(cluster, stage, key, words).run()
    result = parse_document(storage.read(f"{job}/result.json"), StageResult, f"{job}/result.json")
    storage.download(f"{job}/out", out)
    storage.remove(job)
    return result


class TrainJob:
    """One training on several nodes.

    Args:
        cluster: nodes, image and resources.
        stage: `sft` or `dpo`.
        key: names this very training; a job that is there under it is followed, not doubled.
        words: options of the stage's command.
    """

    def __init__(self, cluster: ClusterConfig, stage: str, key: str, words: list[str]) -> None:
        from kubeflow.trainer import KubernetesBackendConfig, TrainerClient

        logging.getLogger("kubeflow").setLevel(logging.ERROR)
        self.cluster, self.stage, self.key, self.words = cluster, stage, key, words
        with _explained("reach Kubernetes"):
            self.client = TrainerClient(KubernetesBackendConfig())
        self.api = self.client.backend.custom_api
        # The client sends no field validation: what this Kubernetes does not know would be dropped without a word.
        self.api.create_namespaced_custom_object = functools.partial(
            self.api.create_namespaced_custom_object, field_validation="Strict"
        )
        self.name = ""

    def run(self) -> None:
        """Start the job, or find it, and follow it to its end; it is removed whatever happens.

        Raises:
            KubealignError: it failed.
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
                    TrainerArgs(self.words),
                    ActiveDeadlineSeconds(cluster.timeout_s),
                    pod_patch(cluster, self.stage),
                ],
            )
        events.note(self.stage, f"TrainJob {name} on {cluster.nodes} nodes is started")
        return name

    def _environment(self) -> dict[str, str]:
        cluster = self.cluster
        known = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
        known |= {"MLFLOW_TRACKING_URI": cluster.mlflow_uri, "KUBEALIGN_PARENT_RUN": parent_run()}
        known |= {"AWS_ENDPOINT_URL": cluster.s3_endpoint} if cluster.s3_endpoint else {}
        state = {"KUBEALIGN_HOME": HOME} if cluster.state.startswith("pvc:") else {"KUBEALIGN_STATE": cluster.state}
        secrets = {"KUBEALIGN_SECRETS": SECRETS} if cluster.mlflow_secret or cluster.s3_secret else {}
        return {name: value for name, value in (known | state | secrets).items() if value}

    def _running(self) -> str:
        """The job of an attempt before, when it has not failed; a failed one is removed."""
        with _explained("list TrainJobs"):
            found = self.api.list_namespaced_custom_object(*self._kind(), label_selector=f"{KEY_LABEL}={self.key}")
        for job in found["items"]:
            name = str(job["metadata"]["name"])
            if job["metadata"].get("deletionTimestamp") or _condition(job)[0] == "Failed":
                self._remove(name)
            else:
                events.note(self.stage, f"TrainJob {name} of a previous attempt is followed")
                return name
        return ""

    def _follow(self) -> None:
        """Wait for the end, with the first node's log on this step's output."""
        ended = threading.Event()
        log = threading.Thread(target=self._print_log, args=(ended,), daemon=True)
        log.start()
        state, message = "", ""
        answered = time.monotonic()
        while state not in ("Complete", "Failed"):
            try:
                with _explained(f"ask for the TrainJob {self.name}"):
                    state, message = _condition(self.api.get_namespaced_custom_object(*self._kind(), self.name))
                answered = time.monotonic()
            except KubernetesApiError as error:
                if not error.retryable or time.monotonic() - answered > PATIENCE_S:
                    raise
            ended.wait(POLL_S if state not in ("Complete", "Failed") else 0)
        ended.set()
        log.join(timeout=60)
        if state == "Failed":
            self._print_other_logs()
            raise KubealignError(f"the TrainJob {self.name} failed: {message}; the log of its first node stands above")

    def _print_log(self, ended: threading.Event) -> None:
        """Print the first node's log as it grows; a stream that breaks is opened again behind what was printed."""
        printed = 0
        last = False
        while not last:
            last = ended.is_set()
            try:
                for number, line in enumerate(self.client.get_job_logs(self.name, follow=True)):
                    if number >= printed:
                        print(line, flush=True)
                        printed = number + 1
            except (RuntimeError, TimeoutError) as error:
                if last and not printed:
                    events.note(self.stage, f"no log: {error}")
            ended.wait(POLL_S)

    def _print_other_logs(self) -> None:
        with _explained("read the logs of the nodes"):
            for step in self.client.get_job(self.name).steps[: self.cluster.nodes]:
                if step.name != "node-0":
                    for line in list(self.client.get_job_logs(self.name, step=step.name))[-TAIL:]:
                        print(f"{step.name}: {line}", flush=True)

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
    """What the nodes have beyond the runtime: labels, the state volume, /dev/shm, secrets as files, where they may run.

    Trainer takes environment variables from secrets for no container of its own, hence files. The rights of the pods
    are those of the restricted Pod Security Standard, whatever the runtime says.
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
    named = ((cluster.mlflow_secret, MLFLOW_KEYS), (cluster.s3_secret, S3_KEYS))
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


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one sentence of what Kubeflow's client raises, with the reason that the server gave."""
    import urllib3
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException

    try:
        yield
    except (RuntimeError, ValueError, ApiException, urllib3.exceptions.HTTPError, OSError, ConfigException) as error:
        cause = error.__cause__ or error
        status = int(cause.status or 0) if isinstance(cause, ApiException) else 0
        said = f"{status} {_message(cause)}" if status else str(cause)
        said = f"{error}: {said}" if cause is not error else said
        if isinstance(error, ConfigException):
            said = f"{said}; on several nodes a step runs in a cluster"
        text = store.without_credentials(single_line(said))[:600]
        raise KubernetesApiError(f"cannot {what}: {text}", not 400 <= status < 500 or status == 429) from error


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _condition(job: dict[str, Any]) -> tuple[str, str]:
    """How a job ended (`Complete` or `Failed`; nothing before) and the reason."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition["type"], f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return "", ""


@contextmanager
def _cancelled_by_sigterm() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A run that is cancelled ends its pods by SIGTERM, which must not leave a job behind.

    Yields:
        `held`: within it SIGTERM waits for the end, so that a job which was asked for is known by its name.
    """
    holding, came = False, False

    def cancel(number: int, frame: Any) -> None:
        nonlocal came
        came = True
        if not holding:
            raise SystemExit(128 + number)

    @contextmanager
    def held() -> Iterator[None]:
        nonlocal holding
        holding = True
        try:
            yield
        finally:
            holding = False
        if came:
            raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield held
    finally:
        signal.signal(signal.SIGTERM, before)
