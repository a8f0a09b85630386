"""The evaluation report: a self-contained page, and a Markdown summary for Kubeflow.

The page answers six questions in this order: is it better, how sure are we, where is it worse, what does it say, what
was it trained on, how do I reproduce it. Everything on it is computed from the arguments.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.dataset.validation import ValidationSummary, data_sets
from components.engine.history import StepRecord
from components.gate.results import (
    AnsweredPrompt,
    Comparison,
    Estimate,
    Evaluation,
    Finding,
    Generation,
    Metrics,
    ModelResults,
)
from components.gate.rules import NO_DPO
from components.gate.verdict import Verdict
from components.report.html import FIRST, SECOND, THIRD, Plot, Row, Table, downsample, finish_plot, new_plot, render
from components.report.markdown import bold, table_row
from components.report.markdown import markdown as harmless

NAMES = {"base": "base model", "sft": "SFT", "policy": "policy", "incumbent": "incumbent champion"}
METRICS = {
    "preference_log_loss": "preference log-loss, nats",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "margin, nats",
    "rewards/chosen": "chosen reward, nats",
    "rewards/rejected": "rejected reward, nats",
}
SECONDARY_METRICS = {
    "brier": "Brier score",
    "raw_accuracy": "accuracy by log-prob",
    "raw_accuracy_per_token": "accuracy by log-prob per token",
    "bits_per_byte": "chosen answers, bits per byte",
    "chosen_logp_change": "chosen log-prob minus the reference's, nats",
    "divergence": "distance from its reference, nats per answer",
}
POLICY_METRICS = {
    "loss": "loss, nats",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen reward",
    "rewards/rejected": "rejected reward",
    "brier": "Brier score",
}
GENERATION_METRICS = {
    "tokens": "tokens",
    "repetition": "repetition",
    "language_match": "right language",
    "refusal": "refusals",
    "empty": "empty",
    "unfinished": "truncated at the limit",
}
NO_VALUE = "—"


@dataclass(frozen=True)
class Answer:
    """An answer of a model or of the data."""

    author: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with all its answers."""

    lang: str
    text: str
    answers: list[Answer]


@dataclass(frozen=True)
class GenerationView:
    """Metrics and texts of the generated answers."""

    n_prompts: int
    metrics: Table
    greedy: list[Prompt]
    sampled: list[Prompt]


@dataclass(frozen=True)
class SliceTable:
    """Metrics of all models by one kind of slice."""

    title: str
    table: Table


@dataclass(frozen=True)
class ReportView:
    """The variables of the template alignment.html.jinja."""

    verdict: Verdict
    evidence: list[str]
    findings: list[Finding]
    metrics: Table
    basis: str
    comparisons: Table
    rules: Table
    secondary_metrics: Table
    aligned: bool
    """Whether there was preference training."""
    training: str
    policy_metrics: Table
    plots: list[Plot]
    slices: Table
    slice_metrics: list[SliceTable]
    generation: GenerationView | None
    rows: Table
    quarantined: str
    sources: Table
    curves: list[Plot]
    facts: Table


def report(
    evaluation: Evaluation,
    verdict: Verdict,
    histories: Mapping[str, Sequence[StepRecord]],
    validation: ValidationSummary,
) -> str:
    """Render the page.

    Args:
        evaluation: evaluation.json.
        verdict: verdict.json.
        histories: the steps of `sft` and `dpo`, as far as there were any.
        validation: validation.json.
    """
    models, comparisons = evaluation["models"], evaluation["comparisons"]
    facts = [[name.replace("_", " "), value] for name, value in evaluation["facts"].items()]
    view = ReportView(
        verdict=verdict,
        evidence=[comparison["words"] for comparison in comparisons.values()],
        findings=evaluation["findings"],
        metrics=_metrics({name: model["overall"] for name, model in models.items()}, METRICS),
        basis=_basis(evaluation),
        comparisons=_comparisons(comparisons),
        rules=_rules(verdict),
        secondary_metrics=_metrics({name: model["overall"] for name, model in models.items()}, SECONDARY_METRICS),
        aligned=evaluation["beta"] is not None,
        training=NO_DPO
        if evaluation["beta"] is None
        else f"the policy has beta = {evaluation['beta']:g}, loss {evaluation['loss_type']}, reference SFT",
        policy_metrics=_metrics(
            {name: model["policy_metrics"] for name, model in models.items() if model["policy_metrics"]}, POLICY_METRICS
        ),
        plots=[
            *(_difference_plot(rival, comparison) for rival, comparison in comparisons.items()),
            _reliability_plot(evaluation),
            _roc_plot(evaluation),
            _margin_plot(evaluation),
        ],
        slices=_slices(comparisons),
        slice_metrics=_slice_metrics(models),
        generation=_generation(evaluation),
        rows=_rows(validation),
        quarantined=_quarantined(validation),
        sources=_sources(validation),
        curves=_curves(histories),
        facts=Table(["fact", "value"], facts),
    )
    return render("alignment.html.jinja", view)


