"""KFP shell of sft."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def sft(
    order: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    sft_model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Fine-tune the base model on the answers of the instructions.

    Args:
        order: what this step depends on, from `resolve`: the section `sft`, how the model is run and the
            digest of its code.
        dataset: The clean data set.
        base: The base model.
        sft_model: `adapter/`, or `model/` after full fine-tuning; `cache/` (reference log-probs of the pairs),
            history.jsonl (every step), training.json, manifest.json.
        metrics: Validation loss before and after, nats per token.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.config.loading import validated
    from components.config.model import ExecutionConfig
    from components.orders import read_order
    from components.sft.config import SftConfig
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics
    from components.training.train_job import run_on_nodes, several_nodes

    with report_errors("sft"):
        sections = read_order(order).sections
        config = validated(SftConfig, sections["sft"], "sft")
        model = validated(ExecutionConfig, sections["model"], "model")
        inputs = {"dataset": Path(dataset.path), "base": Path(base.path)}
        cluster = several_nodes()
        if cluster:
            run_id, values = run_on_nodes(cluster, "sft", config, model, inputs, Path(sft_model.path))
        else:
            from components.sft.stage import run_sft

            run_id, values = run_sft(config, model, inputs["dataset"], inputs["base"], Path(sft_model.path))
        show_metrics(metrics, values)
        return run_id
