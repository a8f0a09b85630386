"""Evaluate the policy on held-out pairs against SFT and the incumbent champion, apply the gate, and write the report.

Every model is scored here, on the same pairs, by the same code, in the same precision; no stored metric is compared.
Log-probs and answers are cached by content, so the base and an unchanged incumbent are not run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from components.common.documents import read_document
from components.common.files import MANIFEST, digest, sha256_file, verify_manifest, write_json, write_text
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
from components.evaluate.comparison import EVAL_SPLITS, Rows, Scored, compare, sampled_kl
from components.evaluate.config import EvaluateConfig
from components.evaluate.diagnosis import diagnose
from components.evaluate.report_page import markdown, report
from components.gate.results import SEAL, AnsweredPrompt, Evaluation, Generation, Judged
from components.gate.rules import GateContext, apply_gate
from components.gate.statistics import Floats, GroupBootstrap
from components.gate.verdict import Verdict
from components.tracking.keys import seal
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
    code: str,
    out: Path,
    html_out: Path,
    markdown_out: Path,
) -> StageResult:
    """Evaluate on the test pairs.

    Args:
        config: settings of the bootstrap and the answers.
        gate: the gate's rules.
        model: execution settings of the models.
        inputs: models and data, and the other inputs of the gate.
        facts: lineage to show in the report.
        code: digest of the code of this step.
        out: folder that gets evaluation.json with its seal, and verdict.json.
        html_out: gets the report page.
        markdown_out: gets the report's summary.

    Returns:
        the MLflow run, and the policy's main metrics.

    Raises:
        InputError: the incumbent cannot be loaded, or a document of an earlier step is damaged.
    """
    model = resolve_precision(model)
    params = config.model_dump() | {f"gate_{key}": value for key, value in gate.model_dump().items()}
    params |= {"incumbent": inputs.incumbent or "none", "precision": model.precision, "hardware": model.hardware}
    with stage_run("evaluate", params) as run:
        rows = {
            split: read_rows(inputs.dataset / "preferences" / f"{split}.jsonl", Preference) for split in EVAL_SPLITS
        }
        prompt_rows = fixed_prompts(rows["test"], config.generations_per_language)
        candidates, incumbent_statement = find_candidates(run, model, inputs)
        outputs = _run_models(run, config, model, candidates, rows, prompt_rows)
        history = read_history(inputs.policy / "history.jsonl", may_be_empty="sft" not in outputs)
        judged = _judged(inputs, incumbent_statement, code)
        evaluation = _evaluation(config, gate, rows, outputs, prompt_rows, history, inputs, facts, judged)
        context = GateContext(inputs.incumbent, inputs.decision_index, inputs.data_clean)
        verdict = apply_gate(evaluation, context, gate)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", evaluation)
        write_text(out / SEAL, seal(SEAL, (out / "evaluation.json").read_bytes()))
        write_json(out / "verdict.json", verdict)
        run.log_metrics([(0, _logged_metrics(evaluation))])
        for path in (out / "evaluation.json", out / "verdict.json"):
            run.log_artifact(path)
        for finding in evaluation["findings"]:
            run.log(f"{finding['severity']}: {finding['evidence']}")
        run.log(verdict["sentence"])
        sft_history = read_history(inputs.sft_model / "history.jsonl", may_be_empty=True)
        histories = {stage: steps for stage, steps in (("sft", sft_history), ("dpo", history)) if steps}
        validation = read_document(inputs.dataset / "validation.json", ValidationSummary)
        write_text(html_out, report(evaluation, verdict, histories, validation))
        write_text(markdown_out, markdown(evaluation, verdict))
        return StageResult(run.run_id, _main_metrics(evaluation, verdict))


@dataclass(frozen=True)
class _ModelOutputs:
    """Outputs of one model; `kl` is that of each of its samples, None without a reference."""

    scored: Scored
    answers: Answers | None
    kl: Floats | None


def _run_models(
    run: StageRun,
    config: EvaluateConfig,
    model: ExecutionConfig,
    candidates: Sequence[Candidate],
    rows: Rows,
    prompt_rows: Sequence[Preference],
) -> dict[str, _ModelOutputs]:
    """Log-probs of the pairs, answers, and log-probs of the samples, with one model in memory at a time."""
    by_split: dict[str, dict[str, TokenLogps]] = {}
    answers: dict[str, Answers] = {}
    samples: dict[tuple[str, str], TokenLogps] = {}
    for candidate in candidates:
        name, opened = candidate.name, cache(candidate.open)
        scores = _scorer(run, model, candidate, opened)
        by_split[name] = {
            split: scores(pair_examples(candidate.tokenizer, rows[split]), f"{name}_{split}") for split in EVAL_SPLITS
        }
        if prompt_rows and name in MODELS:
            cache_key_parts = [candidate.content, model.precision, model.hardware, model.lm_head_precision]
            cache_key_parts.append(model.quantization)
            settings = (config.max_new_tokens, config.seed, name)
            answers[name] = answer(run, opened, cache_key_parts, candidate.tokenizer, prompt_rows, *settings)
        for sampler in candidates:
            if sampler.name in answers and sampler.reference and name in (sampler.name, sampler.reference):
                examples = _sampled(sampler, prompt_rows, answers[sampler.name])
                samples[sampler.name, name] = scores(examples, f"{sampler.name}_samples")
    outputs = {}
    for candidate in sorted((c for c in candidates if c.name in MODELS), key=lambda c: MODELS.index(c.name)):
        name, reference = candidate.name, candidate.reference
        reference_logps = by_split[reference]["test"] if reference else None
        kl = sampled_kl(samples[name, name], samples[name, reference]) if (name, name) in samples else None
        scored = Scored(by_split[name], reference_logps, candidate.beta, candidate.loss)
        outputs[name] = _ModelOutputs(scored, answers.get(name), kl)
    return outputs


def _scorer(
    run: StageRun, model: ExecutionConfig, candidate: Candidate, opened: Callable[[], PackedModel]
) -> Callable[[list[Example], str], TokenLogps]:
    return lambda examples, what: score(run, opened, model, candidate.content, examples, what)


def _sampled(candidate: Candidate, prompt_rows: Sequence[Preference], answers: Answers) -> list[Example]:
    """A model's own sampled answers as examples."""
    prompts = [encode_prompt(candidate.tokenizer, row.prompt) for row in prompt_rows]
    return [Example(prompt, [sample.tokens]) for prompt, sample in zip(prompts, answers.sampled, strict=True)]


