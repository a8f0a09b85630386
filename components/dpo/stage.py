"""Direct Preference Optimization of the SFT model on preference pairs, against the frozen SFT model."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from components.common.errors import TrainingError
from components.common.files import CACHE_DIR, verify_manifest, write_json, write_manifest, write_text
from components.common.provenance import environment, versions
from components.config.model import ExecutionConfig
from components.dataset.chat import encode, end_of_answer, load_tokenizer
from components.dataset.records import Message, Preference, read_rows
from components.dpo.config import DpoConfig
from components.engine import objectives
from components.engine.export import (
    EXPORT_ADAPTER,
    Fingerprint,
    check_export,
    concatenate_adapters,
    finish_folder,
    load_plain,
    merge,
    save_adapter,
    save_model,
)
from components.engine.hardware import Precision
from components.engine.history import StepRecord, write_history
from components.engine.loop import Objective, TrainingSet, completion_logps, evaluate, sequence_logps
from components.engine.models import DPO_ADAPTER, SFT_ADAPTER, PackedModel, activate, disable_dropout
from components.engine.objectives import LOSSES, LossOptions
from components.engine.packing import Example, Pack
from components.tracking.result import StageResult
from components.tracking.run import StageRun, is_main_process, stage_run
from components.training.documents import DpoTraining
from components.training.run import (
    add_adapter,
    best_validation_metrics,
    checkpoint_folder,
    open_tuned,
    pair_examples,
    resolve_precision,
    run_training,
    stage_output,
)
from components.training.scoring import Scores, score, weights_digest

MODEL_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")
"""Libraries whose versions the model is known to load with; the registry names them."""
REFERENCE_PAIRS = 4
EXPORTED_PAIRS = 4
"""Held-out pairs, the shortest, on which the exported model is held against the policy."""
KNOWN_TEXT = (
    [Message(role="user", content="Why is the sky blue? 天空为什么是蓝色的？")],
    "Air scatters blue light more than red. 空气散射的蓝光比红光多。",
)
"""A conversation whose log-probs identify a registered model; it tells nothing of anybody's data."""
REFERENCE_TOLERANCE_NATS = 0.05
"""How far the untrained policy's log-ratio margins may be from 0 before its reference is the wrong one."""


def run_dpo(
    config: DpoConfig, model: ExecutionConfig, dataset: Path, base_model: Path, sft_model: Path, out: Path
) -> StageResult:
    """Align the SFT model to the preferences.

    Args:
        config: how to train.
        model: how the model is run and tuned.
        dataset: folder with preferences/, from validate.
        base_model: model folder, from fetch.
        sft_model: folder that sft wrote.
        out: gets the shipped adapter (`adapter/`: SFT and DPO as one; not after full fine-tuning), the whole model
            (`model/`, fp32, with tokenizer and template), some of its logits (fingerprint.json), the installed packages
            (environment.txt), the steps (`history.jsonl`), training.json and a manifest.

    Without an epoch the SFT model itself is the policy, written and checked in the same way.

    Returns:
        the MLflow run, and loss, margin, accuracy and rewards on the validation pairs; none without an epoch.

    Raises:
        TrainingError: the policy does not equal its reference before the first step, or a loss is not finite.
    """
    model = resolve_precision(model)
    with stage_run("dpo", config.model_dump() | model.execution_settings()) as run:
        base_digest, data_digest, sft_digest = map(verify_manifest, (base_model, dataset, sft_model))
        tokenizer = load_tokenizer(base_model)
        rows = {
            split: read_rows(dataset / "preferences" / f"{split}.jsonl", Preference)
            for split in ("train", "validation")
        }
        examples = {split: pair_examples(tokenizer, found) for split, found in rows.items()}
        policy = open_tuned(run, base_model, sft_model, model, SFT_ADAPTER, trains=True)
        disable_dropout(policy)
        sets = {
            split: TrainingSet(examples[split], [row.id for row in rows[split]], [1.0] * len(rows[split]))
            for split in rows
        }
        records: list[StepRecord] = []
        metrics: dict[str, float] = {}
        if config.epochs:
            with checkpoint_folder("dpo", config, model, base_digest, data_digest, sft_digest) as checkpoints:
                records, metrics = _align(
                    run, config, model, policy, sets, base_model, base_digest, sft_model, checkpoints
                )
        with stage_output(out) as folder:
            _write_policy(run, folder, policy, model, base_model, base_digest, tokenizer, examples["validation"])
            write_history(folder / "history.jsonl", records)
            ranks = cast(Any, policy.lm).peft_config if model.finetuning == "lora" else {}
            training: DpoTraining = {
                "metrics": metrics,
                "beta": config.beta if config.epochs else None,
                "loss": config.loss_type if config.epochs else "",
                "precision": model.precision,
                "quantization": model.quantization,
                "base_digest": base_digest,
                "sft_digest": sft_digest,
                "reference_rank": ranks[SFT_ADAPTER].r if DPO_ADAPTER in ranks else 0,
                "libraries": versions(MODEL_LIBRARIES),
            }
            write_json(folder / "training.json", training)
            write_manifest(folder)
        run.log_metrics([(len(records), metrics)])
        if config.epochs:
            run.log(
                f"validation: loss {metrics['validation_loss']:.4f},"
                f" accuracy {metrics['validation_rewards/accuracies']:.3f},"
                f" margin {metrics['validation_rewards/margins']:.3f}"
            )
        else:
            run.log("dpo.epochs is 0: the SFT model itself is the policy")
        return StageResult(run.run_id, metrics)