def markdown(evaluation: Evaluation, verdict: Verdict) -> str:
    """Render the Markdown summary."""
    table = _metrics({name: model["overall"] for name, model in evaluation["models"].items()}, METRICS)
    lines = ["# Evaluation", "", bold(verdict["sentence"]), ""]
    lines += [table_row(*table.head), "|---" * len(table.head) + "|", *(table_row(*cells) for cells in table.rows)]
    lines += [""]
    lines += [f"- {harmless(found['name'])}: {harmless(found['evidence'])}." for found in evaluation["findings"]]
    lines += [""]
    return "\n".join(lines)


def _text(estimate: Estimate | None) -> str:
    # No-break space: the interval stays on one line.
    return f"{estimate['value']:.3f} [{estimate['low']:.3f},\u00a0{estimate['high']:.3f}]" if estimate else NO_VALUE


def _signed(estimate: Estimate) -> str:
    return f"{estimate['value']:+.4f} [{estimate['low']:+.4f},\u00a0{estimate['high']:+.4f}]"


def _cells(metrics: Metrics, titles: Iterable[str]) -> list[str]:
    return [_text(metrics.get(name)) for name in titles]


def _metrics(models: Mapping[str, Metrics | None], titles: Mapping[str, str]) -> Table:
    """A table of metrics by model."""
    rows = [[NAMES[name], *_cells(metrics or {}, titles)] for name, metrics in models.items()]
    return Table(["model", *titles.values()], rows)


def _basis(evaluation: Evaluation) -> str:
    pairs, groups = evaluation["pairs"], evaluation["groups"]
    return (
        f"{pairs['test']} held-out pairs of {groups['test']} prompt groups. Rewards are log-probability ratios to the"
        " frozen base model, in nats; the log-loss uses half of a model's scale, which is fitted on"
        f" {pairs['validation']} validation pairs; ln 2 = 0.6931 is a coin toss. Intervals are"
        f" {evaluation['confidence']:.0%}, from {evaluation['bootstrap_resamples']} paired resamples of prompt groups"
        f" (seed {evaluation['seed']}), each with its own fit of the scale to resampled validation pairs."
    )


def _comparisons(comparisons: Mapping[str, Comparison]) -> Table:
    head = ["comparison", "log-loss improvement, nats", "one-sided p", "accuracy difference", "only policy right"]
    rows: list[Row] = [
        [
            f"policy against {NAMES[rival]}",
            _signed(comparison["improvement"]),
            f"{comparison['p_value']:.4f}",
            _signed(comparison["accuracy"]),
            comparison["mcnemar"]["policy_only"],
            comparison["mcnemar"]["rival_only"],
            f"{comparison['mcnemar']['p_value']:.4f}",
        ]
        for rival, comparison in comparisons.items()
    ]
    return Table([*head, "only other right", "McNemar p"], rows)


def _rules(verdict: Verdict) -> Table:
    rows = [[rule["name"], rule["outcome"], rule["sentence"], rule["expected"]] for rule in verdict["rules"]]
    return Table(["gate rule", "outcome", "found", "expected"], rows)


def _slices(comparisons: Mapping[str, Comparison]) -> Table:
    """The policy's improvement in every slice, worst first."""
    gains = [
        (kind, part, rival, gain)
        for rival, comparison in comparisons.items()
        for kind, parts in (
            ("language", comparison["by_language"]),
            ("source", comparison["by_source"]),
            ("tokens of the longer answer", comparison["by_length"]),
        )
        for part, gain in parts.items()
    ]
    rows: list[Row] = [
        [kind, part, NAMES[rival], gain["n"], _signed(gain), _evidence(gain)]
        for kind, part, rival, gain in sorted(gains, key=lambda entry: entry[3]["value"])
    ]
    return Table(["by", "slice", "against", "pairs", "log-loss improvement, nats", "evidence"], rows)


