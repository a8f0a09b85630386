"""What can be configured: one typed section per stage, with the bounds and the meaning of every field.

The values live in params.yaml and nowhere else: no field has a default here. A few knobs that people turn are form
fields of the pipeline (FORM_FIELDS); they are taken out of their section's JSON before a stage gets it, and put back
by `section`.
"""

import re
from collections.abc import Iterable
from itertools import compress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from components.engine.objectives import LOSSES

PARAMS = "params.yaml"
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
QUANTITY = r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti|K|M|G|T)?$"
IMAGE = r"^([^\s@]+(:[\w.-]+|@sha256:[0-9a-f]{64}))?$"


class Section(BaseModel):
    """A section of params.yaml: immutable, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The base model and how text becomes its tokens."""

    base: str = Field(
        min_length=1,
        description="`embedded` (SmolLM2-135M-Instruct, made by `dvc repro`), a local folder, s3://bucket/prefix,"
        " models:/name/version or models:/name@alias, or a hub id (needs allow_network and revision)",
    )
    revision: str = Field(
        pattern=r"^([0-9a-f]{40})?$", description="commit of a hub id, 40 hexadecimal digits; empty otherwise"
    )
    template: str = Field(
        min_length=1, description="`model` (the model's own chat template), `chatml`, `llama2`, or a Jinja file"
    )
    max_length: int = Field(ge=16, description="tokens of prompt and answer; longer examples are dropped, not cut")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="bf16: frozen bf16 base, fp32 LoRA and residual stream, products in bf16 where the GPU, or an x86"
        " CPU, has it in hardware, else in fp32; fp32: everything in fp32; auto: bf16 where in hardware, else fp32"
    )
    head_precision: Literal["same", "fp32"] = Field(
        description="of the products with the output embedding: as `precision` says, or fp32, more exact and slower"
    )
    tuning: Literal["lora", "full"] = Field(
        description="lora: adapters on a frozen base; full: every parameter trains, in fp32, with about 16 bytes each"
    )
    quantization: Literal["none", "nf4"] = Field(
        description="nf4: the frozen base in 4 bits (QLoRA); needs bitsandbytes, and saves memory, not time"
    )
    gradient_checkpointing: bool = Field(
        description="compute activations again in the backward pass: less memory, about a third more time"
    )
    allow_network: bool = Field(description="whether a hub id may be downloaded; nothing else uses the network")

    @field_validator("precision", "head_precision", mode="before")
    @classmethod
    def _no_fp16(cls, precision: Any) -> Any:
        if precision in ("fp16", "float16", "half"):
            raise ValueError(
                "fp16 overflows: activations of LLaMA-2 models pass 65504 and become NaN (seen with Chinese LLaMA-2);"
                " use bf16 or fp32"
            )
        return precision

    def how(self) -> dict[str, Any]:
        """The fields that decide how the model is run and tuned, whatever model, text and length it gets."""
        return self.model_dump(mode="json", exclude={"base", "revision", "template", "max_length", "allow_network"})

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> "ModelConfig":
        if self.tuning == "full" and self.quantization != "none":
            raise ValueError("4-bit weights cannot be trained; set model.tuning=lora or model.quantization=none")
        return self


class DataConfig(Section):
    """Where the data set comes from."""

    repo: str = Field(
        min_length=1,
        description="git repository with the DVC-tracked data: a path, or a URL without user or token in it"
        " (git's credential helpers keep those)",
    )

    @field_validator("repo")
    @classmethod
    def _no_secret(cls, repo: str) -> str:
        if re.match(r"https?://[^/]*@", repo):
            raise ValueError("a user or token in a URL would reach logs; leave it to git's credential helper")
        return repo

    path: str = Field(
        pattern=r"^(\.|[\w-][\w.-]*(/[\w-][\w.-]*)*)$",
        description="folder of the repository that holds preferences/ and instructions/, and base_model/ for"
        " model.base=embedded",
    )
    revision: str = Field(
        min_length=1, description="branch, tag or commit; or `workspace`, the files of a local repository as they are"
    )


class SplitConfig(Section):
    """Shares of the prompt groups; they add up to 1."""

    train: Probability = Field(description="share that trains")
    validation: Probability = Field(description="share that fits scales and watches training")
    test: Probability = Field(description="share that judges; a verdict needs pairs")

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitConfig":
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"the shares add up to {self.train + self.validation + self.test:g}; expected 1")
        return self


