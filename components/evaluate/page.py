"""report.html: what a reader asks, in this order: is it better, how sure are we, where is it worse, what does it say,
what was it trained on, how do I reproduce it. Everything shown is computed from its arguments.
"""

import html
from collections.abc import Iterable
from typing import Any

import numpy as np

from components.evaluate.comparison import SLICES
from components.report.html import FIRST, SECOND, THIRD, new_plot, page, plot_html, table_html, thinned

Values = dict[str, Any]
NAMES = {"base": "base model", "sft": "SFT", "policy": "policy (DPO)", "incumbent": "incumbent champion"}
METRICS = {
    "preference_log_loss": "preference log-loss, nats",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "margin, nats",
    "chosen_reward": "chosen reward, nats",
    "rejected_reward": "rejected reward, nats",
}
FURTHER = {
    "brier": "Brier score",
    "raw_accuracy": "ranked right by log-prob",
    "raw_accuracy_per_token": "by log-prob per token",
    "bits_per_byte": "chosen answers, bits per byte",
    "chosen_logp_change": "chosen log-prob against its reference, nats",
    "divergence": "distance from its reference, nats per answer",
}
OWN = {
    "loss": "loss, nats",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "margin",
    "chosen_reward": "chosen reward",
    "rejected_reward": "rejected reward",
    "brier": "Brier score",
}
WRITTEN = {
    "tokens": "tokens",
    "repetition": "repetition",
    "language_match": "right language",
    "refusal": "refusals",
    "empty": "empty",
    "unfinished": "cut at the limit",
}
KINDS = {"languages": "language", "sources": "source", "lengths": "tokens of the longer answer"}


