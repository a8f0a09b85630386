"""KFP shell of evaluate."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    evaluate_section: str,
    gate_section: str,
    model_section: str,
    incumbent: str,
    test_use: int,
    data_clean: bool,
    data_commit: str,
    preferences_digest: str,
    config: str,
    lineage: str,
    code: str,
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
        evaluate_section: section `evaluate` of params.yaml as JSON.
        gate_section: section `gate` as JSON.
        model_section: section `model` as JSON, without its base.
        incumbent: the champion to beat as models:/name/version; empty for the SFT model.
        test_use: number of this decision among those on the same test set, from 1.
        data_clean: whether the data is what a commit records.
        data_commit: commit of the data, for the report.
        preferences_digest: digest of the pairs, for the report.
        config: digest of all settings, for the report.
        lineage: key of everything that decides the weights, for the report.
        code: digest of this step's code, for the cache.
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
    from components.config.loading import section
    from components.config.sections import EvaluateConfig, GateConfig, ModelConfig
    from components.evaluate.candidates import Inputs
    from components.evaluate.stage import run_evaluate
    from components.gate.results import Evaluation
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics

    with report_errors("evaluate"):
        facts = {
            "data_commit": data_commit,
            "preferences_digest": preferences_digest,
            "base_model": base.metadata.get("reference", "base"),
            "base_digest": base.metadata.get("digest", ""),
            "lineage": lineage,
            "config": config,
        }
        run_id, values = run_evaluate(
            section(EvaluateConfig, evaluate_section),
            section(GateConfig, gate_section),
            section(ModelConfig, model_section, base=facts["base_model"]),
            Inputs(
                Path(dataset.path),
                Path(base.path),
                Path(sft_model.path),
                Path(policy.path),
                incumbent,
                test_use,
                data_clean,
            ),
            facts,
            Path(evaluation.path),
            Path(report.path),
            Path(summary.path),
        )
        show_metrics(metrics, values)
        curve = read_document(Path(evaluation.path) / "evaluation.json", Evaluation)["roc"]
        roc.log_roc_curve(curve["fpr"], curve["tpr"], curve["threshold"])
        write_json(Path(roc.path), curve)
        return run_id