def _align(
    run: StageRun,
    config: DpoConfig,
    model: ExecutionConfig,
    policy: PackedModel,
    sets: dict[str, TrainingSet],
    base_model: Path,
    base_digest: str,
    sft_model: Path,
    checkpoints: Path,
) -> tuple[list[StepRecord], dict[str, float]]:
    """Train the policy, which is the SFT model as loaded.

    Returns:
        the steps, and the metrics on the validation pairs.
    """
    lora = model.finetuning == "lora"
    references: dict[str, Reference] = {}
    if LOSSES[config.loss_type].reference_free:
        references = dict.fromkeys(sets, no_reference)
    elif config.precompute_ref_log_probs:
        content = weights_digest(base_digest, sft_model)
        logps = {
            split: score(
                run,
                lambda: policy,
                model,
                content,
                data.examples,
                f"reference_{split}",
                as_trained=True,
                read_from=sft_model / CACHE_DIR,
            ).sums()
            for split, data in sets.items()
        }
        check_reference(policy, sets["train"].examples, logps["train"])
        references = {split: cached_reference(values) for split, values in logps.items()}
    if lora:
        add_adapter(run, policy, DPO_ADAPTER, config)
    if not references:
        frozen = None if lora else open_tuned(run, base_model, sft_model, model, SFT_ADAPTER)
        references = dict.fromkeys(sets, live_reference(policy, frozen))
    objective = {split: make_objective(reference, config) for split, reference in references.items()}
    validate = partial(evaluate, policy, sets["validation"], objective["validation"], config.max_tokens_per_microbatch)
    # A live reference switches the policy's adapters.
    stateless = config.precompute_ref_log_probs
    records = run_training(
        run, policy, sets["train"], objective["train"], config, checkpoints, _show, validate, stateless
    )
    loss, validation = best_validation_metrics(records, validate)
    return records, {"validation_loss": loss} | {f"validation_{name}": value for name, value in validation.items()}


Reference = Callable[[Pack, list[int]], Tensor]
"""(pack, example indices of the pack) -> log-probs of its completions under the reference, float [S], nats."""


def cached_reference(reference_logps: Scores) -> Reference:
    """The reference from log-probs [pairs, 2], chosen and rejected, in the order of the data set, nats."""
    reference_P2 = torch.from_numpy(reference_logps)
    return lambda batch, indices: reference_P2[indices].flatten()


def no_reference(batch: Pack, indices: list[int]) -> Tensor:
    """For the losses without a reference."""
    return torch.zeros(batch.n_sequences)


def live_reference(policy: PackedModel, frozen: PackedModel | None) -> Reference:
    """The reference by a forward pass each time: of `frozen`, or of the policy without its DPO adapter."""

    @torch.no_grad()
    def reference(batch: Pack, indices: list[int]) -> Tensor:
        if frozen is not None:
            frozen.eval()
            token_logps_N = frozen(batch)
        else:
            was_training = policy.training
            policy.eval()
            activate(policy.lm, [SFT_ADAPTER], trainable=None)
            token_logps_N = policy(batch)
            activate(policy.lm, [SFT_ADAPTER, DPO_ADAPTER], trainable=DPO_ADAPTER)
            policy.train(was_training)
        return objectives.sequence_logps(token_logps_N, batch.sequence_N, batch.n_sequences)

    return reference


