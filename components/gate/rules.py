"""The gate: named rules with numbers that decide whether a model may become the champion, and say why.

It reads evaluation.json and nothing else about the models, so register can apply it again to the same numbers.

Tested often enough on one test set, some model passes by luck. Every decision on the same test set is therefore
counted, and the k-th is tested at its own significance level, alpha / (k (k + 1)). The levels of all possible decisions
add up to alpha, which bounds the chance of any wrong promotion (alpha-spending; Tian and Ramdas, arXiv 1910.04900,
section 2). The bound does not need independent decisions. It does need that the next attempt is not chosen by the test
set's numbers: choose settings on the validation set.
"""

from dataclasses import dataclass

from components.common.errors import KubealignError
from components.config.gate import GateConfig
from components.engine.objectives import LOSSES
from components.gate.results import Comparison, Estimate, Evaluation, Generation, PairResults
from components.gate.verdict import Rule, Verdict, VerdictName

NO_ANSWERS = "no answers were generated (evaluate.generations_per_language is 0)"
NO_DPO = "the policy is the SFT model itself (dpo.epochs is 0)"
FIRST_RIVALS = {"sft": "the SFT model", "base": "the base model"}
"""Whom the policy has to beat before the first champion."""


@dataclass(frozen=True)
class GateContext:
    """Inputs of the gate other than the metrics.

    Args:
        incumbent: the champion to beat as models:/name/version; empty before the first one.
        decision_index: number of this decision among those on the same test set, from 1.
        data_clean: whether a commit records exactly this data.
    """

    incumbent: str
    decision_index: int
    data_clean: bool


def alpha_for_decision(alpha: float, decision_index: int) -> float:
    """Significance level of the `decision_index`-th decision (from 1) on a test set; all of them add up to alpha."""
    return alpha / (decision_index * (decision_index + 1))


def rival_of(evaluation: PairResults, incumbent: str) -> str:
    """The model that the policy has to beat: the champion; before the first one the SFT model, or the base model where
    the policy is the SFT model itself.

    Rewards are against the base, whose own are 0 and its loss ln 2: better than the base is better than a coin toss.
    """
    return "incumbent" if incumbent else next(name for name in FIRST_RIVALS if name in evaluation["models"])


def apply_gate(evaluation: Evaluation, context: GateContext, config: GateConfig) -> Verdict:
    """Apply the rules to an evaluation.

    Args:
        evaluation: evaluation.json.
        context: incumbent, number of the decision, whether the data is committed.
        config: the limits of the rules.

    Raises:
        KubealignError: the evaluation has no policy_metrics of the policy.
    """
    rival = rival_of(evaluation, context.incumbent)
    name = f"the champion {context.incumbent}" if context.incumbent else FIRST_RIVALS[rival]
    comparison = evaluation["comparisons"][rival]
    level = alpha_for_decision(config.alpha, context.decision_index)
    rules = [
        _primary(comparison, name, level, evaluation["bootstrap_resamples"], config),
        _min_pairs(comparison, config),
        _policy_loss(evaluation, config),
        *_generation(evaluation, rival, name, config),
        *_languages(comparison, config),
        _data(context, config),
    ]
    passed = all(rule["outcome"] != "fail" for rule in rules)
    verdict = _verdict(comparison, rules, passed, config)
    return {
        "passed": passed,
        "verdict": verdict,
        "sentence": _sentence(name, rules, verdict, config),
        "incumbent": context.incumbent,
        "decision_index": context.decision_index,
        "alpha_for_decision": level,
        "data_clean": context.data_clean,
        "gate": config.model_dump(mode="json"),
        "policy_digest": evaluation["policy_digest"],
        "rules": rules,
    }


def _primary(comparison: Comparison, rival: str, level: float, resamples: int, config: GateConfig) -> Rule:
    gain, p_value = comparison["improvement"], comparison["p_value"]
    what = (
        f"an improvement above {config.margin:g} nats"
        if config.test == "superiority"
        else f"a loss of less than {config.margin:g} nats"
    )
    expected = f"p <= {level:.2g} for {what}"
    sentence = (
        f"log-loss is {gain['value']:+.4f} nats better than {rival} [{gain['low']:+.4f}, {gain['high']:+.4f}],"
        f" one-sided p = {p_value:.4f}"
    )
    if level * (resamples + 1) < 1:
        sentence += f"; {resamples} resamples cannot show p <= {level:.2g}: use a new test set"
    return _rule(config.test, p_value <= level, p_value, expected, sentence)


def _min_pairs(comparison: Comparison, config: GateConfig) -> Rule:
    n = int(comparison["improvement"]["n"])
    return _rule("min_pairs", n >= config.min_pairs, n, f"at least {config.min_pairs}", f"{n} held-out pairs")


def _policy_loss(evaluation: Evaluation, config: GateConfig) -> Rule:
    expected = f"below {config.max_policy_loss:.4f}"
    if evaluation["beta"] is None:
        return _not_applicable("policy_loss", expected, NO_DPO)
    if LOSSES[evaluation["loss_type"]].per_token:  # its beta does not scale log-ratios of whole answers
        return _not_applicable("policy_loss", expected, f"trained by {evaluation['loss_type']}, a loss per token")
    metrics = evaluation["models"]["policy"]["policy_metrics"]
    if metrics is None:
        raise KubealignError("evaluation.json: models.policy.policy_metrics: none; evaluate the model again")
    loss = metrics["loss"]["value"]
    sentence = f"DPO loss on held-out pairs with its own beta and reference is {loss:.4f}"
    return _rule("policy_loss", loss < config.max_policy_loss, loss, expected, sentence)


