"""KFP shell of sft."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def sft(
    sft_section: str,
    epochs: float,
    lr: float,
    model_section: str,
    code: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    sft_model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Fine-tune the base model on the answers of the instructions.

    Args:
        sft_section: section `sft` of params.yaml as JSON, without epochs and lr.
        epochs: passes over the instructions.
        lr: peak learning rate.
        model_section: section `model` as JSON, without its base.
        code: digest of this step's code, for the cache.
        dataset: The clean data set.
        base: The base model.
        sft_model: `adapter/`, or `model/` after full fine-tuning; `cache/` (reference log-probs of the pairs),
            history.jsonl (every step), training.json, manifest.json.
        metrics: Validation loss before and after, nats per token.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.config.loading import section
    from components.config.sections import ModelConfig, SftConfig
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics
    from components.training.train_job import run_on_nodes, several_nodes

    with report_errors("sft"):
        config = section(SftConfig, sft_section, epochs=epochs, lr=lr)
        model = section(ModelConfig, model_section, base=base.metadata.get("reference", "base"))
        inputs = {"dataset": Path(dataset.path), "base": Path(base.path)}
        cluster = several_nodes()
        if cluster:
            run_id, values = run_on_nodes(cluster, "sft", config, model, inputs, Path(sft_model.path))
        else:
            from components.sft.stage import run_sft

            run_id, values = run_sft(config, model, inputs["dataset"], inputs["base"], Path(sft_model.path))
        show_metrics(metrics, values)
        return run_id
