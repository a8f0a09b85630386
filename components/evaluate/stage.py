"""Evaluate the policy on held-out pairs against SFT and the incumbent champion, apply the gate, and write the report.

Every model is scored here, on the same pairs, by the same code, in the same precision; no stored metric is compared.
Log-probs and answers are cached by content, so the base and an unchanged incumbent are not run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from components.common.documents import read_document
from components.common.files import MANIFEST, digest, write_json, write_text
from components.config.gate import GateConfig
from components.config.model import ExecutionConfig
from components.dataset.chat import encode_prompt
from components.dataset.records import Preference, read_rows
from components.dataset.validation import ValidationSummary
from components.engine.history import StepRecord, read_history
from components.engine.models import PackedModel
from components.engine.packing import Example
from components.evaluate.answers import Answers, answer, fixed_prompts, generation
from components.evaluate.candidates import Candidate, Inputs, find_candidates
from components.evaluate.comparison import SIDES, Rows, Scored, compare, sampled_kl
from components.evaluate.config import EvaluateConfig
from components.evaluate.diagnosis import diagnose
from components.evaluate.report_page import markdown, report
from components.evaluate.statistics import Floats, GroupBootstrap
from components.gate.results import AnsweredPrompt, Evaluation, Generation
from components.gate.rules import GateContext, apply_gate
from components.gate.verdict import Verdict
from components.tracking.result import StageResult
from components.tracking.run import StageRun, stage_run
from components.training.run import pair_examples, resolve_precision
from components.training.scoring import TokenLogps, score

MODELS = ("base", "sft", "policy", "incumbent")
"""In display order."""


def run_evaluate(
    config: EvaluateConfig,
    gate: GateConfig,
    model: ExecutionConfig,
    inputs: Inputs,
    facts: dict[str, str],
    out: Path,
    html_out: Path,
    markdown_out: Path,
) -> StageResult:
    """Evaluate on the test pairs.

    Args:
        config: bootstrap and answers.
        gate: the rules.
        model: the precision.
        inputs: models and data, and the other inputs of the gate.
        facts: lineage to show in the report.
        out: folder that gets evaluation.json and verdict.json.
        html_out: gets the report page.
        markdown_out: gets its summary.

    Returns:
        the MLflow run, and the policy's main metrics.

    Raises:
        InputError: the incumbent cannot be loaded, or a document of an earlier step is damaged.
    """
    model = resolve_precision(model)
    params = config.model_dump() | {f"gate_{key}": value for key, value in gate.model_dump().items()}
    params |= {"incumbent": inputs.incumbent or "sft", "precision": model.precision, "hardware": model.hardware}
    with stage_run("evaluate", params) as run:
        rows = {side: read_rows(inputs.dataset / "preferences" / f"{side}.jsonl", Preference) for side in SIDES}
        asked = fixed_prompts(rows["test"], config.generations_per_language)
        outputs = _run_models(run, config, model, find_candidates(run, model, inputs), rows, asked)
        history = read_history(inputs.policy / "history.jsonl")
        evaluation = _evaluation(config, gate, rows, outputs, asked, history, inputs, facts)
        context = GateContext(inputs.incumbent, inputs.decision_index, inputs.data_clean)
        verdict = apply_gate(evaluation, context, gate)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
        write_json(out / "verdict.json", verdict)
        run.log_metrics([(0, _logged_metrics(evaluation))])
        for path in (out / "evaluation.json", out / "verdict.json"):
            run.log_artifact(path)
        for finding in evaluation["findings"]:
            run.log(f"{finding['severity']}: {finding['evidence']}")
        run.log(verdict["sentence"])
        histories = {"sft": read_history(inputs.sft_model / "history.jsonl"), "dpo": history}
        validation = read_document(inputs.dataset / "validation.json", ValidationSummary)
        write_text(html_out, report(evaluation, verdict, histories, validation))
        write_text(markdown_out, markdown(evaluation, verdict))
        return StageResult(run.run_id, _main_metrics(evaluation, verdict))


@dataclass(frozen=True)
class _ModelOutputs:
    """What was computed with one model; `kl` of each of its samples, None without a reference."""

    scored: Scored
    answers: Answers | None
    kl: Floats | None


def _run_models(
    run: StageRun,
    config: EvaluateConfig,
    model: ExecutionConfig,
    candidates: Sequence[Candidate],
    rows: Rows,
    asked: Sequence[Preference],
) -> dict[str, _ModelOutputs]:
    """Log-probs of the pairs, answers, and log-probs of the samples, with one model in memory at a time."""
    sides: dict[str, dict[str, TokenLogps]] = {}
    answers: dict[str, Answers] = {}
    samples: dict[tuple[str, str], TokenLogps] = {}
    for candidate in candidates:
        name, opened = candidate.name, cache(candidate.open)
        scores = _scorer(run, model, candidate, opened)
        sides[name] = {side: scores(pair_examples(candidate.tokenizer, rows[side]), f"{name}_{side}") for side in SIDES}
        if asked and name in MODELS:
            cache_key_parts = [candidate.content, model.precision, model.hardware, model.lm_head_precision]
            cache_key_parts.append(model.quantization)
            settings = (config.max_new_tokens, config.seed, name)
            answers[name] = answer(run, opened, cache_key_parts, candidate.tokenizer, asked, *settings)
        for other in candidates:
            if other.name in answers and other.reference and name in (other.name, other.reference):
                examples = _sampled(other, asked, answers[other.name])
                samples[other.name, name] = scores(examples, f"{other.name}_samples")
    outputs = {}
    for candidate in sorted((c for c in candidates if c.name in MODELS), key=lambda c: MODELS.index(c.name)):
        name, reference = candidate.name, candidate.reference
        known = sides[reference]["test"] if reference else None
        kl = sampled_kl(samples[name, name], samples[name, reference]) if (name, name) in samples else None
        scored = Scored(sides[name], known, candidate.beta, candidate.loss)
        outputs[name] = _ModelOutputs(scored, answers.get(name), kl)
    return outputs


def _scorer(
    run: StageRun, model: ExecutionConfig, candidate: Candidate, opened: Callable[[], PackedModel]
) -> Callable[[list[Example], str], TokenLogps]:
    return lambda examples, what: score(run, opened, model, candidate.content, examples, what)


def _sampled(candidate: Candidate, asked: Sequence[Preference], answers: Answers) -> list[Example]:
    """A model's own samples as examples."""
    prompts = [encode_prompt(candidate.tokenizer, row.prompt) for row in asked]
    return [Example(prompt, [sample.tokens]) for prompt, sample in zip(prompts, answers.sampled, strict=True)]


