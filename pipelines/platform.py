"""The section `cluster` applied to Kubernetes: images, secrets, resources and volumes of every step, set with
kfp-kubernetes. Nothing here changes a result.
"""

from collections.abc import Sequence
from typing import Any

from kfp import dsl, kubernetes

from components.common.errors import InputError
from components.common.images import DATA_IMAGE, TRAIN_IMAGE
from components.common.urls import is_url
from components.config.cluster import ClusterConfig
from components.config.params import Config
from components.stages import BY_NAME
from components.tracking.keys import CACHE_KEY_VARIABLE, PUBLIC_KEYS_VARIABLE, SIGNING_KEY_VARIABLE
from components.training.train_job import ACCOUNT, HOME, MLFLOW_KEYS, S3_KEYS, VARIABLE, labels

RUN_LABEL = "metadata.labels['pipeline/runid']"
"""Kubeflow's label with the run's id; kfp-kubernetes' README documents its use as an environment variable."""
SIGNING_KEYS = {
    "signing_key": SIGNING_KEY_VARIABLE,
    "cache_key": CACHE_KEY_VARIABLE,
    "public_keys": PUBLIC_KEYS_VARIABLE,
}
"""Keys of cluster.signing_secret, and the environment variable that each becomes in the tasks that get it."""
GIT_KEYS = {"username": "GIT_USERNAME", "password": "GIT_PASSWORD", "host": "GIT_HOST"}


def check(config: Config) -> None:
    """Reject settings that work on a laptop but not in a cluster.

    Raises:
        InputError: a setting that does not work in a pod.
    """
    if not config.cluster.mlflow_uri:
        raise InputError(
            "cluster.mlflow_uri is empty: pods cannot share a SQLite file; name your MLflow server, such as"
            " http://mlflow:5000"
        )
    if not config.cluster.signing_secret:
        raise InputError(
            "cluster.signing_secret is empty: register has nothing to sign versions with, so none would be trusted;"
            " `kubealign keys --secret` prints a secret"
        )
    if config.cluster.nodes > 1 and not config.cluster.state:
        raise InputError(
            f"cluster.nodes={config.cluster.nodes}, cluster.state is empty: the nodes share data, model and"
            " checkpoints there; set it to pvc:CLAIM (ReadWriteMany) or s3://bucket/prefix"
        )
    repo = config.data.repo
    if config.data.revision == "workspace" or not is_url(repo):
        raise InputError(
            f"data.repo={repo}, data.revision={config.data.revision}: a pod sees no folder of this machine;"
            " set data.repo to the URL of the git repository and data.revision to a branch, tag or commit of it"
        )
    if not repo.startswith("https://"):
        raise InputError(f"data.repo={repo}: a pod knows no host keys and no other machine; name the https URL of it")


def for_its_hardware(config: Config, runner: str) -> Config:
    """The configuration with `model.hardware` resolved to what the steps will run on.

    Args:
        config: the whole configuration.
        runner: `kubeflow`, whose hardware the section `cluster` gives; `subprocess`, this machine; or `docker`, whose
            containers see no GPU.
    """
    if config.model.hardware != "auto":
        return config
    if runner == "kubeflow":
        resolved = "gpu+bf16" if config.cluster.train.gpus else "cpu"
    else:
        from components.engine.hardware import hardware

        resolved = hardware(gpu=runner != "docker")
    return config.model_copy(update={"model": config.model.model_copy(update={"hardware": resolved})})


def pipeline_config(cluster: ClusterConfig) -> dsl.PipelineConfig:
    """Settings of the whole workflow."""
    return dsl.PipelineConfig(ttl_seconds_after_finished=cluster.ttl_s or None)


