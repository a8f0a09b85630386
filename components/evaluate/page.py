"""report.html: what a reader asks, in this order: is it better, how sure, where is it worse, what does it say, what was
it trained on, how do I reproduce it. Everything shown is computed from its arguments.
"""

import html
from typing import Any

import numpy as np

from components.common.report import FIRST, SECOND, THIRD, new_plot, page, plot_html, table_html

Values = dict[str, Any]
NAMES = {"base": "base model", "sft": "SFT", "policy": "policy (DPO)", "incumbent": "incumbent champion"}
METRICS = {
    "preference_log_loss": "preference log-loss, nats",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "margin, nats",
    "chosen_reward": "chosen reward, nats",
    "rejected_reward": "rejected reward, nats",
}


def report(evaluation: Values, verdict: Values, histories: dict[str, list[Values]], counts: Values) -> str:
    """The page.

    Args:
        evaluation: what `stage.compare` gives, with answers and facts.
        verdict: what the gate gives.
        histories: step records of `sft` and `dpo`.
        counts: validation.json.
    """
    parts = [
        _verdict(verdict),
        "<h2>How sure are we</h2>",
        _comparisons(evaluation),
        table_html(["gate rule", "outcome", "found", "asked for"], _rules(verdict)),
        "<h2>Held-out pairs</h2>",
        f'<p class="soft">Rewards are log-probability ratios to the frozen base model, in nats; the log-loss uses one'
        f" scale per model, fitted on {evaluation['pairs']['validation']} validation pairs; ln 2 = 0.6931 is a coin"
        f" toss. Intervals are {evaluation['confidence']:.0%}, from {evaluation['bootstrap']} resamples of prompt"
        " groups.</p>",
        _models(evaluation),
        "<h2>Where is it worse</h2>",
        _languages(evaluation),
        f'<div class="plots">{_margin_plot(evaluation)}{_roc_plot(evaluation)}</div>',
        "<h2>Against its own reference</h2>",
        f'<p class="soft">DPO\'s loss and rewards with beta = {evaluation["beta"]:g} against the SFT model; trained by'
        f" the loss {html.escape(evaluation['loss'])}.</p>",
        table_html(
            ["", "value"], [[name.replace("_", " "), _text(found)] for name, found in evaluation["own"].items()]
        ),
        "<h2>What does it say</h2>",
        _answers(evaluation),
        "<h2>What was it trained on</h2>",
        _data(counts),
        f'<div class="plots">{_curves(histories)}</div>',
        "<h2>How do I reproduce it</h2>",
        "<p>On a checkout of the commit in the model version's tag <code>kubealign.git_commit</code>, whose params.yaml"
        " holds the settings: <code>make data</code>, then <code>kubealign run</code>. The same lineage gives the same"
        " weights on the same machine and libraries.</p>",
        table_html(["fact", "value"], [[key.replace("_", " "), value] for key, value in evaluation["facts"].items()]),
    ]
    return page("Alignment report", "".join(parts))


def markdown(evaluation: Values, verdict: Values) -> str:
    """The summary for the Kubeflow UI."""
    lines = ["# Evaluation", "", f"**{verdict['sentence']}**", "", "| model | " + " | ".join(METRICS.values()) + " |"]
    lines.append("|---|" + "---|" * len(METRICS))
    for name, found in evaluation["models"].items():
        lines.append(f"| {NAMES[name]} | " + " | ".join(_text(found["overall"][metric]) for metric in METRICS) + " |")
    return "\n".join([*lines, ""])


def _text(estimate: Values) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _verdict(verdict: Values) -> str:
    kind = "passed" if verdict["passed"] else "refused"
    title = "Passed the gate" if verdict["passed"] else f"Not promoted: {verdict['verdict']}"
    return f'<div class="verdict {kind}"><b>{title}.</b> {html.escape(verdict["sentence"])}</div>'


def _rules(verdict: Values) -> list[list[Any]]:
    return [[rule["name"], rule["outcome"], rule["sentence"], rule["expected"]] for rule in verdict["rules"]]


def _comparisons(evaluation: Values) -> str:
    rows = [
        [f"policy against {NAMES[rival]}", _signed(found["improvement"]), f"{found['p_value']:.4f}"]
        for rival, found in evaluation["comparisons"].items()
    ]
    return table_html(["comparison", "log-loss improvement, nats", "one-sided p"], rows)


