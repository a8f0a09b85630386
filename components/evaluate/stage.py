"""Judge the policy on held-out pairs against SFT and the incumbent champion, and write the report.

Every model is scored here, on the same pairs, by the same code, in the same precision; no stored number is compared.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common import tracking
from components.common.chat import load_tokenizer
from components.common.config import EvaluateConfig, GateConfig, ModelConfig
from components.common.errors import InputError
from components.common.files import digest, read_json, verify_manifest, write_json, write_text
from components.common.records import LANGUAGES, Preference, read_rows
from components.common.scoring import Scores, score, weights_digest, whole_digest
from components.common.training_stage import open_model, open_tuned, pair_examples
from components.evaluate.answers import answer
from components.evaluate.gate import Evidence, judge
from components.evaluate.page import markdown, report
from components.evaluate.statistics import (
    Floats,
    GroupBootstrap,
    accuracy,
    area_under,
    describe,
    fit_scale,
    log_loss,
    roc,
)
from components.training.models import PackedModel

SIDES = ("validation", "test")
SEQUENCE_LOSSES = ("sigmoid", "robust", "hinge", "apo_zero", "apo_down")
"""Losses whose beta scales log-ratios of whole answers, so that ln 2 is what a policy that learnt nothing has."""
Rows = dict[str, list[Preference]]


@dataclass(frozen=True)
class Inputs:
    """What evaluate reads: folders of earlier steps and the incumbent's URI (empty before the first champion)."""

    dataset: Path
    base_model: Path
    sft_model: Path
    policy: Path
    incumbent: str


def run_evaluate(
    config: EvaluateConfig,
    gate: GateConfig,
    model: ModelConfig,
    inputs: Inputs,
    facts: dict[str, str],
    out: Path,
    html_out: Path,
    markdown_out: Path,
) -> tuple[str, dict[str, Any]]:
    """Evaluate on the test pairs.

    Args:
        config: bootstrap and answers.
        gate: the rules.
        model: the precision.
        inputs: models and data.
        facts: lineage to show in the report.
        out: folder that gets evaluation.json and verdict.json.
        html_out: gets the report page.
        markdown_out: gets its summary.

    Returns:
        id of the MLflow run, and the evaluation.

    Raises:
        InputError: the incumbent cannot be loaded.
    """
    params = config.model_dump() | {f"gate_{key}": value for key, value in gate.model_dump().items()}
    with tracking.stage_run("evaluate", params | {"incumbent": inputs.incumbent or "sft"}) as run:
        rows = {side: read_rows(inputs.dataset / "preferences" / f"{side}.jsonl", Preference) for side in SIDES}
        scores, answers = _score_all(run, config, model, inputs, rows)
        training = read_json(inputs.policy / "training.json")
        evaluation = compare(config, gate.margin, rows, scores, training["beta"])
        policy_digest = digest(read_json(inputs.policy / "manifest.json"))
        evaluation |= {"loss": training["loss"], "policy_digest": policy_digest, "answers": answers, "facts": facts}
        verdict = judge(_evidence(evaluation, inputs.incumbent), gate) | {"policy_digest": policy_digest}
        histories = {stage: _history(folder) for stage, folder in (("sft", inputs.sft_model), ("dpo", inputs.policy))}
        counts = read_json(inputs.dataset / "validation.json")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
        write_json(out / "verdict.json", verdict)
        write_text(html_out, report(evaluation, verdict, histories, counts))
        write_text(markdown_out, markdown(evaluation, verdict))
        run.log_metrics([(0, _flat(evaluation))])
        for path in (out / "evaluation.json", out / "verdict.json"):
            run.log_artifact(path)
        run.say(verdict["sentence"])
        return run.run_id, evaluation | {"verdict": verdict}


def _score_all(
    run: tracking.StageRun, config: EvaluateConfig, model: ModelConfig, inputs: Inputs, rows: Rows
) -> tuple[dict[str, dict[str, Scores]], list[dict[str, str]]]:
    """Log-probs of chosen and rejected under every model, [pairs, 2] for each side; and the answers side by side."""
    asked = [row for lang in LANGUAGES for row in [r for r in rows["test"] if r.lang == lang][: config.answers]]
    answers = [{"lang": row.lang, "prompt": row.prompt[-1].content, "chosen": row.chosen} for row in asked]
    scores: dict[str, dict[str, Scores]] = {}
    for name, packed, tokenizer, content in _models(run, model, inputs):
        examples = {side: pair_examples(tokenizer, rows[side]) for side in SIDES}
        scores[name] = {side: score(run, packed, content, examples[side], f"{name}_{side}") for side in SIDES}
        if asked:
            run.say(f"{name} answers {len(asked)} prompts")
            for entry, text in zip(answers, answer(packed, tokenizer, asked, config.max_new_tokens), strict=True):
                entry[name] = text
    return scores, answers


