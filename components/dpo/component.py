"""KFP shell of dpo."""

from kfp import dsl

from components.common.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def dpo(
    dpo_section: str,
    epochs: float,
    lr: float,
    beta: float,
    loss: str,
    model_section: str,
    code: str,
    dataset: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    sft_model: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Align the SFT model to the preferences.

    Args:
        dpo_section: section `dpo` of params.yaml as JSON, without epochs, lr, beta and loss.
        epochs: passes over the pairs.
        lr: peak learning rate.
        beta: strength of the pull towards the reference.
        loss: preference loss.
        model_section: section `model` as JSON, without its base.
        code: digest of this step's code, for the cache.
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

    from components.config.loading import section
    from components.config.sections import DpoConfig, ModelConfig
    from components.tracking.errors import report_errors
    from components.tracking.run import show_metrics
    from components.training.train_job import run_on_nodes, several_nodes

    with report_errors("dpo"):
        config = section(DpoConfig, dpo_section, epochs=epochs, lr=lr, beta=beta, loss=loss)
        model = section(ModelConfig, model_section, base=base.metadata.get("reference", "base"))
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
