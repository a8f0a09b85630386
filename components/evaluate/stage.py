"""Judge the policy on held-out pairs against SFT and the incumbent champion, and write the report.

Every model is scored here, on the same pairs, by the same code, in the same precision; no stored number is compared.
Log-probs and answers are kept by content, so the base and an unchanged incumbent are not run again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from components.common.files import digest, read_json, write_json, write_text
from components.config.gate import GateConfig
from components.config.model import ExecutionConfig
from components.dataset.chat import encode_prompt
from components.dataset.records import Preference, read_rows
from components.engine.models import PackedModel
from components.engine.packing import Example
from components.evaluate.answers import Answers, answer, fixed_prompts, generation
from components.evaluate.candidates import Candidate, Inputs, find_candidates
from components.evaluate.comparison import SIDES, Rows, Scored, compare, sampled_kl
from components.evaluate.config import EvaluateConfig
from components.evaluate.diagnosis import diagnose
from components.evaluate.page import markdown, report
from components.evaluate.statistics import GroupBootstrap
from components.gate.results import Results
from components.gate.rules import Circumstances, judge
from components.tracking.run import StageRun, stage_run
from components.training.run import pair_examples, resolve_precision
from components.training.scoring import TokenLogps, score

MODELS = ("base", "sft", "policy", "incumbent")
"""In the order in which they are shown."""


def run_evaluate(
    config: EvaluateConfig,
    gate: GateConfig,
    model: ExecutionConfig,
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
        inputs: models and data, and what the gate asks of the data.
        facts: lineage to show in the report.
        out: folder that gets evaluation.json (see results.Results) and verdict.json.
        html_out: gets the report page.
        markdown_out: gets its summary.

    Returns:
        id of the MLflow run, and the evaluation.

    Raises:
        InputError: the incumbent cannot be loaded.
    """
    model = resolve_precision(model)
    params = config.model_dump() | {f"gate_{key}": value for key, value in gate.model_dump().items()}
    params |= {"incumbent": inputs.incumbent or "sft", "precision": model.precision, "hardware": model.hardware}
    with stage_run("evaluate", params) as run:
        rows = {side: read_rows(inputs.dataset / "preferences" / f"{side}.jsonl", Preference) for side in SIDES}
        asked = fixed_prompts(rows["test"], config.answers)
        measured = _measure(run, config, model, find_candidates(run, model, inputs), rows, asked)
        evaluation = _compare(config, gate, rows, measured)
        _add_answers(evaluation, config, measured, asked)
        policy_digest = digest(read_json(inputs.policy / "manifest.json"))
        histories = {stage: _history(folder) for stage, folder in (("sft", inputs.sft_model), ("dpo", inputs.policy))}
        evaluation |= {"policy_digest": policy_digest, "facts": facts}
        evaluation["findings"] = diagnose(histories["dpo"], evaluation)
        circumstances = Circumstances(inputs.incumbent, inputs.test_use, inputs.data_clean)
        verdict = judge(cast(Results, evaluation), circumstances, gate)
        counts = read_json(inputs.dataset / "validation.json")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
        write_json(out / "verdict.json", verdict)
        write_text(html_out, report(evaluation, verdict, histories, counts))
        write_text(markdown_out, markdown(evaluation, verdict))
        run.log_metrics([(0, _flat(evaluation))])
        for path in (out / "evaluation.json", out / "verdict.json"):
            run.log_artifact(path)
        for finding in evaluation["findings"]:
            run.log(f"{finding['severity']}: {finding['evidence']}")
        run.log(verdict["sentence"])
        return run.run_id, evaluation | {"verdict": verdict}


@dataclass(frozen=True)
class _Measured:
    """What was computed with one model; `kl` of each of its samples, None without a reference."""

    scored: Scored
    answers: Answers | None
    kl: Any