def _evaluation(
    config: EvaluateConfig,
    gate: GateConfig,
    rows: Rows,
    outputs: dict[str, _ModelOutputs],
    prompt_rows: Sequence[Preference],
    history: Sequence[StepRecord],
    inputs: Inputs,
    facts: dict[str, str],
    judged: Judged,
) -> Evaluation:
    scored = {name: output.scored for name, output in outputs.items()}
    results = compare(config, gate.threshold(), gate.max_language_regression, rows, scored)
    for name, generated in _generation(config, outputs, prompt_rows).items():
        results["models"][name]["generation"] = generated
    return {
        **results,
        "findings": diagnose(history, results),
        "answers": _answers(outputs, prompt_rows),
        "policy_digest": digest(read_document(inputs.policy / MANIFEST, dict[str, str])),
        "facts": facts,
        "judged": judged,
    }


def _judged(inputs: Inputs, incumbent_statement: str, code: str) -> Judged:
    """What the verdict is about, from the files that were read."""
    pairs = {split: sha256_file(inputs.dataset / "preferences" / f"{split}.jsonl") for split in EVAL_SPLITS}
    return {
        "test_set": inputs.test_set,
        "test_sha256": pairs["test"],
        "validation_sha256": pairs["validation"],
        "base": verify_manifest(inputs.base_model),
        "incumbent": inputs.incumbent,
        "incumbent_statement": incumbent_statement,
        "decision_index": inputs.decision_index,
        "data_clean": inputs.data_clean,
        "code": code,
    }


def _generation(
    config: EvaluateConfig, outputs: dict[str, _ModelOutputs], prompt_rows: Sequence[Preference]
) -> dict[str, Generation]:
    """Metrics of the answers of every model that answered."""
    answers = {name: output.answers for name, output in outputs.items() if output.answers is not None}
    if not answers:
        return {}
    bootstrap = GroupBootstrap(
        [row.group for row in prompt_rows], config.bootstrap_resamples, config.confidence, config.seed
    )
    langs = [row.lang for row in prompt_rows]
    return {
        name: generation(
            bootstrap, model_answers, langs, None if name == "base" else answers.get("sft"), outputs[name].kl
        )
        for name, model_answers in answers.items()
    }


def _answers(outputs: dict[str, _ModelOutputs], prompt_rows: Sequence[Preference]) -> list[AnsweredPrompt]:
    answers = {name: output.answers for name, output in outputs.items() if output.answers is not None}
    return [
        {
            "lang": row.lang,
            "prompt": row.prompt[-1].content,
            "chosen": row.chosen,
            "greedy": {name: model_answers.greedy[index].text for name, model_answers in answers.items()},
            "sampled": {name: model_answers.sampled[index].text for name, model_answers in answers.items()},
        }
        for index, row in enumerate(prompt_rows)
    ]


def _logged_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The main numbers as MLflow metrics."""
    values: dict[str, float] = {}
    for name, results in evaluation["models"].items():
        values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in results["overall"].items()}
        values[f"{name}/auc"] = results["auc"]["value"]
        model_answers = results["generation"]
        if model_answers:
            values |= {
                f"{name}/greedy_{metric}": estimate["value"] for metric, estimate in model_answers["greedy"].items()
            }
            shown = {"kl": model_answers["kl"], "length_ratio": model_answers["length_ratio"]}
            values |= {f"{name}/{metric}": estimate["value"] for metric, estimate in shown.items() if estimate}
    policy_metrics = evaluation["models"]["policy"]["policy_metrics"] or {}
    values |= {f"policy_metrics/{metric}": estimate["value"] for metric, estimate in policy_metrics.items()}
    for rival, comparison in evaluation["comparisons"].items():
        values[f"improvement_over_{rival}"] = comparison["improvement"]["value"]
        values[f"p_value_over_{rival}"] = comparison["p_value"]
    return values


def _main_metrics(evaluation: Evaluation, verdict: Verdict) -> dict[str, float]:
    """The metrics that Kubeflow shows: the policy's, and whether it passed the gate."""
    policy = evaluation["models"]["policy"]
    values = {name: estimate["value"] for name, estimate in (policy["overall"] | {"auc": policy["auc"]}).items()}
    model_answers = policy["generation"]
    shown = {"kl": model_answers["kl"], "length_ratio": model_answers["length_ratio"]} if model_answers else {}
    values |= {name: estimate["value"] for name, estimate in shown.items() if estimate}
    return values | {"gate_passed": float(verdict["passed"])}