def configure(task: Any, cluster: ClusterConfig, public_keys: Sequence[str] = ()) -> None:
    """Give a task its image, environment, resources, volumes and retries.

    Args:
        task: the task.
        cluster: the section.
        public_keys: the keys it trusts; none for those in the signing secret.
    """
    stage = BY_NAME[task.name]
    launches_train_job = cluster.nodes > 1 and stage.several_nodes
    trains = stage.image == "train" and not launches_train_job
    task.set_container_image((cluster.train_image or TRAIN_IMAGE) if trains else (cluster.data_image or DATA_IMAGE))
    kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    _environment(task, cluster)
    _keys(task, cluster, public_keys)
    if launches_train_job:
        task.set_env_variable(VARIABLE, cluster.model_dump_json())
        kubernetes.use_secret_as_volume(task, cluster.train_job_secret, str(ACCOUNT))
    _resources(task, cluster, trains)
    kubernetes.set_security_context(task, run_as_user=cluster.run_as_user, run_as_group=0, run_as_non_root=True)
    kubernetes.set_timeout(task, cluster.timeout_s)
    for key, value in labels(task.name, cluster).items():
        kubernetes.add_pod_label(task, key, value)
    if cluster.retries:
        task.set_retry(cluster.retries, f"{cluster.backoff_s}s", 2.0, f"{max(3600, cluster.backoff_s)}s")


def pod_template(cluster: ClusterConfig) -> str:
    """Name of the Argo template that Kubeflow creates for a step of this configuration; pods are named after it.

    kubeflow/pipelines 2.17, argocompiler/container.go, addContainerExecutorTemplate: the name contains the numbers of
    annotations and labels, and `retry` if retries are configured.
    """
    retry = "retry-" if cluster.retries else ""
    return f"metadata-0-{len(labels('', cluster))}-{retry}system-container-impl"


def _environment(task: Any, cluster: ClusterConfig) -> None:
    task.set_env_variable("MLFLOW_TRACKING_URI", cluster.mlflow_uri)
    kubernetes.use_field_path_as_env(task, "KUBEALIGN_KFP_RUN", RUN_LABEL)
    if cluster.ui_url:
        task.set_env_variable("KUBEALIGN_KFP_URL", cluster.ui_url)
    if cluster.s3_endpoint:
        task.set_env_variable("AWS_ENDPOINT_URL", cluster.s3_endpoint)
    named = {
        "mlflow": (cluster.mlflow_secret, MLFLOW_KEYS),
        "data": (cluster.data_secret, S3_KEYS),
        "state": (cluster.state_secret, S3_KEYS),
        "git": (cluster.git_secret, GIT_KEYS),
    }
    for secret, keys in (named[name] for name in BY_NAME[task.name].secrets):
        if secret:
            kubernetes.use_secret_as_env(task, secret, keys)
    kind, _, claim = cluster.state.partition(":")
    if kind == "pvc":
        kubernetes.mount_pvc(task, claim, HOME)
        task.set_env_variable("KUBEALIGN_HOME", HOME)
    elif kind == "s3":
        task.set_env_variable("KUBEALIGN_STATE", cluster.state)


def _keys(task: Any, cluster: ClusterConfig, public_keys: Sequence[str]) -> None:
    """Give a task the keys that it needs, and no others."""
    keys = {key: SIGNING_KEYS[key] for key in BY_NAME[task.name].keys}
    if public_keys and "public_keys" in keys:
        del keys["public_keys"]
        task.set_env_variable(PUBLIC_KEYS_VARIABLE, " ".join(public_keys))
    if keys:
        kubernetes.use_secret_as_env(task, cluster.signing_secret, keys)


def _resources(task: Any, cluster: ClusterConfig, trains: bool) -> None:
    resources = cluster.train if trains else cluster.data
    task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if not trains:
        return
    train = cluster.train
    if train.gpus:
        task.set_accelerator_type(train.gpu_type).set_accelerator_limit(train.gpus)
    if train.shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=train.shm)  # noqa: S108
    for key, value in train.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in train.tolerations:
        kubernetes.add_toleration(
            task, toleration.key or None, toleration.operator, toleration.value or None, toleration.effect or None
        )
