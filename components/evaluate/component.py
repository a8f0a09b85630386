"""KFP shell of evaluate."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    order: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    sft_model: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    roc: dsl.Output[dsl.ClassificationMetrics],
) -> str:
    """Judge the policy on held-out pairs against SFT and the incumbent champion.

    Args:
        order: what this step depends on, from `resolve`: the sections `evaluate` and `gate`, how models are
            run, the champion to beat, the number of this decision on the test set, and the digest of its code.
        dataset: The clean data set.
        base: The base model.
        sft_model: The SFT model.
        policy: The aligned model.
        evaluation: evaluation.json (all numbers) and verdict.json.
        report: The report as a page.
        summary: Its summary.
        metrics: The policy's held-out metrics.
        roc: ROC of the policy's margin.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.common.documents import read_document
    from components.common.files import write_json
    from components.config.gate import GateConfig
    from components.config.loading import validated
    from components.config.model import ExecutionConfig
    from components.evaluate.candidates import Inputs
    from components.evaluate.config import EvaluateConfig
    from components.evaluate.stage import run_evaluate
    from components.gate.results import Evaluation
    from components.orders import read_order
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics

    with report_errors("evaluate"):
        given = read_order(order)
        run_id, values = run_evaluate(
            validated(EvaluateConfig, given.sections["evaluate"], "evaluate"),
            validated(GateConfig, given.sections["gate"], "gate"),
            validated(ExecutionConfig, given.sections["model"], "model"),
            Inputs(Path(dataset.path), Path(base.path), Path(sft_model.path), Path(policy.path), **given.facts),
            given.origin,
            given.code,
            Path(evaluation.path),
            Path(report.path),
            Path(summary.path),
        )
        show_metrics(metrics, values)
        curve = read_document(Path(evaluation.path) / "evaluation.json", Evaluation)["roc"]
        roc.log_roc_curve(curve["fpr"], curve["tpr"], curve["threshold"])
        write_json(Path(roc.path), curve)
        return run_id
