"""KFP shell of dpo."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def dpo(
    order: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    sft_model: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Align the SFT model to the preferences.

    Args:
        order: what this step depends on, from `resolve`: the section `dpo`, how the model is run and the
            digest of its code.
        dataset: The clean data set.
        base: The base model.
        sft_model: The SFT model.
        policy: The aligned model: `adapter/` (SFT and DPO as one ordinary peft adapter; not after full fine-tuning),
            `model/` (merged, fp32), history.jsonl, training.json, manifest.json.
        metrics: Loss, margin, accuracy and rewards on the validation pairs.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.config.loading import validated
    from components.config.model import ExecutionConfig
    from components.dpo.config import DpoConfig
    from components.orders import read_order
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics
    from components.training.train_job import run_on_nodes, several_nodes

    with report_errors("dpo"):
        sections = read_order(order).sections
        config = validated(DpoConfig, sections["dpo"], "dpo")
        model = validated(ExecutionConfig, sections["model"], "model")
        inputs = {"dataset": Path(dataset.path), "base": Path(base.path), "sft-model": Path(sft_model.path)}
        cluster = several_nodes()
        if cluster:
            run_id, values = run_on_nodes(cluster, "dpo", config, model, inputs, Path(policy.path))
        else:
            from components.dpo.stage import run_dpo

            run_id, values = run_dpo(
                config, model, inputs["dataset"], inputs["base"], inputs["sft-model"], Path(policy.path)
            )
        show_metrics(metrics, values)
        return run_id
