"""The pipeline's DAG: resolve, fetch, validate, sft, dpo, evaluate, register; one flat graph for every runner."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.common.provenance import without_prose
from components.config.params import Config, pipeline_arguments
from components.dpo.component import dpo
from components.evaluate.component import evaluate
from components.fetch.component import fetch
from components.register.component import register
from components.resolve.component import resolve
from components.sft.component import sft
from components.stages import BY_NAME, ORDERED
from components.validate.component import validate
from pipelines import platform

COMPONENTS = (resolve, fetch, validate, sft, dpo, evaluate, register)
FORM = inspect.signature(resolve.python_func).parameters
"""The run form: its fields' names, types and descriptions."""
NAME = "alignment"
DESCRIPTION = "Preference alignment: SFT, then DPO, judged on held-out pairs, registered."


def build_pipeline(config: Config, target: str = "local", caching: bool = True) -> Callable[..., Any]:
    """The pipeline with the configuration's values as the defaults of its run form.

    Args:
        config: the whole configuration.
        target: `local` for KFP's local runners; `kubeflow` applies the section `cluster` to every step.
        caching: whether a step that has run with the same inputs is served from the cache.

    Raises:
        InputError: a setting that the target does not support.
    """
    in_cluster = target == "kubeflow"
    if in_cluster:
        platform.check(config)
        config = platform.for_its_hardware(config, "kubeflow")
    for component in COMPONENTS:
        ship_without_prose(component)

    def alignment(*inputs: Any) -> None:
        for task in _connect(dict(zip(FORM, inputs, strict=True))):
            if in_cluster:
                platform.configure(task, config.cluster, config.register_.public_keys)
            if not caching or not BY_NAME[task.name].cached:
                task.set_caching_options(enable_caching=False)

    # KFP takes the run form from the function's signature and docstring; its fields are the inputs of `resolve`.
    form: Any = alignment
    default = pipeline_arguments(config)
    form.__signature__ = inspect.Signature([FORM[name].replace(default=default[name]) for name in FORM])
    form.__doc__ = inspect.getdoc(resolve.python_func)
    workflow = platform.pipeline_config(config.cluster) if in_cluster else None
    pipeline: Callable[..., Any] = dsl.pipeline(name=NAME, description=DESCRIPTION, pipeline_config=workflow)(form)
    return pipeline


def _connect(form: dict[str, Any]) -> list[Any]:
    """Connect the steps; each one after `resolve` gets its order: all that it depends on besides input artifacts."""
    facts = resolve(**form)
    order = {name: facts.outputs[f"order_{name}"] for name in ORDERED}
    fetched = fetch(order=order["fetch"])
    base = fetched.outputs["base"]
    checked = validate(order=order["validate"], dataset=fetched.outputs["dataset"], base=base)
    clean = checked.outputs["clean"]
    tuned = sft(order=order["sft"], dataset=clean, base=base)
    sft_model = tuned.outputs["sft_model"]
    aligned = dpo(order=order["dpo"], dataset=clean, base=base, sft_model=sft_model)
    policy = aligned.outputs["policy"]
    judged = evaluate(order=order["evaluate"], dataset=clean, base=base, sft_model=sft_model, policy=policy)
    registered = register(
        order=order["register"],
        resolve_run=facts.outputs["run_id"],
        fetch_run=fetched.outputs["Output"],
        validate_run=checked.outputs["Output"],
        sft_run=tuned.outputs["Output"],
        dpo_run=aligned.outputs["Output"],
        evaluate_run=judged.outputs["Output"],
        dataset=clean,
        base=base,
        policy=policy,
        evaluation=judged.outputs["evaluation"],
        report=judged.outputs["report"],
    )
    return [facts, fetched, checked, tuned, aligned, judged, registered]


def ship_without_prose(component: Any) -> None:
    """Strip docstring and comments from the function text that KFP ships: KFP's caches include it in their keys."""
    command = component.component_spec.implementation.container.command
    command[-1] = ast.unparse(without_prose(ast.parse(command[-1])))


def compile_pipeline(config: Config, out: Path, target: str, caching: bool = True) -> None:
    """Write the pipeline as IR YAML."""
    compiler.Compiler().compile(build_pipeline(config, target, caching), str(out))
