"""The verdict's numbers once more from the scores of the pairs, so that nobody's word for them is needed.

The margins of the validation pairs give each model's scale, those of the test pairs the losses, and the seeded
resamples of prompt groups the p-values; all of them have to be those in evaluation.json.
"""

import math

import numpy as np

from components.common.errors import EvidenceError
from components.config.gate import GateConfig
from components.gate.results import Comparison, Evaluation
from components.gate.rules import GateContext, apply_gate, rival_of
from components.gate.statistics import GroupBootstrap, compared_loss, fit_scale, superiority_p
from components.gate.verdict import Verdict

TOLERANCE = 1e-6
"""Relative, of values that another build of numpy computes."""


def judge_again(evaluation: Evaluation, context: GateContext, config: GateConfig, where: str) -> Verdict:
    """The verdict on an evaluation whose comparison follows from its scores.

    Args:
        evaluation: evaluation.json.
        context: as for the gate.
        config: the gate's rules.
        where: names the evaluation, for the message.

    Raises:
        EvidenceError: a number is not that of the scores, or they were judged under other circumstances.
    """
    judged = evaluation["judged"]
    for name, wanted in vars(context).items():
        if judged[name] != wanted:  # type: ignore[literal-required]
            raise EvidenceError(f"{where}: judged with {name} {judged[name]!r}, expected {wanted!r}; evaluate again")  # type: ignore[literal-required]
    rival = rival_of(evaluation, context.incumbent)
    if rival not in evaluation["comparisons"] or not evaluation["held_out"]:
        raise EvidenceError(f"{where}: the policy is not compared with the {rival}; evaluate again")
    stated = evaluation["comparisons"][rival]
    for name, found, expected in _differences(stated, numbers(evaluation, rival, config)):
        raise EvidenceError(
            f"{where}: comparisons.{rival}.{name} is {found:.6g}, but the scores of the pairs give {expected:.6g}: the"
            " numbers were changed; evaluate again"
        )
    return apply_gate(evaluation, context, config)


def numbers(evaluation: Evaluation, rival: str, config: GateConfig) -> dict[str, float]:
    """What the rules read of a comparison, by its place there, from the scores of the pairs.

    Args:
        evaluation: evaluation.json, of which only scores, resamples and seed are read.
        rival: `sft`, `base` or `incumbent`.
        config: the gate's rules.
    """
    test, validation = evaluation["held_out"], evaluation["calibration"]
    settings = (evaluation["bootstrap_resamples"], evaluation["confidence"])
    bootstrap = GroupBootstrap([pair["group"] for pair in test], *settings, evaluation["seed"])
    calibration = GroupBootstrap([pair["group"] for pair in validation], *settings, evaluation["seed"] + 1)
    langs = [pair["lang"] for pair in test]
    masks = [np.ones(len(test), dtype=bool), *(np.array([x == lang for x in langs]) for lang in sorted(set(langs)))]
    masks_PK = np.stack(masks, axis=1).astype(np.float64)
    counts_BK = bootstrap.sums(masks_PK)
    losses = {}
    for model in ("policy", rival):
        fitted_P = np.array([pair["margins"][model] for pair in validation])
        margins_P = np.array([pair["margins"][model] for pair in test])
        loss_BK, _ = bootstrap.scaled_sums(margins_P, calibration.scales(fitted_P), masks_PK)
        with np.errstate(invalid="ignore"):  # a resample may have no pair of a language
            losses[model] = compared_loss(margins_P, fit_scale(fitted_P)), loss_BK / counts_BK
    gain_P, gain_BK = losses[rival][0] - losses["policy"][0], losses[rival][1] - losses["policy"][1]
    found = {
        "improvement.n": float(len(test)),
        "improvement.value": float(gain_P.mean()),
        "improvement.high": bootstrap.interval(0.0, gain_BK[:, 0], 0)["high"],
        "threshold": config.threshold(),
        "p_value": bootstrap.p_value(gain_P, gain_BK[:, 0], config.threshold()),
    }
    for index, lang in enumerate(sorted(set(langs)), start=1):
        known_B = gain_BK[np.isfinite(gain_BK[:, index]), index]
        found[f"regression_p.{lang}"] = superiority_p(-known_B, config.max_language_regression)
    return found


def _differences(stated: Comparison, expected: dict[str, float]) -> list[tuple[str, float, float]]:
    """Name, stated and expected value of every number that differs."""
    gain = stated["improvement"]
    found = {"improvement.value": gain["value"], "improvement.high": gain["high"], "improvement.n": float(gain["n"])}
    found |= {"threshold": stated["threshold"], "p_value": stated["p_value"]}
    found |= {f"regression_p.{lang}": value for lang, value in stated["regression_p"].items()}
    names = sorted(found.keys() | expected.keys())
    values = [(name, found.get(name, math.nan), expected.get(name, math.nan)) for name in names]
    return [v for v in values if not math.isclose(v[1], v[2], rel_tol=TOLERANCE, abs_tol=TOLERANCE)]
