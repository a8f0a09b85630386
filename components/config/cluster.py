"""The section `cluster`: resources and settings of the steps on Kubernetes. No stage reads it."""

from typing import Literal

from pydantic import Field, field_validator

from components.common.urls import parse_url
from components.config.section import Section

QUANTITY = r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti|K|M|G|T)?$"
IMAGE = r"^([^\s@]+(:[\w.-]+|@sha256:[0-9a-f]{64}))?$"


RESERVED_LABELS = ("kubealign", "kubernetes.io", "kubeflow.org", "argoproj.io", "jobset.sigs.k8s.io", "pipeline")
"""Domains of labels by which pods are selected or a run is recognised: a submitter sets none of them."""


class StepResources(Section):
    """Resources of a step; requests and limits are the same."""

    cpu: str = Field(default="1", pattern=r"^\d+(\.\d+)?m?$", description="cores, such as 2 or 500m")
    memory: str = Field(default="4Gi", pattern=QUANTITY, description="memory, such as 4Gi")


class Toleration(Section):
    """A node taint that a step tolerates."""

    key: str = Field(default="", description="key of the taint; empty for all")
    operator: Literal["Equal", "Exists"] = Field(default="Equal", description="how `value` is compared")
    value: str = Field(default="", description="value of the taint; empty with Exists")
    effect: Literal["", "NoSchedule", "NoExecute", "PreferNoSchedule"] = Field(
        default="", description="effect of the taint; empty for all"
    )


class TrainResources(StepResources):
    """Resources of the steps that run a model, whose image is `train_image`."""

    cpu: str = Field(default="4", pattern=r"^\d+(\.\d+)?m?$", description="cores, such as 2 or 500m")
    memory: str = Field(default="16Gi", pattern=QUANTITY, description="memory, such as 4Gi")
    gpus: int = Field(default=0, ge=0, description="GPUs per step")
    gpu_type: str = Field(
        default="nvidia.com/gpu", min_length=1, description="resource name of the GPUs, such as nvidia.com/gpu"
    )
    shm: str = Field(
        default="2Gi",
        pattern=rf"{QUANTITY}|^$",
        description="size of /dev/shm, in memory; empty for the node's default",
    )
    node_selector: dict[str, str] = Field(default={}, description="labels that the node must have")
    tolerations: list[Toleration] = Field(default=[], description="taints of the node that are tolerated")


class ClusterConfig(Section):
    """Settings of `compile --target kubeflow`. Nothing here changes a result, so no stage gets it."""

    data_image: str = Field(
        default="",
        pattern=IMAGE,
        description="image of resolve, fetch, validate, register, with a tag or @sha256 digest; empty for ours",
    )
    train_image: str = Field(default="", pattern=IMAGE, description="image of sft, dpo, evaluate; likewise")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="when a node pulls an image"
    )
    pull_secrets: list[str] = Field(default=[], description="secrets with registry credentials")
    run_as_user: int = Field(default=10001, ge=1, description="user id of every step")
    mlflow_uri: str = Field(
        default="http://mlflow.kubealign.svc:5000",
        pattern=r"^(https?://[^@\s]+)?$",
        description="MLflow server; needed for the kubeflow target",
    )
    ui_url: str = Field(
        default="",
        pattern=r"^(https?://[^@\s]+)?$",
        description="Kubeflow UI, for links from model versions to runs; empty for none",
    )
    mlflow_secret: str = Field(
        default="", description="secret with keys `username` and `password` for MLflow; empty for none"
    )
    s3_endpoint: str = Field(
        default="", pattern=r"^(https?://[^@\s]+)?$", description="S3-compatible store; empty for AWS's own"
    )
    data_secret: str = Field(
        default="",
        description="secret with keys `access_key` and `secret_key` that read the DVC remote and base models in"
        " buckets; resolve and fetch alone get it; empty for none",
    )
    state_secret: str = Field(
        default="",
        description="secret with keys `access_key` and `secret_key` for a `state` in a bucket; sft and dpo alone get"
        " it; empty for none",
    )
    git_secret: str = Field(
        default="",
        description="secret with keys `username`, `password` (a token) and `host`, the one https host that gets them,"
        " for data.repo; resolve and fetch alone get it; or empty",
    )
    signing_secret: str = Field(
        default="kubealign-signing",
        description="secret with keys `signing_key`, `cache_key` and `public_keys`, as `kubealign keys --secret` prints"
        " it; only register gets the first",
    )
    state: str = Field(
        default="pvc:kubealign-state",
        pattern=r"^(pvc:[a-z0-9][a-z0-9.-]*|s3://\S+)?$",
        description="storage that outlives a pod, mainly for checkpoints: pvc:CLAIM or s3://bucket/prefix; empty: a"
        " retried step starts from scratch",
    )
    data: StepResources = StepResources()
    train: TrainResources = TrainResources()
    nodes: int = Field(
        default=1,
        ge=1,
        description="machines that sft and dpo train on; above 1 a step starts a TrainJob of Kubeflow, each node with"
        " the resources of `train`, and `state` has to be a bucket or a claim with ReadWriteMany",
    )
    runtime: str = Field(
        default="kubealign-torch",
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="TrainingRuntime of those TrainJobs, from k8s/several-nodes",
    )
    train_job_secret: str = Field(
        default="kubealign-train-jobs",
        min_length=1,
        description="secret with the token of the account that may start TrainJobs, from k8s/several-nodes; with more"
        " than one node sft and dpo alone get it",
    )
    retries: int = Field(default=2, ge=0, description="times that a failed step is retried")
    backoff_s: int = Field(default=60, ge=0, description="seconds before the first retry; doubled for each further one")
    timeout_s: int = Field(default=86400, ge=1, description="seconds after which a step's pod is terminated")
    ttl_s: int = Field(
        default=604800, ge=0, description="seconds for which a finished workflow's pods are kept; 0 keeps them"
    )
    labels: dict[str, str] = Field(
        default={}, description="additional labels of every pod; none by which Kubernetes, Kubeflow or k8s/ select pods"
    )
    namespace: str = Field(
        default="", description="Kubeflow profile that runs belong to; empty without multi-user Kubeflow"
    )
    experiment: str = Field(
        default="kubealign", min_length=1, description="experiment of the runs in Kubeflow Pipelines"
    )
    service_account: str = Field(
        default="pipeline-runner", description="service account of the pods; empty for Kubeflow's default"
    )

    @field_validator("mlflow_uri", "s3_endpoint")
    @classmethod
    def _plain(cls, url: str) -> str:
        if url:
            parse_url(url, ("https", "http"), anywhere=True)
        return url

    @field_validator("labels")
    @classmethod
    def _of_no_selector(cls, labels: dict[str, str]) -> dict[str, str]:
        for label in labels:
            domain = label.rpartition("/")[0]
            if any(domain == reserved or domain.endswith(f".{reserved}") for reserved in RESERVED_LABELS):
                raise ValueError(
                    f"{label}: network policies, services and Kubeflow go by labels of {domain}; take a name without it"
                )
        return labels

    @field_validator("data_image", "train_image")
    @classmethod
    def _pinned(cls, image: str) -> str:
        if image.endswith(":latest"):
            raise ValueError("`latest` is not a fixed version; use a version tag or a digest")
        return image
