"""The model card: README.md with the YAML head that model hubs read, from the same facts as the version's tags."""

from pathlib import Path
from typing import Any

import yaml

METRICS = {
    "preference_log_loss": "preference log-loss, nats",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin, nats",
    "bits_per_byte": "bits per byte of the chosen answers",
}
NAMES = {"base": "base model", "sft": "SFT", "policy": "this model", "incumbent": "champion before"}


def model_card(name: str, facts: dict[str, str], verdict: dict[str, Any], found: dict[str, Any], counts: Any) -> str:
    """The card.

    Args:
        name: the registered model.
        facts: the lineage.
        verdict: verdict.json.
        found: evaluation.json.
        counts: validation.json: rows, languages and licences of the data.
    """
    parts = [
        f"---\n{yaml.safe_dump(_head(name, facts, found, counts), sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        "A causal language model, fine-tuned on instructions (SFT) and aligned to preference pairs by Direct Preference"
        f" Optimization (loss `{found['loss']}`, beta {found['beta']:g}) against the SFT model.\n",
        f"**Verdict.** {verdict['sentence']}\n",
        "## Evaluation\n",
        f"{found['pairs']['test']} held-out pairs, {found['confidence']:.0%} intervals by bootstrap over prompt groups."
        " Rewards are log-probability ratios to the base model.\n",
        _metrics(found),
        "## Data\n",
        _data(counts),
        "## Limits\n",
        _limits(verdict, found, facts),
        "## Lineage\n",
        "\n".join(
            ["| fact | value |", "|---|---|", *(f"| {key} | `{_public(value)}` |" for key, value in facts.items())]
        ),
    ]
    return "\n".join(parts) + "\n"


def licences(counts: Any) -> dict[str, str]:
    """Licence of every source of the data."""
    return {source: found["license"] for data_set in counts.values() for source, found in data_set["sources"].items()}


def _head(name: str, facts: dict[str, str], found: dict[str, Any], counts: Any) -> dict[str, Any]:
    policy = found["models"]["policy"]["overall"]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": "held-out preference pairs", "type": "preference", "revision": facts["data_commit"]},
            "metrics": [
                {"type": metric, "name": title, "value": round(policy[metric]["value"], 4)}
                for metric, title in METRICS.items()
            ],
        }
    ]
    return {
        "license": "other",
        "license_name": "that-of-the-base-model-and-the-data",
        "language": sorted(found["models"]["policy"]["languages"]),
        "base_model": _public(facts["base_reference"]),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference-alignment", "kubealign"],
        "datasets": sorted(licences(counts)),
        "model-index": [{"name": name, "results": results}],
    }


def _public(reference: str) -> str:
    """A local folder by its name only: the path tells of a machine, not of a model."""
    return Path(reference).name if reference.startswith("/") else reference


def _metrics(found: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for model, values in found["models"].items():
        cells = [_text(values["overall"][metric]) for metric in METRICS]
        lines.append(f"| {NAMES[model]} | " + " | ".join(cells) + " |")
    for lang, values in found["models"]["policy"]["languages"].items():
        cells = [_text(values[metric]) for metric in METRICS]
        lines.append(f"| this model, {lang} ({values['reward_accuracy']['n']} pairs) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _data(counts: Any) -> str:
    lines = ["| data set | source | licence | rows |", "|---|---|---|---:|"]
    for data_set, summary in counts.items():
        for source, found in sorted(summary["sources"].items()):
            lines.append(f"| {data_set} | {source} | {found['license']} | {found['rows']} |")
    return "\n".join(lines) + "\n"


def _limits(verdict: dict[str, Any], found: dict[str, Any], facts: dict[str, str]) -> str:
    lines = [
        f"- The verdict is decision {verdict['test_use']} on this test set, tested at the level"
        f" {verdict['level']:.2g}.",
        "- Preferences of these data sets, in these languages; nothing was measured beyond them: no facts, no safety.",
        "- The licence is that of the base model together with those of the data above.",
    ]
    lines += [f"- {rule['name']}: {rule['sentence']}." for rule in verdict["rules"] if rule["outcome"] == "fail"]
    lines += [f"- {finding['evidence']} {finding['advice']}" for finding in found["findings"]]
    if facts["data_clean"] != "true":
        lines.append("- The data is not what a commit records; this model cannot be reproduced from its revision.")
    return "\n".join(lines) + "\n"
