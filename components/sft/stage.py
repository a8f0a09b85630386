"""Supervised fine-tuning: loss on the answers only; LoRA on the base model, or all of it."""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from components.common.files import CACHE_DIR, verify_manifest, write_json, write_manifest
from components.config.model import ExecutionConfig
from components.dataset.chat import end_of_answer, load_tokenizer
from components.dataset.records import Instruction, Preference, read_rows
from components.engine import objectives
from components.engine.export import finish_folder, save_adapter, save_model
from components.engine.history import StepRecord, write_history
from components.engine.loop import TrainingSet, evaluate
from components.engine.models import SFT_ADAPTER, PackedModel
from components.engine.packing import Pack
from components.sft.config import SftConfig
from components.tracking.result import StageResult
from components.tracking.run import StageRun, is_main_process, stage_run
from components.training.documents import SftTraining
from components.training.run import (
    add_adapter,
    best_validation_metrics,
    checkpoint_folder,
    instruction_examples,
    open_model,
    pair_examples,
    resolve_precision,
    run_training,
    stage_output,
)
from components.training.scoring import score, weights_digest


def run_sft(config: SftConfig, model: ExecutionConfig, dataset: Path, base_model: Path, out: Path) -> StageResult:
    """Fine-tune the base model on the instructions.

    Args:
        config: how to train.
        model: how the model is run and tuned.
        dataset: folder with instructions/, from validate.
        base_model: model folder, from fetch; its hashes are checked before it is loaded.
        out: gets the adapter (`adapter/`) or, fully fine-tuned, the model (`model/`), the steps (`history.jsonl`), a
            manifest, and the log-probs of the pairs that dpo needs as its reference (`cache/`).

    Returns:
        the MLflow run and the loss on the validation answers before and after, nats per token.
    """
    model = resolve_precision(model)
    with stage_run("sft", config.model_dump() | model.execution_settings()) as run:
        base_digest, data_digest = verify_manifest(base_model), verify_manifest(dataset)
        tokenizer = load_tokenizer(base_model)
        sets = {
            split: _training_set(tokenizer, dataset, split, config.train_on_turns) for split in ("train", "validation")
        }
        lm = open_model(run, base_model, model, trains=True)
        if model.finetuning == "lora":
            add_adapter(run, lm, SFT_ADAPTER, config)
        validate = partial(evaluate, lm, sets["validation"], objective, config.max_tokens_per_microbatch)
        before, _ = validate()
        with checkpoint_folder("sft", config, model, base_digest, data_digest) as checkpoints:
            records = run_training(run, lm, sets["train"], objective, config, checkpoints, _show, validate)
            after, _ = best_validation_metrics(records, validate)
            metrics = {"validation_loss_before": before, "validation_loss": after}
            with stage_output(out) as folder:
                if model.finetuning == "full":
                    save_model(lm, folder / "model")
                    if is_main_process():
                        finish_folder(folder / "model", base_model, end_of_answer(tokenizer), tokenizer.pad_token_id)
                else:
                    save_adapter(lm.lm, SFT_ADAPTER, folder / "adapter", f"sha256:{base_digest}")
                write_history(folder / "history.jsonl", records)
                training: SftTraining = {"metrics": metrics, "base_digest": base_digest}
                write_json(folder / "training.json", training)
                write_manifest(folder)
                if config.compute_ref_log_probs:
                    _score_pairs(run, lm, model, dataset, tokenizer, base_digest, folder)
        run.log_metrics([(len(records), metrics)])
        run.log(f"validation loss {before:.4f} before, {after:.4f} after, nats per token")
        return StageResult(run.run_id, metrics)


def _score_pairs(
    run: StageRun,
    lm: PackedModel,
    model: ExecutionConfig,
    dataset: Path,
    tokenizer: Any,
    base_digest: str,
    folder: Path,
) -> None:
    """Put the reference log-probs of the pairs beside the model, where dpo finds them on any machine."""
    content = broadcast_object_list([weights_digest(base_digest, folder) if is_main_process() else None])[0]
    for split in ("train", "validation"):
        rows = read_rows(dataset / "preferences" / f"{split}.jsonl", Preference)
        examples = pair_examples(tokenizer, rows)
        score(
            run,
            lambda: lm,
            model,
            str(content),
            examples,
            f"reference_{split}",
            as_trained=True,
            also_write_to=folder / CACHE_DIR,
        )


def objective(
    token_logps_N: Tensor, batch: Pack, indices: list[int], normaliser: float
) -> tuple[Tensor, dict[str, float]]:
    """The SFT loss of a pack as its share of the step."""
    return objectives.sft_loss(token_logps_N, int(normaliser)), {}


def _training_set(tokenizer: object, dataset: Path, split: str, train_on_turns: str) -> TrainingSet:
    rows = read_rows(dataset / "instructions" / f"{split}.jsonl", Instruction)
    examples = instruction_examples(tokenizer, rows, train_on_turns)
    weights = [float(example.n_predicted) for example in examples]
    return TrainingSet(examples, [row.id for row in rows], weights)


def _show(record: StepRecord) -> dict[str, float]:
    return {}