def _evidence(gain: Estimate) -> str:
    if gain["low"] > 0:
        return "better"
    return "worse" if gain["high"] < 0 else "unclear"


def _slice_metrics(models: Mapping[str, ModelResults]) -> list[SliceTable]:
    kinds = {
        "language": {name: model["languages"] for name, model in models.items()},
        "source": {name: model["sources"] for name, model in models.items()},
        "tokens of the longer answer": {name: model["lengths"] for name, model in models.items()},
    }
    tables = []
    for title, by_model in kinds.items():
        rows: list[Row] = [
            [part, NAMES[name], parts[part]["rewards/accuracies"]["n"], *_cells(parts[part], METRICS)]
            for part in by_model["policy"]
            for name, parts in by_model.items()
        ]
        tables.append(SliceTable(title, Table([title, "model", "pairs", *METRICS.values()], rows)))
    return tables


def _difference_plot(rival: str, comparison: Comparison) -> Plot:
    figure, axes = new_plot(f"Improvement over {NAMES[rival]}", "lower log-loss, nats", "density")
    values, threshold = np.asarray(comparison["distribution"]), comparison["threshold"]
    axes.hist(values, 40, density=True, color=FIRST, alpha=0.7)
    axes.axvline(threshold, color=SECOND, linewidth=1.5)
    share = float(np.mean(values > threshold))
    return finish_plot(figure, f"{share:.1%} of the resamples lie to the right of the line, the required improvement.")


def _reliability_plot(evaluation: Evaluation) -> Plot:
    figure, axes = new_plot(
        "Calibration of the policy's preferences", "predicted probability", "observed share correct"
    )
    axes.plot([0.5, 1], [0.5, 1], color=THIRD, linewidth=1, linestyle="--")
    policy, beta = evaluation["models"]["policy"], evaluation["beta"]
    for (kind, bins), colour in zip(policy["reliability"].items(), (FIRST, SECOND), strict=False):
        x, y = [bin_["predicted"] for bin_ in bins], np.array([bin_["observed"] for bin_ in bins])
        error = [y - [bin_["low"] for bin_ in bins], [bin_["high"] for bin_ in bins] - y]
        label = "fitted scale" if kind == "fitted" else f"beta {beta:g}, own reference"
        # Rounding can put an end of an interval on the wrong side of its value.
        axes.errorbar(x, y, np.clip(error, 0.0, None), color=colour, marker="o", capsize=2, linewidth=1, label=label)
    axes.legend()
    return finish_plot(
        figure,
        f"Below the dashed line the policy is over-confident. Brier score with the fitted scale"
        f" {_text(policy['overall']['brier'])}; 0.25 is a coin toss.",
    )


def _roc_plot(evaluation: Evaluation) -> Plot:
    figure, axes = new_plot("ROC of the margin", "false positive rate", "true positive rate")
    axes.plot(downsample(evaluation["roc"]["fpr"]), downsample(evaluation["roc"]["tpr"]), color=FIRST)
    axes.plot([0, 1], [0, 1], color=SECOND, linewidth=1, linestyle="--")
    area = _text(evaluation["models"]["policy"]["auc"])
    return finish_plot(figure, f"Area under the curve {area}; the dashed line is chance.")


def _margin_plot(evaluation: Evaluation) -> Plot:
    figure, axes = new_plot("Margins on held-out pairs", "margin against the base model, nats", "pairs")
    pairs = evaluation["held_out"]
    colours = {name: colour for name, colour in (("sft", SECOND), ("policy", FIRST)) if name in evaluation["models"]}
    margins = {name: np.array([pair["margins"][name] for pair in pairs]) for name in colours}
    both = np.concatenate(list(margins.values()))
    edges = np.linspace(np.quantile(both, 0.01), np.quantile(both, 0.99) + 1e-9, 31)
    for name, values in margins.items():
        axes.hist(np.clip(values, edges[0], edges[-1]), edges, color=colours[name], alpha=0.55, label=NAMES[name])
    axes.axvline(0.0, color=THIRD, linewidth=1)
    axes.legend()
    return finish_plot(
        figure,
        "To the right of the line the model prefers the chosen answer; the outermost bars include all values beyond.",
    )