def _signed(estimate: Values) -> str:
    return f"{estimate['value']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]"


def _models(evaluation: Values) -> str:
    rows = [
        [NAMES[name], *(_text(found["overall"][metric]) for metric in METRICS)]
        for name, found in evaluation["models"].items()
    ]
    return table_html(["model", *METRICS.values()], rows)


def _languages(evaluation: Values) -> str:
    rows = []
    for lang in evaluation["models"]["policy"]["languages"]:
        for name in evaluation["models"]:
            found = evaluation["models"][name]["languages"][lang]
            rows.append(
                [lang, NAMES[name], found["reward_accuracy"]["n"], *(_text(found[metric]) for metric in METRICS)]
            )
    return table_html(["language", "model", "pairs", *METRICS.values()], rows)


def _margin_plot(evaluation: Values) -> str:
    figure, axes = new_plot("Margins on held-out pairs", "margin against the base model, nats", "pairs")
    shown = {name: np.asarray(evaluation["margins"][name]) for name in ("sft", "policy")}
    everything = np.concatenate(list(shown.values()))
    edges = np.linspace(np.quantile(everything, 0.01), np.quantile(everything, 0.99) + 1e-9, 31)
    for (name, margins), colour in zip(shown.items(), (SECOND, FIRST), strict=True):
        axes.hist(np.clip(margins, edges[0], edges[-1]), edges, color=colour, alpha=0.55, label=NAMES[name])
    axes.axvline(0.0, color=THIRD, linewidth=1)
    axes.legend()
    return plot_html(figure, "Right of the line the model prefers the chosen answer; the outermost bars hold the rest.")


def _roc_plot(evaluation: Values) -> str:
    figure, axes = new_plot("ROC of the margin", "false positive rate", "true positive rate")
    axes.plot(evaluation["roc"]["fpr"], evaluation["roc"]["tpr"], color=FIRST)
    axes.plot([0, 1], [0, 1], color=SECOND, linewidth=1, linestyle="--")
    return plot_html(figure, f"Area under the curve {evaluation['auc']:.3f}; the dashed line is chance.")


def _curves(histories: dict[str, list[Values]]) -> str:
    plots = []
    for stage, records in histories.items():
        plots.append(_curve(f"{stage.upper()} loss", records, {"loss": FIRST}, "nats"))
    rewards = {"chosen_reward": THIRD, "rejected_reward": SECOND, "reward_margin": FIRST}
    plots.append(_curve("DPO rewards in training", histories["dpo"], rewards, "beta x nats"))
    plots.append(_curve("DPO reward accuracy in training", histories["dpo"], {"reward_accuracy": FIRST}, "share"))
    return "".join(plots)


def _curve(title: str, records: list[Values], series: dict[str, str], unit: str) -> str:
    figure, axes = new_plot(title, "optimiser step", unit)
    steps = [record["step"] for record in records]
    for name, colour in series.items():
        values = [record[name] if name in record else record["metrics"][name] for record in records]
        axes.plot(steps, values, color=colour, marker="o" if len(steps) < 3 else "", label=name.replace("_", " "))
    if len(series) > 1:
        axes.legend()
    return plot_html(figure, f"{len(steps)} steps.")


def _answers(evaluation: Values) -> str:
    parts = []
    names = list(evaluation["models"])
    for entry in evaluation["answers"]:
        cells = "".join(
            f'<div lang="{entry["lang"]}"><b>{html.escape(NAMES[name])}</b>{html.escape(entry[name])}</div>'
            for name in names
        )
        prompt = html.escape(entry["prompt"])
        parts.append(f'<p class="prompt" lang="{entry["lang"]}">{prompt}</p><div class="answers">{cells}</div>')
    return "".join(parts) or "<p>No prompts were asked (evaluate.answers is 0).</p>"


def _data(counts: Values) -> str:
    rows = []
    for name, summary in counts.items():
        for split, languages in summary["splits"].items():
            words = ", ".join(f"{lang} {n}" for lang, n in sorted(languages.items()))
            rows.append([name, split, sum(languages.values()), words])
    lost = "; ".join(
        f"{name}: {summary['quarantined']} of {summary['rows']} rows quarantined, {summary['too_long']} of them"
        " only for their length"
        for name, summary in counts.items()
    )
    return table_html(["data set", "split", "rows", "languages"], rows) + f'<p class="soft">{html.escape(lost)}.</p>'