def make_objective(reference: Reference, config: DpoConfig) -> Objective:
    """The configured preference loss against a reference, with the rewards that it compares.

    Its `kl` is the mean over the answers of half the squared log-ratio, nats: an estimate of KL(policy || reference)
    that is never negative and good while the two are close (k2 of http://joschu.net/blog/kl-approx.html); the answers
    are the data's, not the policy's own.
    """
    options = LossOptions(**config.model_dump(include=set(LossOptions._fields)))
    reference_free = LOSSES[config.loss_type].reference_free

    def objective(
        token_logps_N: Tensor, batch: Pack, indices: list[int], normaliser: float
    ) -> tuple[Tensor, dict[str, float]]:
        policy_S = objectives.sequence_logps(token_logps_N, batch.sequence_N, batch.n_sequences)
        n_tokens_S = torch.bincount(batch.sequence_N, minlength=batch.n_sequences).to(policy_S)
        reference_S = reference(batch, indices).to(policy_S)
        losses_P, rewards_S = objectives.preference_loss(config.loss_type, policy_S, reference_S, n_tokens_S, options)
        loss = losses_P.sum() / normaliser
        with torch.no_grad():
            chosen_P, rejected_P = rewards_S.view(-1, 2).unbind(1)
            margins_P = chosen_P - rejected_P
            wins_P = (margins_P > 0).float() + 0.5 * (margins_P == 0).float()
            sums = {
                "rewards/margins": margins_P,
                "rewards/accuracies": wins_P,
                "rewards/chosen": chosen_P,
                "rewards/rejected": rejected_P,
            }
            if not reference_free:
                sums["kl"] = 0.25 * ((policy_S - reference_S) ** 2).view(-1, 2).sum(1)
            return loss, {name: float(values.sum()) / normaliser for name, values in sums.items()}

    return objective


def check_reference(policy: PackedModel, examples: Sequence[Any], reference_logps: Scores) -> None:
    """Before the first step policy and reference are one model: every margin is 0 and the loss ln 2, or the run stops.

    The policy is in training mode, in which it will be trained.

    Raises:
        TrainingError: the reference log-probs are those of another model, data set or layout.
    """
    some = list(examples[:REFERENCE_PAIRS])
    ratios = np.asarray(sequence_logps(policy, some, training=True)) - reference_logps[: len(some)]
    worst = float(np.abs(ratios).max())
    if not worst <= REFERENCE_TOLERANCE_NATS:
        raise TrainingError(
            f"before the first step the policy's log-probs differ from the reference's by {worst:.3g} nats; expected 0,"
            " a loss of ln 2: the reference is not the SFT model that is being trained. Remove the reference cache"
            " (`kubealign clean cache`) and run again"
        )


def _write_policy(
    run: StageRun,
    folder: Path,
    policy: PackedModel,
    model: ExecutionConfig,
    base_model: Path,
    base_digest: str,
    tokenizer: Any,
    held_out: Sequence[Example],
) -> None:
    """Write what is registered, and hold it against the policy in memory."""
    pairs = sorted(held_out, key=lambda pair: pair.n_tokens)[:EXPORTED_PAIRS]
    prompt, completion = encode(tokenizer, *KNOWN_TEXT)
    *logps, (known,) = completion_logps(policy, [*pairs, Example(prompt, [completion])])
    if model.finetuning == "full":
        save_model(policy, folder / "model")
    elif is_main_process():
        concatenate_adapters(cast(Any, policy.lm))
        save_adapter(cast(Any, policy.lm), EXPORT_ADAPTER, folder / "adapter", f"sha256:{base_digest}")
        merge(base_model, folder / "adapter", folder / "model", cast(Precision, model.precision), model.quantization)
    if is_main_process():
        finish_folder(folder / "model", base_model, end_of_answer(tokenizer), tokenizer.pad_token_id)
        rounds: Precision = "bf16" if policy.precision == "bf16" or model.quantization != "none" else "fp32"
        error = check_export(lambda: load_plain(folder / "model"), pairs, logps, rounds, "the exported model")
        run.log(f"the exported model, loaded anew, has the policy's log-probs: {error:.1e} nats a token apart")
        found: Fingerprint = {
            "prompt": prompt,
            "completion": completion,
            "logps": known.tolist(),
            "precision": rounds,
        }
        write_json(folder / "fingerprint.json", found)
        write_text(folder / "environment.txt", environment())


def _show(record: StepRecord) -> dict[str, float]:
    return {"margin": record.metrics["rewards/margins"], "accuracy": record.metrics["rewards/accuracies"]}
