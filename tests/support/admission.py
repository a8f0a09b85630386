"""The ValidatingAdmissionPolicy of k8s/overlays/admission, evaluated as Kubernetes does."""

from typing import Any

import cel
import yaml

from tests.conftest import ROOT

POLICY = ROOT / "k8s" / "overlays" / "admission" / "admission.yaml"
ACCOUNT = "system:serviceaccount:kubealign:train-jobs"
UNREADABLE = (ValueError, RuntimeError, TypeError, KeyError)
"""How the interpreter says that an expression names what is not there."""


def policy() -> dict[str, Any]:
    """The policy itself."""
    found: dict[str, Any] = next(yaml.safe_load_all(POLICY.read_text(encoding="utf-8")))
    return found


def refusals(manifest: dict[str, Any], user: str, rules: dict[str, Any] | None = None) -> list[str]:
    """The messages with which a TrainJob of a user is refused; none if it is let in.

    Variables are evaluated where they are used; what cannot be evaluated refuses, as failurePolicy says.
    """
    spec = (rules or policy())["spec"]
    assert spec["failurePolicy"] == "Fail"
    context = {"object": manifest, "request": {"userInfo": {"username": user}}}
    if not all(cel.evaluate(condition["expression"], context) for condition in spec["matchConditions"]):
        return []
    variables: dict[str, Any] = {}
    for variable in spec["variables"]:
        try:
            variables[variable["name"]] = cel.evaluate(variable["expression"], context | {"variables": variables})
        except UNREADABLE:
            continue
    refused = []
    for validation in spec["validations"]:
        try:
            passed = cel.evaluate(validation["expression"], context | {"variables": variables})
        except UNREADABLE as error:
            refused.append(f"{validation['message']} ({error})")
            continue
        if passed is not True:
            refused.append(validation["message"])
    return refused