class PrepareConfig(Section):
    """How `dvc repro` makes the canonical data."""

    preferences: list[str] = Field(
        description="packaged preference sources of data/sources.lock; what `kubealign data add` brought in is always"
        " used"
    )
    instructions: list[str] = Field(
        description="further instruction sources for SFT; the chosen answers of the pairs are always in."
        " alpaca_en_demo and alpaca_zh_demo forbid commercial use (CC BY-NC 4.0)"
    )
    split: SplitConfig
    near_duplicate: Probability = Field(description="Jaccard similarity of shingles from which prompts are one group")


class ValidateConfig(Section):
    """When data is too bad to train on."""

    max_quarantined: Probability = Field(
        description="share of bad rows in a data set above which the run stops; those just too long do not count"
    )
    min_rows: int = Field(ge=1, description="usable rows that each split needs")
    near_duplicate: Probability = Field(description="Jaccard similarity of shingles from which two prompts are near")
    language_confidence: Probability = Field(
        description="probability from which the language that a text seems to be written in counts against `lang`"
    )
    max_shortcut: float = Field(
        ge=0.5,
        le=1,
        description="accuracy from which a warning says that length alone, or refusals and AI disclaimers alone, tell"
        " the chosen answer; 0.5 is chance",
    )
    max_drift: Probability = Field(
        description="share of the rows that would have to change places to have the distribution of the data version"
        " before, from which a warning says so"
    )
    decontaminate: str = Field(
        pattern=r"^([^/\\\s]+\.jsonl)?$",
        description="file of the preference data, beside train.jsonl, with prompts that must not appear, such as a"
        " benchmark's; `dvc repro` copies data/decontaminate.jsonl there; empty for none",
    )
    severity: dict[str, Literal["error", "stop", "warn"]] = Field(
        description="checks that are taken more or less seriously than the validate step's README says, such as"
        " {email: error}; error: the row is quarantined, stop: the run fails, warn: the report says so"
    )


