"""Supervised fine-tuning: LoRA on the base model, loss on the answers only."""

from pathlib import Path

from torch import Tensor

from components.common import tracking
from components.common.chat import load_tokenizer
from components.common.config import ModelConfig, SftConfig
from components.common.files import replacing_folder, verify_manifest, write_json, write_manifest
from components.common.records import Instruction, read_rows
from components.common.training_stage import (
    checkpoint_folder,
    instruction_examples,
    run_training,
    write_history,
)
from components.training import objectives
from components.training.loop import StepRecord, TrainingSet, evaluate
from components.training.models import SFT_ADAPTER, PackedModel, add_lora, check_packed, load_causal_lm, save_adapter
from components.training.packing import Pack


def run_sft(
    config: SftConfig, model: ModelConfig, dataset: Path, base_model: Path, out: Path
) -> tuple[str, dict[str, float]]:
    """Fine-tune the base model on the instructions.

    Args:
        config: how to train.
        model: the precision.
        dataset: folder with instructions/, from validate.
        base_model: model folder, from fetch; its hashes are checked before it is loaded.
        out: gets the adapter (`adapter/`), the steps (`history.jsonl`) and a manifest.

    Returns:
        id of the MLflow run, and the metrics: loss on the validation answers before and after (nats per token).
    """
    with tracking.stage_run("sft", config.model_dump() | {"precision": model.precision}) as run:
        base_digest, data_digest = verify_manifest(base_model), verify_manifest(dataset)
        tokenizer = load_tokenizer(base_model)
        sets = {split: _training_set(tokenizer, dataset, split) for split in ("train", "validation")}
        lm = PackedModel(load_causal_lm(base_model, model.precision), model.precision)
        run.say(f"packed and plain log-probs differ by at most {check_packed(lm):.1e} nats on random tokens")
        adapted = add_lora(
            lm.lm,
            SFT_ADAPTER,
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_targets,
            config.seed,
        )
        lm = PackedModel(adapted, model.precision)
        before, _ = evaluate(lm, sets["validation"], objective, config.max_tokens_per_step)
        with checkpoint_folder("sft", config, base_digest, data_digest, model.precision) as checkpoints:
            records = run_training(run, lm, sets["train"], objective, config, checkpoints, _show)
            after, _ = evaluate(lm, sets["validation"], objective, config.max_tokens_per_step)
            metrics = {"validation_loss_before": before, "validation_loss": after}
            with replacing_folder(out) as folder:
                save_adapter(adapted, SFT_ADAPTER, folder / "adapter", f"sha256:{base_digest}")
                write_history(folder / "history.jsonl", records)
                write_json(folder / "training.json", metrics | {"base_digest": base_digest})
                write_manifest(folder)
        run.log_metrics([(len(records), metrics)])
        run.say(f"validation loss {before:.4f} before, {after:.4f} after, nats per token")
        return run.run_id, metrics


def objective(
    token_logps_N: Tensor, batch: Pack, indices: list[int], normaliser: float
) -> tuple[Tensor, dict[str, float]]:
    """The SFT loss of a pack as its share of the step."""
    return objectives.sft_loss(token_logps_N, int(normaliser)), {}


def _training_set(tokenizer: object, dataset: Path, split: str) -> TrainingSet:
    rows = read_rows(dataset / "instructions" / f"{split}.jsonl", Instruction)
    examples = instruction_examples(tokenizer, rows)
    weights = [float(len(example.completions[0])) for example in examples]
    return TrainingSet(examples, [row.id for row in rows], weights)


def _show(record: StepRecord) -> dict[str, str]:
    return {}
