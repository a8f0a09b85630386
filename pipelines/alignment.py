"""The DAG: resolve, fetch, validate, sft, dpo, evaluate, register; one flat graph, the same everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.config.loading import pipeline_arguments
from components.config.sections import Config
from components.dpo.component import dpo
from components.evaluate.component import evaluate
from components.fetch.component import fetch
from components.register.component import register
from components.resolve.component import resolve
from components.sft.component import sft
from components.validate.component import validate
from pipelines import platform

NAME = "alignment"
DESCRIPTION = "Preference alignment: SFT, then DPO, judged on held-out pairs, registered."


def build_pipeline(config: Config, target: str = "local", caching: bool = True) -> Callable[..., Any]:
    """The pipeline with the configuration's values as the defaults of its run form.

    Args:
        config: the whole configuration.
        target: `local` for KFP's local runners; `kubeflow` adds what the section `cluster` says of every step.
        caching: whether a step that has run with the same inputs is served from the cache.

    Raises:
        InputError: a setting that the target cannot follow.
    """
    default = pipeline_arguments(config)
    in_cluster = target == "kubeflow"
    if in_cluster:
        platform.check(config)

    @dsl.pipeline(
        name=NAME,
        description=DESCRIPTION,
        pipeline_config=platform.pipeline_config(config.cluster) if in_cluster else None,
    )
    def alignment(
        data_revision: str = default["data_revision"],
        base_model: str = default["base_model"],
        sft_epochs: float = default["sft_epochs"],
        sft_lr: float = default["sft_lr"],
        dpo_epochs: float = default["dpo_epochs"],
        dpo_lr: float = default["dpo_lr"],
        dpo_beta: float = default["dpo_beta"],
        dpo_loss: str = default["dpo_loss"],
        promote: bool = default["promote"],
        data_section: str = default["data_section"],
        model_section: str = default["model_section"],
        validate_section: str = default["validate_section"],
        sft_section: str = default["sft_section"],
        dpo_section: str = default["dpo_section"],
        evaluate_section: str = default["evaluate_section"],
        gate_section: str = default["gate_section"],
        register_section: str = default["register_section"],
    ) -> None:
        """Align a language model to preferences.

        Args:
            data_revision: Branch, tag or commit of the data; `workspace` for local files as they are.
            base_model: Base model: `embedded`, a folder, s3://, models:/ or a hub id.
            sft_epochs: Passes over the instructions.
            sft_lr: Peak learning rate of SFT.
            dpo_epochs: Passes over the preference pairs.
            dpo_lr: Peak learning rate of DPO.
            dpo_beta: Strength of the pull towards the reference.
            dpo_loss: Preference loss.
            promote: Whether a passed gate makes the model the champion.
            data_section: Section `data` of params.yaml as JSON, without the fields above.
            model_section: Section `model`.
            validate_section: Section `validate`.
            sft_section: Section `sft`.
            dpo_section: Section `dpo`.
            evaluate_section: Section `evaluate`.
            gate_section: Section `gate`.
            register_section: Section `register`.
        """
        facts = resolve(
            data_section=data_section,
            data_revision=data_revision,
            model_section=model_section,
            base_model=base_model,
            register_section=register_section,
            promote=promote,
            validate_section=validate_section,
            sft_section=sft_section,
            sft_epochs=sft_epochs,
            sft_lr=sft_lr,
            dpo_section=dpo_section,
            dpo_epochs=dpo_epochs,
            dpo_lr=dpo_lr,
            dpo_beta=dpo_beta,
            dpo_loss=dpo_loss,
            evaluate_section=evaluate_section,
            gate_section=gate_section,
        ).set_caching_options(enable_caching=False)
        fact = facts.outputs
        fetched = fetch(
            data_section=data_section,
            data_commit=fact["data_commit"],
            preferences_digest=fact["preferences_digest"],
            instructions_digest=fact["instructions_digest"],
            model_section=model_section,
            base_reference=fact["base_reference"],
            base_digest=fact["base_digest"],
            template_digest=fact["template_digest"],
            code=fact["code_fetch"],
        )
        base = fetched.outputs["base"]
        checked = validate(
            validate_section=validate_section,
            model_section=model_section,
            code=fact["code_validate"],
            dataset=fetched.outputs["dataset"],
            base=base,
        )
        clean = checked.outputs["clean"]
        tuned = sft(
            sft_section=sft_section,
            epochs=sft_epochs,
            lr=sft_lr,
            model_section=model_section,
            code=fact["code_sft"],
            dataset=clean,
            base=base,
        )
        aligned = dpo(
            dpo_section=dpo_section,
            epochs=dpo_epochs,
            lr=dpo_lr,
            beta=dpo_beta,
            loss=dpo_loss,
            model_section=model_section,
            code=fact["code_dpo"],
            dataset=clean,
            base=base,
            sft_model=tuned.outputs["sft_model"],
        )
        policy = aligned.outputs["policy"]
        judged = evaluate(
            evaluate_section=evaluate_section,
            gate_section=gate_section,
            model_section=model_section,
            incumbent=fact["incumbent"],
            test_use=fact["test_use"],
            data_clean=fact["data_clean"],
            data_commit=fact["data_commit"],
            preferences_digest=fact["preferences_digest"],
            config=fact["config"],
            lineage=fact["lineage"],
            code=fact["code_evaluate"],
            dataset=clean,
            base=base,
            sft_model=tuned.outputs["sft_model"],
            policy=policy,
        )
        registered = register(
            register_section=register_section,
            promote=promote,
            gate_section=gate_section,
            data_commit=fact["data_commit"],
            preferences_digest=fact["preferences_digest"],
            instructions_digest=fact["instructions_digest"],
            data_clean=fact["data_clean"],
            test_set=fact["test_set"],
            git_commit=fact["git_commit"],
            base_reference=fact["base_reference"],
            base_digest=fact["base_digest"],
            config=fact["config"],
            lineage=fact["lineage"],
            incumbent=fact["incumbent"],
            decision=fact["decision"],
            test_use=fact["test_use"],
            resolve_run=fact["run_id"],
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
        ).set_caching_options(enable_caching=False)
        for task in (facts, fetched, checked, tuned, aligned, judged, registered):
            if in_cluster:
                platform.configure(task, config.cluster)
            if not caching:
                task.set_caching_options(enable_caching=False)

    pipeline: Callable[..., Any] = alignment
    return pipeline


def compile_pipeline(config: Config, out: Path, target: str, caching: bool = True) -> None:
    """Write the pipeline as IR YAML."""
    compiler.Compiler().compile(build_pipeline(config, target, caching), str(out))
