"""The rules that belong to a registered model, in its signed history: a run may be stricter, never looser."""

from typing import Any

from components.common.errors import InputError
from components.config.gate import GateConfig
from components.registry.audit import Rules

STRICTER = {
    "alpha": -1,
    "min_pairs": 1,
    "max_policy_loss": -1,
    "max_kl": -1,
    "min_length_ratio": 1,
    "max_length_ratio": -1,
    "max_repetition_increase": -1,
    "max_language_regression": -1,
    "language_alpha": 1,
    "require_committed_data": 1,
}
"""In which direction a limit is stricter: 1 upwards. `test` and `margin` are compared as the threshold they make."""


def rules_of(gate: GateConfig, answers: bool) -> Rules:
    """The rules that a configuration makes."""
    return {"gate": gate.model_dump(mode="json"), "answers": answers}


def check_rules(rules: Rules, gate: GateConfig, answers: bool, name: str) -> None:
    """Check that a run's rules are at least as strict as the registered model's.

    Args:
        rules: those of the registered model.
        gate: those of the run.
        answers: whether the run generates answers.
        name: the registered model.

    Raises:
        InputError: a rule is looser.
    """
    for key, wanted, found in _looser(rules, gate, answers):
        raise InputError(
            f"{key}={found} is looser than the rule of the registered model {name}, {wanted}; a run may be stricter,"
            " never looser. Whoever holds the signing key changes the model's rules to those of params.yaml with"
            " `kubealign rules --reason …`"
        )


def _looser(rules: Rules, gate: GateConfig, answers: bool) -> list[tuple[str, Any, Any]]:
    """Key, the model's value and the run's, of every rule that is looser."""
    model = GateConfig.model_validate(rules["gate"])
    looser: list[tuple[str, Any, Any]] = []
    if gate.threshold() < model.threshold():
        wanted, found = (f"{each.test} with margin {each.margin:g}" for each in (model, gate))
        looser.append(("gate.test", wanted, found))
    for key, direction in STRICTER.items():
        wanted, found = getattr(model, key), getattr(gate, key)
        if direction * (found - wanted) < 0:
            looser.append((f"gate.{key}", wanted, found))
    if rules["answers"] and not answers:
        looser.append(("evaluate.generations_per_language", "above 0", 0))
    return looser