def _models(run: tracking.StageRun, model: ModelConfig, inputs: Inputs) -> Iterator[tuple[str, PackedModel, Any, str]]:
    """Each model in turn as (name, model, tokenizer, content hash); only one is in memory."""
    base_digest = verify_manifest(inputs.base_model)
    for folder in (inputs.sft_model, inputs.policy):
        verify_manifest(folder)
    tokenizer = load_tokenizer(inputs.base_model)

    yield "base", open_model(run, inputs.base_model, model, trains=False), tokenizer, base_digest
    for name, folder in (("sft", inputs.sft_model), ("policy", inputs.policy)):
        tuned = open_tuned(run, inputs.base_model, folder, model, name)
        yield name, tuned, tokenizer, weights_digest(base_digest, folder)
    if inputs.incumbent:
        folder = _download(inputs.incumbent)
        if _base_of(folder / "adapter") == f"sha256:{base_digest}":
            lm = open_tuned(run, inputs.base_model, folder, model, "incumbent")
            yield "incumbent", lm, tokenizer, weights_digest(base_digest, folder)
        else:
            lm = open_model(run, folder / "model", model, trains=False)
            yield "incumbent", lm, load_tokenizer(folder / "model"), whole_digest(folder / "model")


def _download(uri: str) -> Path:
    import mlflow
    from mlflow.exceptions import MlflowException

    tracking.client()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri)) / "artifacts"
    except (MlflowException, OSError) as error:
        raise InputError(f"incumbent {uri} cannot be downloaded: {tracking.one_line(str(error))}") from error
    if not (folder / "model" / "config.json").is_file():
        raise InputError(f"incumbent {uri} holds no model that this project registered; move the champion alias")
    return folder


def _base_of(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    return str(read_json(file).get("base_model_name_or_path")) if file.exists() else ""


def compare(
    config: EvaluateConfig, margin: float, rows: Rows, scores: dict[str, dict[str, Scores]], beta: float
) -> dict[str, Any]:
    """Every held-out number, from the log-probs alone.

    Args:
        config: bootstrap settings.
        margin: improvement that the test asks for, nats.
        rows: validation and test pairs.
        scores: for `base`, `sft`, `policy` and perhaps `incumbent`, per side, float64 [pairs, 2], nats.
        beta: the policy's own.
    """
    test = rows["test"]
    bootstrap = GroupBootstrap([row.group for row in test], config.bootstrap, config.confidence, config.seed)
    masks = {lang: np.array([row.lang == lang for row in test]) for lang in LANGUAGES}
    masks = {lang: mask for lang, mask in masks.items() if mask.any()}
    models: dict[str, Any] = {}
    losses: dict[str, Floats] = {}
    margins: dict[str, Floats] = {}
    for name in scores:
        rewards = {side: scores[name][side] - scores["base"][side] for side in SIDES}
        gaps = {side: rewards[side][:, 0] - rewards[side][:, 1] for side in SIDES}
        scale = fit_scale(gaps["validation"])
        margins[name], losses[name] = gaps["test"], log_loss(gaps["test"], scale)
        chosen, rejected = rewards["test"][:, 0], rewards["test"][:, 1]
        models[name] = {
            "scale": scale,
            "overall": describe(bootstrap, gaps["test"], chosen, rejected, scale),
            "languages": {
                lang: describe(bootstrap, gaps["test"], chosen, rejected, scale, mask) for lang, mask in masks.items()
            },
        }
    comparisons = {}
    for rival in ("sft", "incumbent"):
        if rival in losses:
            gain = losses[rival] - losses["policy"]
            comparisons[rival] = {
                "improvement": bootstrap.estimate(gain).as_dict(),
                "p_value": bootstrap.superiority_p(gain, margin),
                "by_language": {lang: bootstrap.estimate(gain, mask).as_dict() for lang, mask in masks.items()},
            }
    own_ratio = scores["policy"]["test"] - scores["sft"]["test"]
    own_margin = beta * (own_ratio[:, 0] - own_ratio[:, 1])
    own = {"loss": log_loss(own_margin), "reward_accuracy": accuracy(own_margin), "reward_margin": own_margin}
    own |= {"chosen_reward": beta * own_ratio[:, 0], "rejected_reward": beta * own_ratio[:, 1]}
    curve = roc(margins["policy"])
    return {
        "pairs": {side: len(rows[side]) for side in SIDES},
        "confidence": config.confidence,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "beta": beta,
        "models": models,
        "comparisons": comparisons,
        "own": {name: bootstrap.estimate(values).as_dict() for name, values in own.items()},
        "roc": curve,
        "auc": area_under(curve),
        "margins": {name: values.tolist() for name, values in margins.items()},
        "ids": [row.id for row in test],
        "groups": [row.group for row in test],
    }


def _evidence(evaluation: dict[str, Any], incumbent: str) -> Evidence:
    rival = "incumbent" if incumbent else "sft"
    found = evaluation["comparisons"][rival]
    return Evidence(
        incumbent=f"the champion {incumbent}" if incumbent else "the SFT model",
        improvement=found["improvement"],
        p_value=found["p_value"],
        by_language=found["by_language"],
        own_loss=evaluation["own"]["loss"]["value"] if evaluation["loss"] in SEQUENCE_LOSSES else None,
    )


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def _flat(evaluation: dict[str, Any]) -> dict[str, float]:
    values = {
        f"{name}/{metric}": estimate["value"]
        for name, found in evaluation["models"].items()
        for metric, estimate in found["overall"].items()
    }
    values |= {f"own/{metric}": estimate["value"] for metric, estimate in evaluation["own"].items()}
    for rival, found in evaluation["comparisons"].items():
        values[f"improvement_over_{rival}"] = found["improvement"]["value"]
        values[f"p_value_over_{rival}"] = found["p_value"]
    return values | {"auc": evaluation["auc"]}
