"""KFP shell of register."""

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(
    order: str,
    resolve_run: str,
    fetch_run: str,
    validate_run: str,
    sft_run: str,
    dpo_run: str,
    evaluate_run: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.HTML],
    result: dsl.Output[dsl.Artifact],
) -> str:
    """Register the model in MLflow with its lineage and move the aliases as the verdict says. Never cached.

    Args:
        order: the sections `register` and `gate`, from which the verdict must follow, and where the model comes from.
        resolve_run: MLflow run of resolve.
        fetch_run: MLflow run of fetch.
        validate_run: MLflow run of validate.
        sft_run: MLflow run of sft.
        dpo_run: MLflow run of dpo.
        evaluate_run: MLflow run of evaluate.
        dataset: The clean data set, for its licences.
        base: The base model, stored once beside models in the format adapter.
        policy: The aligned model.
        evaluation: Its evaluation, with the verdict on this very policy.
        report: The report.
        result: Version, aliases, verdict and metrics as JSON; they go to the parent run too, with the report.

    Returns:
        URI of the model version.
    """
    from pathlib import Path

    from components.config.gate import GateConfig
    from components.config.loading import validated
    from components.orders import read_order
    from components.register.config import RegisterConfig
    from components.register.stage import Lineage, RegisterInputs, run_register
    from components.stages import STAGE_NAMES
    from components.tracking.errors import report_errors

    with report_errors("register"):
        given = read_order(order)
        runs = (resolve_run, fetch_run, validate_run, sft_run, dpo_run, evaluate_run)
        found = run_register(
            validated(RegisterConfig, given.sections["register"], "register"),
            validated(GateConfig, given.sections["gate"], "gate"),
            Lineage(**given.facts, **given.origin),
            dict(zip(STAGE_NAMES, runs, strict=False)),
            RegisterInputs(
                Path(policy.path), Path(base.path), Path(evaluation.path), Path(dataset.path), Path(report.path)
            ),
            Path(result.path),
        )
        return str(found["model_uri"])