def report(evaluation: Values, verdict: Values, histories: dict[str, list[Values]], counts: Values) -> str:
    """The page.

    Args:
        evaluation: results.Results.
        verdict: what the gate gives.
        histories: step records of `sft` and `dpo`.
        counts: validation.json.
    """
    parts = [
        "<h2>Is it better</h2>",
        _verdict(verdict),
        *(f"<p>{html.escape(found['words'])}</p>" for found in evaluation["comparisons"].values()),
        _alarm(evaluation["findings"]),
        _models(evaluation, METRICS),
        _basis(evaluation),
        "<h2>How sure are we</h2>",
        _sureness(evaluation, verdict),
        "<h2>Where is it worse</h2>",
        _weaknesses(evaluation),
        "<h2>What does it say</h2>",
        _written(evaluation),
        "<h2>What was it trained on</h2>",
        _data(counts),
        "<h3>Training</h3>",
        _findings(evaluation["findings"]),
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
    lines += ["", *(f"- {finding['name']}: {finding['evidence']}." for finding in evaluation["findings"]), ""]
    return "\n".join(lines)


def _text(estimate: Values | None) -> str:
    # No break inside the interval.
    return f"{estimate['value']:.3f} [{estimate['low']:.3f},\u00a0{estimate['high']:.3f}]" if estimate else "—"


def _signed(estimate: Values) -> str:
    return f"{estimate['value']:+.4f} [{estimate['low']:+.4f},\u00a0{estimate['high']:+.4f}]"


def _verdict(verdict: Values) -> str:
    kind = "passed" if verdict["passed"] else "refused"
    title = "Passed the gate" if verdict["passed"] else f"Not promoted: {verdict['verdict']}"
    return f'<div class="verdict {kind}"><b>{title}.</b> {html.escape(verdict["sentence"])}</div>'


def _alarm(findings: list[Values]) -> str:
    if not findings:
        return ""
    names = ", ".join(finding["name"] for finding in findings)
    return f'<p class="finding">Training shows: {html.escape(names)}. See “What was it trained on”.</p>'


def _models(evaluation: Values, metrics: dict[str, str]) -> str:
    rows = [
        [NAMES[name], *(_text(found["overall"].get(metric)) for metric in metrics)]
        for name, found in evaluation["models"].items()
    ]
    return table_html(["model", *metrics.values()], rows)


def _basis(evaluation: Values) -> str:
    pairs, groups = evaluation["pairs"], evaluation["groups"]
    return (
        f'<p class="soft">{pairs["test"]} held-out pairs of {groups["test"]} prompt groups. Rewards are'
        " log-probability ratios to the frozen base model, in nats; the log-loss uses half a model's scale, fitted"
        f" on {pairs['validation']} validation pairs; ln 2 = 0.6931 is a coin toss. Intervals are"
        f" {evaluation['confidence']:.0%}, from {evaluation['bootstrap']} paired resamples of prompt groups (seed"
        f" {evaluation['seed']}), each with its own fit of the scale to resampled validation pairs.</p>"
    )


def _sureness(evaluation: Values, verdict: Values) -> str:
    rows = [
        [
            f"policy against {NAMES[rival]}",
            _signed(found["improvement"]),
            f"{found['p_value']:.4f}",
            _signed(found["accuracy"]),
            found["mcnemar"]["policy_only"],
            found["mcnemar"]["rival_only"],
            f"{found['mcnemar']['p_value']:.4f}",
        ]
        for rival, found in evaluation["comparisons"].items()
    ]
    head = ["comparison", "log-loss improvement, nats", "one-sided p", "accuracy difference", "only policy right"]
    head += ["only other right", "McNemar p"]
    rules = [[rule["name"], rule["outcome"], rule["sentence"], rule["expected"]] for rule in verdict["rules"]]
    own = {name: found["own"] for name, found in evaluation["models"].items() if found["own"]}
    owned = [[NAMES[name], *(_text(found[metric]) for metric in OWN)] for name, found in own.items()]
    plots = [_difference_plot(rival, found) for rival, found in evaluation["comparisons"].items()]
    plots += [_reliability_plot(evaluation), _roc_plot(evaluation), _margin_plot(evaluation)]
    return (
        table_html(head, rows)
        + "<h3>Rules of the gate</h3>"
        + table_html(["gate rule", "outcome", "found", "asked for"], rules)
        + "<h3>Further numbers</h3>"
        + _models(evaluation, FURTHER)
        + "<h3>Against its own reference, with its own beta</h3>"
        + f'<p class="soft">The policy: beta = {evaluation["beta"]:g}, loss {html.escape(evaluation["loss"])},'
        " reference SFT. An incumbent that is missing here was registered without its reference.</p>"
        + table_html(["model", *OWN.values()], owned)
        + f'<div class="plots">{"".join(plots)}</div>'
    )


def _weaknesses(evaluation: Values) -> str:
    rows = []
    for rival, found in evaluation["comparisons"].items():
        for kind, key in SLICES.items():
            for part, gain in found[key].items():
                rows.append([KINDS[kind], part, NAMES[rival], gain["n"], _signed(gain), _opinion(gain)])
    rows.sort(key=lambda row: float(row[4].split()[0]))
    head = ["by", "part", "against", "pairs", "log-loss improvement, nats", "which says"]
    details = []
    for kind, title in KINDS.items():
        lines = [
            [part, NAMES[name], metrics["reward_accuracy"]["n"], *(_text(metrics.get(metric)) for metric in METRICS)]
            for part in evaluation["models"]["policy"][kind]
            for name, found in evaluation["models"].items()
            for metrics in [found[kind][part]]
        ]
        table = table_html([title, "model", "pairs", *METRICS.values()], lines)
        details.append(
            f"<details{' open' if kind == 'languages' else ''}><summary>By {title}</summary>{table}</details>"
        )
    soft = '<p class="soft">The worst part first. Parts are many and small: one of them looks bad by chance alone.</p>'
    return soft + table_html(head, rows) + "".join(details)


def _opinion(gain: Values) -> str:
    if gain["low"] > 0:
        return "better"
    return "worse" if gain["high"] < 0 else "not known"


def _difference_plot(rival: str, found: Values) -> str:
    figure, axes = new_plot(f"Improvement over {NAMES[rival]}", "lower log-loss, nats", "density")
    values = np.asarray(found["distribution"])
    axes.hist(values, 40, density=True, color=FIRST, alpha=0.7)
    axes.axvline(found["threshold"], color=SECOND, linewidth=1.5)
    share = float(np.mean(values > found["threshold"]))
    return plot_html(figure, f"{share:.1%} of the resamples lie right of the line, the improvement that is asked for.")


def _reliability_plot(evaluation: Values) -> str:
    figure, axes = new_plot("Calibration of the policy's preferences", "predicted probability", "share that is right")
    axes.plot([0.5, 1], [0.5, 1], color=THIRD, linewidth=1, linestyle="--")
    labels = {"fitted": "fitted scale", "own": f"beta {evaluation['beta']:g}, own reference"}
    found = evaluation["models"]["policy"]["reliability"]
    for (kind, bins), colour in zip(found.items(), (FIRST, SECOND), strict=False):
        x, y = [one["predicted"] for one in bins], np.array([one["observed"] for one in bins])
        error = [y - [one["low"] for one in bins], [one["high"] for one in bins] - y]
        # Rounding can put an end of an interval on the wrong side of its value.
        axes.errorbar(
            x, y, np.clip(error, 0.0, None), color=colour, marker="o", capsize=2, linewidth=1, label=labels[kind]
        )
    axes.legend()
    score = evaluation["models"]["policy"]["overall"]["brier"]
    caption = (
        f"Below the dashed line it is too sure. Brier score with the fitted scale {_text(score)}; 0.25 is a coin toss."
    )
    return plot_html(figure, caption)


def _margin_plot(evaluation: Values) -> str:
    figure, axes = new_plot("Margins on held-out pairs", "margin against the base model, nats", "pairs")
    pairs = evaluation["held_out"]
    shown = {name: np.array([pair["margins"][name] for pair in pairs]) for name in ("sft", "policy")}
    everything = np.concatenate(list(shown.values()))
    edges = np.linspace(np.quantile(everything, 0.01), np.quantile(everything, 0.99) + 1e-9, 31)
    for (name, margins), colour in zip(shown.items(), (SECOND, FIRST), strict=True):
        axes.hist(np.clip(margins, edges[0], edges[-1]), edges, color=colour, alpha=0.55, label=NAMES[name])
    axes.axvline(0.0, color=THIRD, linewidth=1)
    axes.legend()
    return plot_html(figure, "Right of the line the model prefers the chosen answer; the outermost bars hold the rest.")


def _roc_plot(evaluation: Values) -> str:
    figure, axes = new_plot("ROC of the margin", "false positive rate", "true positive rate")
    axes.plot(thinned(evaluation["roc"]["fpr"]), thinned(evaluation["roc"]["tpr"]), color=FIRST)
    axes.plot([0, 1], [0, 1], color=SECOND, linewidth=1, linestyle="--")
    area = _text(evaluation["models"]["policy"]["auc"])
    return plot_html(figure, f"Area under the curve {area}; the dashed line is chance.")


def _written(evaluation: Values) -> str:
    models = {name: found["generation"] for name, found in evaluation["models"].items() if found["generation"]}
    if not models:
        return "<p>No prompts were asked (evaluate.answers is 0).</p>"
    rows = []
    for name, found in models.items():
        for kind in ("greedy", "sampled"):
            measures = [_text(found[kind].get(measure)) for measure in WRITTEN]
            further = [_text(found["length_ratio"]), "—"] if kind == "greedy" else ["—", _text(found["kl"])]
            rows.append([NAMES[name], kind, *measures, *further])
    head = ["model", "answers", *WRITTEN.values(), "length against SFT", "KL to its reference, nats per answer"]
    soft = (
        f'<p class="soft">{models["policy"]["prompts"]} fixed held-out prompts, greedy and sampled at temperature 1.'
        " Repetition is the share of runs of four tokens that were written before; language is told by script, refusals"
        " by phrases. KL is estimated on the model's own samples (estimator k3 of Schulman, 2020), up to the limit.</p>"
    )
    greedy = "".join(_side_by_side(entry, "greedy", models) for entry in evaluation["answers"])
    sampled = "".join(_side_by_side(entry, "sampled", models) for entry in evaluation["answers"])
    return (
        soft
        + table_html(head, rows)
        + f"<details open><summary>Greedy answers side by side</summary>{greedy}</details>"
        + f"<details><summary>Sampled answers side by side</summary>{sampled}</details>"
    )


def _side_by_side(entry: Values, kind: str, names: Iterable[str]) -> str:
    lang = entry["lang"]
    texts = {NAMES[name]: entry[kind][name] for name in names} | {"chosen in the data": entry["chosen"]}
    cells = "".join(
        f'<div lang="{lang}"><b>{html.escape(name)}</b>{html.escape(text) or "<i>empty</i>"}</div>'
        for name, text in texts.items()
    )
    prompt = html.escape(entry["prompt"])
    return f'<p class="prompt" lang="{lang}">{prompt}</p><div class="answers">{cells}</div>'


def _findings(findings: list[Values]) -> str:
    if not findings:
        return "<p>The curves show none of the pathologies of DPO that are looked for.</p>"
    return "".join(
        f'<div class="finding"><b>{html.escape(finding["severity"])}: {html.escape(finding["name"])}.</b>'
        f" {html.escape(finding['evidence'])}. What helps: {html.escape(finding['advice'])}.</div>"
        for finding in findings
    )


def _curves(histories: dict[str, list[Values]]) -> str:
    dpo = histories["dpo"]
    plots = [_curve(f"{stage.upper()} loss", found, {"loss": FIRST}, "nats") for stage, found in histories.items()]
    rewards = {"chosen_reward": THIRD, "rejected_reward": SECOND, "reward_margin": FIRST}
    plots.append(_curve("DPO rewards in training", dpo, rewards, "beta x nats"))
    plots.append(_curve("DPO reward accuracy in training", dpo, {"reward_accuracy": FIRST}, "share"))
    if "kl" in dpo[0]["metrics"]:
        plots.append(_curve("Distance from the reference in training", dpo, {"kl": FIRST}, "nats per answer"))
    return "".join(plots)


def _curve(title: str, records: list[Values], series: dict[str, str], unit: str) -> str:
    figure, axes = new_plot(title, "optimiser step", unit)
    shown = thinned(records)
    steps = [record["step"] for record in shown]
    for name, colour in series.items():
        values = [record[name] if name in record else record["metrics"][name] for record in shown]
        axes.plot(steps, values, color=colour, marker="o" if len(steps) < 3 else "", label=name.replace("_", " "))
    first = next(iter(series))
    validated = [record for record in records if first in record.get("validation", {})]
    if len(series) == 1 and validated:
        found = [record["validation"][first] for record in validated]
        axes.plot([record["step"] for record in validated], found, color=SECOND, marker="o", label="validation")
    if len(series) > 1 or validated:
        axes.legend()
    return plot_html(figure, f"{len(records)} steps.")


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
    sources = [
        [name, source, found["license"], found["rows"]]
        for name, summary in counts.items()
        for source, found in sorted(summary["sources"].items())
    ]
    return (
        table_html(["data set", "split", "rows", "languages"], rows)
        + f'<p class="soft">{html.escape(lost)}.</p>'
        + table_html(["data set", "source", "licence", "rows"], sources)
    )