class OptimiserConfig(Section):
    """How a stage trains; the same fields for sft and dpo."""

    epochs: Positive = Field(description="passes over the training examples; may be a fraction")
    max_steps: int = Field(ge=0, description="stop after this many optimiser steps; 0 for no limit")
    lr: Positive = Field(description="peak learning rate of AdamW")
    batch_size: int = Field(ge=1, description="examples or pairs in an optimiser step")
    max_tokens_per_step: int = Field(ge=16, description="token budget of one forward and backward pass")
    warmup_ratio: Probability = Field(description="share of the steps in which the learning rate rises")
    schedule: Literal["constant", "linear", "cosine"] = Field(description="learning rate after the warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: Positive = Field(description="gradients are clipped to this norm")
    lora_rank: int = Field(ge=1, description="rank of the LoRA update")
    lora_alpha: Positive = Field(description="LoRA's scale times its rank")
    lora_dropout: float = Field(ge=0, lt=1, description="dropout before the LoRA update")
    lora_targets: str | list[str] = Field(description="`all-linear`, or names of the linear layers to adapt")
    seed: int = Field(ge=0, description="of the order of the examples, the LoRA start and dropout")
    checkpoint_every_s: Positive = Field(description="seconds between checkpoints")
    eval_every_steps: int = Field(
        ge=0,
        description="steps between evaluations on the validation split, from which the best is kept; 0 for only"
        " before and after",
    )
    early_stopping_patience: int = Field(
        ge=0, description="evaluations without a better validation loss after which training stops; 0 for never"
    )

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "OptimiserConfig":
        if self.early_stopping_patience and not self.eval_every_steps:
            raise ValueError("early_stopping_patience counts evaluations; set eval_every_steps above 0")
        return self


class SftConfig(OptimiserConfig):
    """Supervised fine-tuning on instructions."""

    loss_on: Literal["last", "every"] = Field(
        description="assistant turns of a conversation that are trained: the last one, or every one"
    )
    reference_logps: bool = Field(
        description="whether sft also computes the reference log-probs that dpo needs, which travel with the SFT model"
    )


def _names(wanted: Iterable[bool]) -> str:
    """The losses at these positions of the table."""
    return ", ".join(compress(LOSSES, wanted))


class DpoConfig(OptimiserConfig):
    """Direct Preference Optimization against the SFT model."""

    beta: Positive = Field(description="strength of the pull towards the reference")
    reference: Literal["cached", "live"] = Field(
        description="reference log-probs computed once and kept, or live in every step (slower, nothing on disk)"
    )
    loss: Literal[tuple(LOSSES)] = Field(  # type: ignore[valid-type]
        description="preference loss;"
        f" per token: {_names(loss.per_token for loss in LOSSES.values())};"
        f" without a reference: {_names(loss.reference_free for loss in LOSSES.values())}"
    )
    label_smoothing: float = Field(
        ge=0,
        lt=0.5,
        description="assumed share of swapped labels; for"
        f" {_names('label_smoothing' in loss.options for loss in LOSSES.values())}",
    )
    simpo_gamma: float = Field(ge=0, description="target margin of simpo")
    orpo_weight: float = Field(ge=0, description="weight of orpo's odds-ratio term (lambda in the paper)")

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> "DpoConfig":
        if self.label_smoothing and "label_smoothing" not in LOSSES[self.loss].options:
            raise ValueError(f"label_smoothing means nothing to the loss {self.loss}; set it to 0, or use robust")
        return self


class EvaluateConfig(Section):
    """How held-out pairs judge the models."""

    bootstrap: int = Field(ge=1000, description="resamples of the prompt groups for every interval and test")
    confidence: float = Field(gt=0.5, lt=1, description="of the intervals, 0.95 for 95 %")
    seed: int = Field(ge=0, description="of the bootstrap and of the sampled answers")
    answers: int = Field(ge=0, description="held-out prompts per language that every model answers; 0 for none")
    max_new_tokens: int = Field(ge=1, description="tokens at which those answers are cut")


class GateConfig(Section):
    """What a model must show before it may become the champion."""

    test: Literal["superiority", "non-inferiority"] = Field(
        description="superiority: better than the incumbent by more than margin; non-inferiority: worse by less than it"
    )
    alpha: float = Field(
        gt=0,
        lt=0.5,
        description="chance of any wrong promotion over all decisions on one test set; the k-th of them gets the level"
        " alpha / (k (k + 1))",
    )
    margin: float = Field(ge=0, description="of the test, nats of preference log-loss")
    min_pairs: int = Field(ge=1, description="held-out pairs below which there is no promotion")
    max_own_loss: Positive = Field(
        description="nats; DPO loss with the policy's own beta and reference must be below it; a policy that learnt"
        " nothing has ln 2 = 0.6931"
    )
    max_kl: Positive = Field(description="nats per answer; KL from the SFT model on the policy's own samples")
    min_length_ratio: float = Field(ge=0, description="tokens of the policy's answers over those of the SFT model")
    max_length_ratio: Positive = Field(description="the same, from above")
    max_repetition_increase: Probability = Field(
        description="by how much more the policy's greedy answers may repeat themselves than the incumbent's"
    )
    max_language_regression: float = Field(
        ge=0, description="nats; a language fails the gate on evidence that its log-loss is worse by more than this"
    )
    language_alpha: float = Field(
        gt=0, lt=0.5, description="level of those tests together; each language gets an equal share"
    )
    clean_data: bool = Field(description="whether the data must be what a commit records (dvc.lock), not edited since")

    def threshold(self) -> float:
        """The improvement, nats, that the primary test must show to be exceeded."""
        return self.margin if self.test == "superiority" else -self.margin

    @model_validator(mode="after")
    def _margin_is_stated(self) -> "GateConfig":
        if self.test == "non-inferiority" and self.margin == 0:
            raise ValueError("non-inferiority needs a margin above 0: how much worse is still good enough")
        return self


class RegisterConfig(Section):
    """The name in the MLflow registry, and what is stored there."""

    name: str = Field(pattern=r"^[^/:@\s]+$", description="registered model")
    promote: bool = Field(description="whether a passed gate makes the model the champion")
    format: Literal["merged", "adapter"] = Field(
        description="merged: whole weights in fp32; adapter: the LoRA adapter, and the base model by reference and hash"
    )


class StepResources(Section):
    """What Kubernetes reserves for a step; requests and limits are the same."""

    cpu: str = Field(pattern=r"^\d+(\.\d+)?m?$", description="cores, such as 2 or 500m")
    memory: str = Field(pattern=QUANTITY, description="such as 4Gi")


class Toleration(Section):
    """A node taint that a step puts up with."""

    key: str = Field(description="of the taint; empty for all")
    operator: Literal["Equal", "Exists"] = Field(description="how `value` is compared")
    value: str = Field(description="of the taint; empty with Exists")
    effect: Literal["", "NoSchedule", "NoExecute", "PreferNoSchedule"] = Field(
        description="of the taint; empty for all"
    )


class TrainResources(StepResources):
    """The same for the steps that need a model: sft, dpo, evaluate."""

    gpus: int = Field(ge=0, description="GPUs of a step")
    gpu_type: str = Field(min_length=1, description="their resource name, such as nvidia.com/gpu")
    shm: str = Field(pattern=rf"{QUANTITY}|^$", description="size of /dev/shm, in memory; empty for the node's default")
    node_selector: dict[str, str] = Field(description="labels that the node must have")
    tolerations: list[Toleration] = Field(description="taints of the node that are accepted")


class ClusterConfig(Section):
    """How `compile --target kubeflow` wants the steps run. Nothing here changes a result, so no stage gets it."""

    data_image: str = Field(
        pattern=IMAGE, description="of resolve, fetch, validate, register, with a tag or @sha256 digest; empty for ours"
    )
    train_image: str = Field(pattern=IMAGE, description="of sft, dpo, evaluate; likewise")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(description="when a node pulls an image")
    pull_secrets: list[str] = Field(description="secrets with registry credentials")
    run_as_user: int = Field(ge=1, description="user id of every step")
    mlflow_uri: str = Field(
        pattern=r"^(https?://[^@\s]+)?$", description="MLflow server; needed for the kubeflow target"
    )
    ui_url: str = Field(
        pattern=r"^(https?://[^@\s]+)?$",
        description="Kubeflow UI, for links from model versions to runs; empty for none",
    )
    mlflow_secret: str = Field(description="secret with keys `username` and `password` for MLflow; empty for none")
    s3_endpoint: str = Field(pattern=r"^(https?://[^@\s]+)?$", description="S3-compatible store; empty for AWS's own")
    s3_secret: str = Field(description="secret with keys `access_key` and `secret_key`; empty for none")
    git_secret: str = Field(description="secret with keys `username` and `password` (a token) for data.repo; or empty")
    state: str = Field(
        pattern=r"^(pvc:[a-z0-9][a-z0-9.-]*|s3://\S+)?$",
        description="what outlives a pod, checkpoints above all: pvc:CLAIM or s3://bucket/prefix; empty: a step that is"
        " started again begins anew",
    )
    data: StepResources
    train: TrainResources
    nodes: int = Field(
        ge=1,
        description="machines that sft and dpo train on; above 1 a step starts a TrainJob of Kubeflow, each node with"
        " the resources of `train`, and `state` has to be a bucket or a claim with ReadWriteMany",
    )
    runtime: str = Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        description="TrainingRuntime of those TrainJobs, from k8s/several-nodes",
    )
    retries: int = Field(ge=0, description="times that a failed step is started again")
    backoff_s: int = Field(ge=0, description="seconds before the first retry; doubled for every further one")
    timeout_s: int = Field(ge=1, description="seconds after which a step's pod is ended")
    ttl_s: int = Field(ge=0, description="seconds that a finished workflow's pods are kept; 0 for ever")
    labels: dict[str, str] = Field(description="further labels of every pod")
    namespace: str = Field(description="Kubeflow profile that runs belong to; empty without multi-user Kubeflow")
    experiment: str = Field(min_length=1, description="experiment of the runs in Kubeflow Pipelines")
    service_account: str = Field(description="of the pods; empty for Kubeflow's own choice")

    @field_validator("data_image", "train_image")
    @classmethod
    def _definite(cls, image: str) -> str:
        if image.endswith(":latest"):
            raise ValueError("`latest` means another image tomorrow; name a version or a digest")
        return image


class Config(Section):
    """All of params.yaml."""

    model: ModelConfig
    data: DataConfig
    prepare: PrepareConfig
    validate_: ValidateConfig = Field(alias="validate")
    sft: SftConfig
    dpo: DpoConfig
    evaluate: EvaluateConfig
    gate: GateConfig
    register_: RegisterConfig = Field(alias="register")
    cluster: ClusterConfig

    def sections(self) -> dict[str, dict[str, Any]]:
        """The configuration as plain values, by the names of params.yaml."""
        return self.model_dump(by_alias=True, mode="json")


FORM_FIELDS: dict[str, tuple[str, str]] = {
    "data_revision": ("data", "revision"),
    "base_model": ("model", "base"),
    "sft_epochs": ("sft", "epochs"),
    "sft_lr": ("sft", "lr"),
    "dpo_epochs": ("dpo", "epochs"),
    "dpo_lr": ("dpo", "lr"),
    "dpo_beta": ("dpo", "beta"),
    "dpo_loss": ("dpo", "loss"),
    "promote": ("register", "promote"),
}
"""Typed fields of the pipeline's run form: name -> (section, key)."""
