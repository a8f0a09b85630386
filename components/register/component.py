"""KFP shell of register."""

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(
    register_section: str,
    promote: bool,
    gate_section: str,
    data_commit: str,
    preferences_digest: str,
    instructions_digest: str,
    data_clean: bool,
    test_set: str,
    git_commit: str,
    base_reference: str,
    base_digest: str,
    config: str,
    lineage: str,
    incumbent: str,
    decision: str,
    test_use: int,
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
        register_section: section `register` of params.yaml as JSON, without promote.
        promote: whether a passed gate makes the model the champion.
        gate_section: section `gate` as JSON; the verdict must follow from it.
        data_commit: commit of the data.
        preferences_digest: DVC digest of the preference pairs.
        instructions_digest: DVC digest of the instructions.
        data_clean: whether a commit records just this data.
        test_set: md5 of the test side's pairs.
        git_commit: commit of the code.
        base_reference: definite name of the base model.
        base_digest: its digest.
        config: digest of all settings.
        lineage: key of everything that decides the weights.
        incumbent: the champion that was to beat.
        decision: key of what was asked of the test set.
        test_use: its number among the decisions on this test set, from 1.
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

    from components.config.loading import section
    from components.config.sections import GateConfig, RegisterConfig
    from components.register.stage import Judged, Lineage, run_register
    from components.tracking.errors import report_errors

    with report_errors("register"):
        found = run_register(
            section(RegisterConfig, register_section, promote=promote),
            section(GateConfig, gate_section),
            Lineage(
                data_commit,
                preferences_digest,
                instructions_digest,
                data_clean,
                test_set,
                git_commit,
                base_reference,
                base_digest,
                config,
                lineage,
                incumbent,
                decision,
                test_use,
            ),
            {
                "resolve": resolve_run,
                "fetch": fetch_run,
                "validate": validate_run,
                "sft": sft_run,
                "dpo": dpo_run,
                "evaluate": evaluate_run,
            },
            Judged(Path(policy.path), Path(base.path), Path(evaluation.path), Path(dataset.path), Path(report.path)),
            Path(result.path),
        )
        return str(found["model_uri"])