def _evaluation(
    config: EvaluateConfig,
    gate: GateConfig,
    rows: Rows,
    outputs: dict[str, _ModelOutputs],
    asked: Sequence[Preference],
    history: Sequence[StepRecord],
    inputs: Inputs,
    facts: dict[str, str],
) -> Evaluation:
    scored = {name: output.scored for name, output in outputs.items()}
    results = compare(config, gate.threshold(), gate.max_language_regression, rows, scored)
    for name, generated in _generation(config, outputs, asked).items():
        results["models"][name]["generation"] = generated
    return {
        **results,
        "findings": diagnose(history, results),
        "answers": _answers(outputs, asked),
        "policy_digest": digest(read_document(inputs.policy / MANIFEST, dict[str, str])),
        "facts": facts,
    }


def _generation(
    config: EvaluateConfig, outputs: dict[str, _ModelOutputs], asked: Sequence[Preference]
) -> dict[str, Generation]:
    """Metrics of the answers of every model that answered."""
    answers = {name: output.answers for name, output in outputs.items() if output.answers is not None}
    if not answers:
        return {}
    bootstrap = GroupBootstrap([row.group for row in asked], config.bootstrap_resamples, config.confidence, config.seed)
    langs = [row.lang for row in asked]
    return {
        name: generation(bootstrap, written, langs, None if name == "base" else answers["sft"], outputs[name].kl)
        for name, written in answers.items()
    }


def _answers(outputs: dict[str, _ModelOutputs], asked: Sequence[Preference]) -> list[AnsweredPrompt]:
    answers = {name: output.answers for name, output in outputs.items() if output.answers is not None}
    return [
        {
            "lang": row.lang,
            "prompt": row.prompt[-1].content,
            "chosen": row.chosen,
            "greedy": {name: written.greedy[index].text for name, written in answers.items()},
            "sampled": {name: written.sampled[index].text for name, written in answers.items()},
        }
        for index, row in enumerate(asked)
    ]


def _logged_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The main numbers as MLflow metrics."""
    values: dict[str, float] = {}
    for name, results in evaluation["models"].items():
        values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in results["overall"].items()}
        values[f"{name}/auc"] = results["auc"]["value"]
        written = results["generation"]
        if written:
            values |= {f"{name}/greedy_{metric}": estimate["value"] for metric, estimate in written["greedy"].items()}
            shown = {"kl": written["kl"], "length_ratio": written["length_ratio"]}
            values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in shown.items() if estimate}
    policy_metrics = evaluation["models"]["policy"]["policy_metrics"] or {}
    values |= {f"policy_metrics/{metric}": estimate["value"] for metric, estimate in policy_metrics.items()}
    for rival, comparison in evaluation["comparisons"].items():
        values[f"improvement_over_{rival}"] = comparison["improvement"]["value"]
        values[f"p_value_over_{rival}"] = comparison["p_value"]
    return values


def _main_metrics(evaluation: Evaluation, verdict: Verdict) -> dict[str, float]:
    """What Kubeflow shows: the policy's metrics, and whether it passed the gate."""
    policy = evaluation["models"]["policy"]
    values = {name: estimate["value"] for name, estimate in (policy["overall"] | {"auc": policy["auc"]}).items()}
    written = policy["generation"]
    shown = {"kl": written["kl"], "length_ratio": written["length_ratio"]} if written else {}
    values |= {name: estimate["value"] for name, estimate in shown.items() if estimate}
    return values | {"gate_passed": float(verdict["passed"])}
