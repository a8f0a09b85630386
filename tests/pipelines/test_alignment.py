"""What KFP ships of the components, by which its caches go."""

import inspect
from typing import Any

import pytest
from kfp import dsl

from components.stages import STAGE_NAMES
from pipelines.alignment import COMPONENTS, FORM, ship_without_prose


@dsl.component(base_image="python")
def told(order: str) -> str:
    """Do it."""
    # Why it is done so.
    return order


PLAIN = told.component_spec.implementation.container.command[-1]


def test_the_graph_has_the_components_of_the_table() -> None:
    assert tuple(component.name for component in COMPONENTS) == STAGE_NAMES
    assert all(parameter.annotation in (str, float, bool) for parameter in FORM.values())


def test_a_component_is_shipped_without_docstring_and_comments() -> None:
    ship_without_prose(told)
    shipped = told.component_spec.implementation.container.command[-1]
    assert "Do it." in PLAIN and "Do it." not in shipped and "Why" not in shipped and "return order" in shipped
    ship_without_prose(told)
    assert told.component_spec.implementation.container.command[-1] == shipped


@pytest.mark.parametrize("component", COMPONENTS, ids=STAGE_NAMES)
def test_what_is_shipped_still_is_the_components_function(component: dsl.base_component.BaseComponent) -> None:
    ship_without_prose(component)
    source = component.component_spec.implementation.container.command[-1]
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - as KFP's executor does
    shipped, written = (inspect.signature(function) for function in (names[component.name], component.python_func))
    assert shipped.parameters == written.parameters