def _generation(evaluation: Evaluation) -> GenerationView | None:
    models = {name: model["generation"] for name, model in evaluation["models"].items() if model["generation"]}
    policy = evaluation["models"]["policy"]["generation"]
    if policy is None:
        return None
    head = ["model", "answers", *GENERATION_METRICS.values(), "length relative to SFT", "KL to its reference, nats"]
    rows = [row for name, generation in models.items() if generation for row in _generation_rows(name, generation)]
    prompts = evaluation["answers"]
    return GenerationView(
        n_prompts=policy["prompts"],
        metrics=Table(head, rows),
        greedy=[_prompt(entry, entry["greedy"], models) for entry in prompts],
        sampled=[_prompt(entry, entry["sampled"], models) for entry in prompts],
    )


def _generation_rows(name: str, generation: Generation) -> list[list[str]]:
    greedy, sampled = (_cells(generation[kind], GENERATION_METRICS) for kind in ("greedy", "sampled"))
    return [
        [NAMES[name], "greedy", *greedy, _text(generation["length_ratio"]), NO_VALUE],
        [NAMES[name], "sampled", *sampled, NO_VALUE, _text(generation["kl"])],
    ]


def _prompt(entry: AnsweredPrompt, texts: Mapping[str, str], models: Iterable[str]) -> Prompt:
    answers = [Answer(NAMES[name], texts[name]) for name in models]
    return Prompt(entry["lang"], entry["prompt"], [*answers, Answer("chosen in the data", entry["chosen"])])


def _curves(histories: Mapping[str, Sequence[StepRecord]]) -> list[Plot]:
    plots = [_curve(f"{stage.upper()} loss", records, {"loss": FIRST}, "nats") for stage, records in histories.items()]
    dpo = histories.get("dpo")
    if not dpo:
        return plots
    rewards = {"rewards/chosen": THIRD, "rewards/rejected": SECOND, "rewards/margins": FIRST}
    plots.append(_curve("DPO rewards in training", dpo, rewards, "beta x nats"))
    plots.append(_curve("DPO reward accuracy in training", dpo, {"rewards/accuracies": FIRST}, "share"))
    if "kl" in dpo[0].metrics:
        plots.append(_curve("Distance from the reference in training", dpo, {"kl": FIRST}, "nats per answer"))
    return plots


def _curve(title: str, records: Sequence[StepRecord], series: Mapping[str, str], unit: str) -> Plot:
    """Metrics by step; for a single metric also its values on the validation split."""
    figure, axes = new_plot(title, "optimizer step", unit)
    shown = downsample(records)
    steps = [record.step for record in shown]
    for name, colour in series.items():
        values = [record.loss if name == "loss" else record.metrics[name] for record in shown]
        axes.plot(steps, values, color=colour, marker="o" if len(steps) < 3 else "", label=name.replace("_", " "))
    first = next(iter(series))
    validated = [record for record in records if first in record.validation]
    if len(series) == 1 and validated:
        values = [record.validation[first] for record in validated]
        axes.plot([record.step for record in validated], values, color=SECOND, marker="o", label="validation")
    if len(series) > 1 or validated:
        axes.legend()
    return finish_plot(figure, f"{len(records)} steps.")


def _rows(validation: ValidationSummary) -> Table:
    rows: list[Row] = [
        [name, split, sum(languages.values()), ", ".join(f"{lang} {n}" for lang, n in sorted(languages.items()))]
        for name, summary in data_sets(validation).items()
        for split, languages in summary["splits"].items()
    ]
    return Table(["data set", "split", "rows", "languages"], rows)


def _quarantined(validation: ValidationSummary) -> str:
    sentences = [
        f"{name}: {summary['quarantined']} of {summary['rows']} rows quarantined, {summary['too_long']} of them only"
        " because they are too long"
        for name, summary in data_sets(validation).items()
    ]
    return f"{'; '.join(sentences)}."


def _sources(validation: ValidationSummary) -> Table:
    rows: list[Row] = [
        [name, source, counts["license"], counts["rows"]]
        for name, summary in data_sets(validation).items()
        for source, counts in sorted(summary["sources"].items())
    ]
    return Table(["data set", "source", "licence", "rows"], rows)
