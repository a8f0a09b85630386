"""The model card: README.md with the YAML front matter that model hubs read, from the same facts as the version's
tags.
"""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from components.common.secrets import without_credentials
from components.dataset.validation import ValidationSummary, data_sets
from components.gate.results import Estimate, Evaluation, Metrics
from components.gate.verdict import Verdict
from components.report.markdown import Markdown, code, markdown, table_row
from components.training.documents import DpoTraining

METRICS = {
    "preference_log_loss": "preference log-loss, nats",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin, nats",
    "bits_per_byte": "bits per byte of the chosen answers",
}
NAMES = {"base": "base model", "sft": "SFT", "policy": "this model", "incumbent": "previous champion"}


def model_card(
    name: str,
    facts: dict[str, str],
    verdict: Verdict,
    evaluation: Evaluation,
    validation: ValidationSummary,
    training: DpoTraining,
) -> str:
    """Render the card.

    Args:
        name: name of the registered model.
        facts: the lineage, as tags.
        verdict: verdict.json.
        evaluation: evaluation.json.
        validation: validation.json, for rows, languages and licences of the data.
        training: training.json of dpo.
    """
    parts = [
        _front_matter(name, facts, evaluation, validation),
        f"# {markdown(name)}\n",
        _made(evaluation),
        f"**Verdict.** {markdown(verdict['sentence'])}\n",
        f"It was judged in {_trained(training)}. The files here, computed in fp32, have the log-probs of that model.\n",
        "## Evaluation\n",
        f"{evaluation['pairs']['test']:d} held-out pairs, {evaluation['confidence']:.0%} intervals by bootstrap over"
        " prompt groups. Rewards are log-probability ratios to the base model.\n",
        _metrics(evaluation),
        "## Data\n",
        _data(validation),
        "## Limits\n",
        _limits(verdict, evaluation, facts),
        "## Lineage\n",
        _lineage(facts),
    ]
    return "\n".join(parts) + "\n"


def _made(evaluation: Evaluation) -> Markdown:
    if evaluation["beta"] is None:
        return Markdown("A causal language model, fine-tuned on instructions (SFT), without preference training.\n")
    return Markdown(
        "A causal language model, fine-tuned on instructions (SFT) and aligned to preference pairs by Direct Preference"
        f" Optimization (loss {code(evaluation['loss_type'])}, beta {evaluation['beta']:g}) against the SFT model.\n"
    )


def _trained(training: DpoTraining) -> Markdown:
    if training.get("quantization", "none") != "none":
        return Markdown("4 bits, as it was trained, and its base was taken back from them")
    if training["precision"] == "bf16":
        return Markdown("bf16, as it was trained, and its base rounded to it")
    return markdown(training["precision"])


def _front_matter(name: str, facts: dict[str, str], evaluation: Evaluation, validation: ValidationSummary) -> Markdown:
    """What model hubs read; YAML quotes what needs it."""
    policy = evaluation["models"]["policy"]
    data = ModelCardData(
        license="other",
        license_name="that-of-the-base-model-and-the-data",
        language=sorted(policy["languages"]),
        base_model=_public(facts["base_reference"]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sft" if evaluation["beta"] is None else "dpo", "preference-alignment", "kubealign"],
        datasets=sorted(
            {
                name
                for summary in data_sets(validation).values()
                for name, part in summary["sources"].items()
                if part["rows"]
            }
        ),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="preference",
                dataset_name="held-out preference pairs",
                dataset_revision=facts["data_commit"],
                metric_type=metric,
                metric_name=title,
                metric_value=round(policy["overall"][metric]["value"], 4),
            )
            for metric, title in METRICS.items()
        ],
    )
    return Markdown(f"---\n{without_credentials(data.to_yaml())}\n---\n")


def _lineage(facts: dict[str, str]) -> Markdown:
    lines = ["| fact | value |", "|---|---|"]
    lines += [table_row(key, code(_public(value))) for key, value in facts.items()]
    return Markdown("\n".join(lines))


def _public(reference: str) -> str:
    """A local folder's name only: its path describes a machine, not the model."""
    return Path(reference).name if reference.startswith("/") else reference


def _metrics(evaluation: Evaluation) -> Markdown:
    lines = [table_row("model", *METRICS.values()), "|---|" + "---|" * len(METRICS)]
    lines += [_line(NAMES[model], results["overall"]) for model, results in evaluation["models"].items()]
    for lang, metrics in evaluation["models"]["policy"]["languages"].items():
        lines.append(_line(f"this model, {lang} ({metrics['rewards/accuracies']['n']} pairs)", metrics))
    return Markdown("\n".join(lines) + "\n")


def _line(title: str, metrics: Metrics) -> Markdown:
    return table_row(title, *(_text(metrics[metric]) for metric in METRICS))


def _text(estimate: Estimate) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _data(validation: ValidationSummary) -> Markdown:
    lines = ["| data set | source | licence | rows |", "|---|---|---|---:|"]
    for name, summary in data_sets(validation).items():
        for source, counts in sorted(summary["sources"].items()):
            lines.append(table_row(name, source, counts["license"], counts["rows"]))
    return Markdown("\n".join(lines) + "\n")


def _limits(verdict: Verdict, evaluation: Evaluation, facts: dict[str, str]) -> Markdown:
    lines = [
        f"- The verdict is decision {verdict['decision_index']:d} on this test set, tested at the level"
        f" {verdict['alpha_for_decision']:.2g}.",
        "- Evaluated only on preferences of these data sets and languages; factuality and safety were not measured.",
        "- The licences of the base model and of the data above apply.",
    ]
    lines += [
        f"- {markdown(rule['name'])}: {markdown(rule['sentence'])}."
        for rule in verdict["rules"]
        if rule["outcome"] == "fail"
    ]
    lines += [f"- {markdown(finding['evidence'])} {markdown(finding['advice'])}" for finding in evaluation["findings"]]
    if facts["data_clean"] != "true":
        lines.append("- No commit records the training data; this model cannot be reproduced from its data revision.")
    return Markdown("\n".join(lines) + "\n")