def _generation(evaluation: Evaluation, rival: str, rival_name: str, config: GateConfig) -> list[Rule]:
    """Rules on KL, length and repetition of the policy's answers.

    KL and length bound how far preference training may take a policy from its SFT model. Where the policy is that model
    they say nothing: SFT is meant to leave the base, whose answers often have no end.
    """
    policy, rival_generation = (evaluation["models"][name]["generation"] for name in ("policy", rival))
    aligned = policy if "sft" in evaluation["models"] else None
    kl, ratio = (aligned["kl"], aligned["length_ratio"]) if aligned else (None, None)
    missing = NO_DPO if policy and not aligned else NO_ANSWERS
    kl_limit, length_limits = (None, config.max_kl), (config.min_length_ratio, config.max_length_ratio)
    return [
        _limit("kl", kl, kl_limit, "nats per answer from the SFT model, on its own samples", missing),
        _limit("length_ratio", ratio, length_limits, "times the tokens of the SFT model's answers", missing),
        _repetition(policy, rival_generation, rival_name, config),
    ]


def _limit(
    name: str, estimate: Estimate | None, limits: tuple[float | None, float], meaning: str, missing: str
) -> Rule:
    lowest, highest = limits
    expected = f"at most {highest:g}" if lowest is None else f"from {lowest:g} to {highest:g}"
    if estimate is None:
        return _not_applicable(name, expected, missing)
    ok = estimate["value"] <= highest and (lowest is None or estimate["value"] >= lowest)
    sentence = f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] {meaning}"
    return _rule(name, ok, estimate["value"], expected, sentence)


def _repetition(policy: Generation | None, rival: Generation | None, rival_name: str, config: GateConfig) -> Rule:
    expected = f"at most {config.max_repetition_increase:g} more"
    if policy is None or rival is None:
        return _not_applicable("repetition", expected, NO_ANSWERS)
    share, rival_share = policy["greedy"]["repetition"]["value"], rival["greedy"]["repetition"]["value"]
    increase = share - rival_share
    sentence = f"{share:.3f} of the greedy answers' 4-grams are repeated, {rival_share:.3f} with {rival_name}"
    return _rule("repetition", increase <= config.max_repetition_increase, increase, expected, sentence)


def _languages(comparison: Comparison, config: GateConfig) -> list[Rule]:
    """Rules that no language regresses: one test per language, at a level divided among them (Bonferroni).

    A rule fails only on evidence, so an equal model fails by chance with a probability of at most `language_alpha`.
    """
    level = config.language_alpha / max(1, len(comparison["by_language"]))
    rules = []
    for lang, gain in sorted(comparison["by_language"].items()):
        p_value = comparison["regression_p"][lang]
        sentence = (
            f"{gain['value']:+.4f} nats [{gain['low']:+.4f}, {gain['high']:+.4f}], {int(gain['n'])} pairs,"
            f" one-sided p = {p_value:.4f} for a regression"
        )
        expected = f"p > {level:.2g} for a loss of more than {config.max_language_regression:g} nats"
        rules.append(_rule(f"no_regression_{lang}", p_value > level, p_value, expected, sentence))
    return rules


def _data(context: GateContext, config: GateConfig) -> Rule:
    expected = "data that a commit records"
    if not config.require_committed_data:
        return _not_applicable("committed_data", expected, "not required (gate.require_committed_data is false)")
    clean = context.data_clean
    sentence = "the data is a recorded version" if clean else "the data differs from what is committed; commit dvc.lock"
    return _rule("committed_data", clean, float(clean), expected, sentence)


def _rule(name: str, ok: bool, found: float, expected: str, sentence: str) -> Rule:
    return Rule(name=name, outcome="pass" if ok else "fail", found=found, expected=expected, sentence=sentence)


def _not_applicable(name: str, expected: str, sentence: str) -> Rule:
    return Rule(name=name, outcome="not applicable", found=None, expected=expected, sentence=sentence)


def _verdict(comparison: Comparison, rules: list[Rule], passed: bool, config: GateConfig) -> VerdictName:
    if passed:
        return "better" if config.test == "superiority" else "not worse"
    if rules[0]["outcome"] == "pass":
        return "refused"
    return "worse" if comparison["improvement"]["high"] < 0 else "no evidence"


def _sentence(rival: str, rules: list[Rule], verdict: VerdictName, config: GateConfig) -> str:
    shown = "better than" if config.test == "superiority" else f"at most {config.margin:g} nats worse than"
    if verdict in ("better", "not worse"):
        return f"The policy is {shown} {rival} on held-out pairs: {rules[0]['sentence']}."
    failed = "; ".join(
        f"{rule['name']}: {rule['sentence']}, expected {rule['expected']}"
        for rule in rules
        if rule["outcome"] == "fail"
    )
    opening = {
        "worse": f"The policy is worse than {rival}",
        "no evidence": f"There is no evidence that the policy is {shown} {rival}",
        "refused": f"The policy is {shown} {rival}, but fails a guard rail",
    }[verdict]
    return f"{opening}. {failed}."
