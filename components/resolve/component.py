"""KFP shell of resolve."""

from typing import NamedTuple

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def resolve(
    data_revision: str,
    base_model: str,
    sft_epochs: float,
    sft_learning_rate: float,
    dpo_epochs: float,
    dpo_learning_rate: float,
    dpo_beta: float,
    dpo_loss_type: str,
    promote: bool,
    data_section: str,
    model_section: str,
    validate_section: str,
    sft_section: str,
    dpo_section: str,
    evaluate_section: str,
    gate_section: str,
    register_section: str,
    project_commit: str,
) -> NamedTuple(
    "Resolved",
    [
        ("order_fetch", str),
        ("order_validate", str),
        ("order_sft", str),
        ("order_dpo", str),
        ("order_evaluate", str),
        ("order_register", str),
        ("run_id", str),
    ],
):
    """Turn names into facts, and tell every later step what it depends on: its order. Never cached.

    Args:
        data_revision: Branch, tag or commit of the data; `workspace` for local files as they are.
        base_model: Base model: `embedded`, a folder, s3://, models:/ or a hub id.
        sft_epochs: Passes over the instructions; 0 for none.
        sft_learning_rate: Peak learning rate of SFT.
        dpo_epochs: Passes over the preference pairs; 0 for none.
        dpo_learning_rate: Peak learning rate of DPO.
        dpo_beta: Strength of the pull towards the reference.
        dpo_loss_type: Preference loss.
        promote: Whether a passed gate makes the model the champion.
        data_section: Section `data` of params.yaml as JSON, without the fields above.
        model_section: Section `model`, likewise; its `hardware` says what the run is for.
        validate_section: Section `validate`.
        sft_section: Section `sft`, without the fields above.
        dpo_section: Section `dpo`, likewise.
        evaluate_section: Section `evaluate`.
        gate_section: Section `gate`.
        register_section: Section `register`, without promote.
        project_commit: Commit of the project that `kubealign ci retrain` has judged by this run; otherwise empty.

    Returns:
        order_fetch: order of fetch: all that it depends on, as JSON.
        order_validate: likewise of validate.
        order_sft: likewise of sft.
        order_dpo: likewise of dpo.
        order_evaluate: likewise of evaluate.
        order_register: likewise of register.
        run_id: id of the MLflow run.
    """
    given = dict(locals())

    from components.config.params import config_from_arguments
    from components.resolve.stage import run_resolve
    from components.tracking.errors import report_errors

    with report_errors("resolve"):
        orders, run_id = run_resolve(config_from_arguments(given), project_commit)
        return (*orders.values(), run_id)
