"""KFP shell of validate."""

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def validate(
    order: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    clean: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Check both data sets with Great Expectations and set bad rows aside.

    Args:
        order: what this step depends on, from `resolve`: the section `validate`, `model.max_length` and the
            digest of its code.
        dataset: The data set.
        base: The base model, for its tokenizer.
        clean: The good rows, quarantine.jsonl, warnings.jsonl, validation.json (what the report says), manifest.json.
        report: The validation report as a page.
        summary: Its summary.
        metrics: The counts, and how often the longer answer wins.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.config.loading import validated
    from components.orders import read_order
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics
    from components.validate.config import ValidateConfig
    from components.validate.stage import run_validate

    with report_errors("validate"):
        sections = read_order(order).sections
        run_id, counts = run_validate(
            validated(ValidateConfig, sections["validate"], "validate"),
            sections["model"]["max_length"],
            Path(dataset.path),
            Path(base.path),
            Path(clean.path),
            Path(report.path),
            Path(summary.path),
        )
        show_metrics(metrics, counts)
        return run_id
