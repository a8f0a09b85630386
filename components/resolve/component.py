"""KFP shell of resolve."""

from typing import NamedTuple

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def resolve(
    data_section: str,
    data_revision: str,
    model_section: str,
    base_model: str,
    register_section: str,
    promote: bool,
    validate_section: str,
    sft_section: str,
    sft_epochs: float,
    sft_lr: float,
    dpo_section: str,
    dpo_epochs: float,
    dpo_lr: float,
    dpo_beta: float,
    dpo_loss: str,
    evaluate_section: str,
    gate_section: str,
) -> NamedTuple(
    "Resolved",
    [
        ("data_commit", str),
        ("preferences_digest", str),
        ("instructions_digest", str),
        ("data_clean", bool),
        ("test_set", str),
        ("base_reference", str),
        ("base_digest", str),
        ("git_commit", str),
        ("code_fetch", str),
        ("code_validate", str),
        ("code_sft", str),
        ("code_dpo", str),
        ("code_evaluate", str),
        ("template_digest", str),
        ("config", str),
        ("lineage", str),
        ("incumbent", str),
        ("decision", str),
        ("test_use", int),
        ("run_id", str),
    ],
):
    """Turn names into facts: data version, base model, code, incumbent champion. Never cached.

    Args:
        data_section: section `data` of params.yaml as JSON, without its revision.
        data_revision: branch, tag, commit, or `workspace`.
        model_section: section `model` as JSON, without its base.
        base_model: name of the base model.
        register_section: section `register` as JSON, without promote.
        promote: whether a passed gate promotes.
        validate_section: section `validate` as JSON.
        sft_section: section `sft` as JSON, without epochs and lr.
        sft_epochs: passes over the instructions.
        sft_lr: peak learning rate of sft.
        dpo_section: section `dpo` as JSON, without epochs, lr, beta and loss.
        dpo_epochs: passes over the pairs.
        dpo_lr: peak learning rate of dpo.
        dpo_beta: strength of the pull towards the reference.
        dpo_loss: preference loss.
        evaluate_section: section `evaluate` as JSON.
        gate_section: section `gate` as JSON.

    Returns:
        data_commit: commit of the data, or `workspace`.
        preferences_digest: DVC digest of the preference pairs.
        instructions_digest: DVC digest of the instructions.
        data_clean: whether a commit records just this data.
        test_set: md5 of the test side's pairs.
        base_reference: definite name of the base model.
        base_digest: its digest.
        git_commit: commit of the code.
        code_fetch: digest of the code of fetch.
        code_validate: digest of the code of validate.
        code_sft: digest of the code of sft.
        code_dpo: digest of the code of dpo.
        code_evaluate: digest of the code of evaluate.
        template_digest: digest of the chat template.
        config: digest of all settings, those of the judgement too.
        lineage: key of everything that decides the weights.
        incumbent: the champion to beat as models:/name/version; empty before the first one.
        decision: key of what will be asked of the test set.
        test_use: its number among the decisions on this test set, from 1.
        run_id: id of the MLflow run.
    """
    import json

    from components.config.loading import section
    from components.config.sections import DataConfig, ModelConfig, RegisterConfig
    from components.resolve.stage import run_resolve
    from components.tracking.errors import report_errors

    with report_errors("resolve"):
        settings = {
            "data": json.loads(data_section) | {"revision": data_revision},
            "model": json.loads(model_section) | {"base": base_model},
            "validate": json.loads(validate_section),
            "sft": json.loads(sft_section) | {"epochs": sft_epochs, "lr": sft_lr},
            "dpo": json.loads(dpo_section) | {"epochs": dpo_epochs, "lr": dpo_lr, "beta": dpo_beta, "loss": dpo_loss},
            "evaluate": json.loads(evaluate_section),
            "gate": json.loads(gate_section),
            "register": json.loads(register_section) | {"promote": promote},
        }
        training: list[str | float] = [validate_section, sft_section, sft_epochs, sft_lr]
        training += [dpo_section, dpo_epochs, dpo_lr, dpo_beta, dpo_loss]
        return run_resolve(
            section(DataConfig, data_section, revision=data_revision),
            section(ModelConfig, model_section, base=base_model),
            section(RegisterConfig, register_section, promote=promote),
            training,
            [evaluate_section, gate_section],
            settings,
        )