def _measure(
    run: StageRun,
    config: EvaluateConfig,
    model: ExecutionConfig,
    candidates: Sequence[Candidate],
    rows: Rows,
    asked: Sequence[Preference],
) -> dict[str, _Measured]:
    """Log-probs of the pairs, answers, and log-probs of the samples, with one model in memory at a time."""
    sides: dict[str, dict[str, TokenLogps]] = {}
    answers: dict[str, Answers] = {}
    samples: dict[tuple[str, str], TokenLogps] = {}
    for candidate in candidates:
        name, opened = candidate.name, cache(candidate.open)
        scores = _scorer(run, model, candidate, opened)
        sides[name] = {side: scores(pair_examples(candidate.tokenizer, rows[side]), f"{name}_{side}") for side in SIDES}
        if asked and name in MODELS:
            how = [candidate.content, model.precision, model.hardware, model.head_precision, model.quantization]
            settings = (config.max_new_tokens, config.seed, name)
            answers[name] = answer(run, opened, how, candidate.tokenizer, asked, *settings)
        for other in candidates:
            if other.name in answers and other.reference and name in (other.name, other.reference):
                examples = _sampled(other, asked, answers[other.name])
                samples[other.name, name] = scores(examples, f"{other.name}_samples")
    measured = {}
    for candidate in sorted((c for c in candidates if c.name in MODELS), key=lambda c: MODELS.index(c.name)):
        name, reference = candidate.name, candidate.reference
        known = sides[reference]["test"] if reference else None
        kl = sampled_kl(samples[name, name], samples[name, reference]) if (name, name) in samples else None
        scored = Scored(sides[name], known, candidate.beta, candidate.loss)
        measured[name] = _Measured(scored, answers.get(name), kl)
    return measured


def _scorer(
    run: StageRun, model: ExecutionConfig, candidate: Candidate, opened: Callable[[], PackedModel]
) -> Callable[[list[Example], str], TokenLogps]:
    return lambda examples, what: score(run, opened, model, candidate.content, examples, what)


def _sampled(candidate: Candidate, asked: Sequence[Preference], answers: Answers) -> list[Example]:
    """A model's own samples as examples."""
    prompts = [encode_prompt(candidate.tokenizer, row.prompt) for row in asked]
    return [Example(prompt, [found.tokens]) for prompt, found in zip(prompts, answers.sampled, strict=True)]


def _compare(config: EvaluateConfig, gate: GateConfig, rows: Rows, measured: dict[str, _Measured]) -> dict[str, Any]:
    scored = {name: found.scored for name, found in measured.items()}
    return compare(config, gate.threshold(), gate.max_language_regression, rows, scored)


def _add_answers(
    evaluation: dict[str, Any], config: EvaluateConfig, measured: dict[str, _Measured], asked: Sequence[Preference]
) -> None:
    """Put the answers and what they measure into the evaluation."""
    for name in measured:
        evaluation["models"][name]["generation"] = None
    evaluation["answers"] = []
    if not asked:
        return
    bootstrap = GroupBootstrap([row.group for row in asked], config.bootstrap, config.confidence, config.seed)
    langs = [row.lang for row in asked]
    texts: list[dict[str, Any]] = [
        {"lang": row.lang, "prompt": row.prompt[-1].content, "chosen": row.chosen, "greedy": {}, "sampled": {}}
        for row in asked
    ]
    for name, found in measured.items():
        if found.answers is None:
            continue
        compared = measured["sft"].answers if name != "base" else None
        evaluation["models"][name]["generation"] = generation(bootstrap, found.answers, langs, compared, found.kl)
        for entry, greedy, sampled in zip(texts, found.answers.greedy, found.answers.sampled, strict=True):
            entry["greedy"][name], entry["sampled"][name] = greedy.text, sampled.text
    evaluation["answers"] = texts


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def _flat(evaluation: dict[str, Any]) -> dict[str, float]:
    """The main numbers as MLflow metrics."""
    values: dict[str, float] = {}
    for name, found in evaluation["models"].items():
        values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in found["overall"].items()}
        values[f"{name}/auc"] = found["auc"]["value"]
        written = found["generation"]
        if written:
            values |= {f"{name}/greedy_{metric}": value["value"] for metric, value in written["greedy"].items()}
            shown = {"kl": written["kl"], "length_ratio": written["length_ratio"]}
            values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in shown.items() if estimate}
    values |= {f"own/{metric}": estimate["value"] for metric, estimate in evaluation["own"].items()}
    for rival, found in evaluation["comparisons"].items():
        values[f"improvement_over_{rival}"] = found["improvement"]["value"]
        values[f"p_value_over_{rival}"] = found["p_value"]
    return values
