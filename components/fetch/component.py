"""KFP shell of fetch."""

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def fetch(
    data_section: str,
    data_commit: str,
    preferences_digest: str,
    instructions_digest: str,
    model_section: str,
    base_reference: str,
    base_digest: str,
    template_digest: str,
    code: str,
    dataset: dsl.Output[dsl.Dataset],
    base: dsl.Output[dsl.Model],
) -> str:
    """Bring the resolved data set and base model here, checked against their digests.

    Args:
        data_section: section `data` of params.yaml as JSON, without its revision.
        data_commit: commit of the data, or `workspace`.
        preferences_digest: DVC digest of the preference pairs.
        instructions_digest: DVC digest of the instructions.
        model_section: section `model` as JSON, without its base.
        base_reference: definite name of the base model.
        base_digest: its digest.
        template_digest: digest of the chat template, for the cache.
        code: digest of this step's code, for the cache.
        dataset: The data set: preferences/ and instructions/.
        base: The base model's folder: safetensors, tokenizer, one chat template, manifest.json.

    Returns:
        Id of the MLflow run.
    """
    from pathlib import Path

    from components.config.loading import section
    from components.config.sections import DataConfig, ModelConfig
    from components.fetch.stage import run_fetch
    from components.sources.data import data_folders
    from components.tracking.errors import report_errors

    with report_errors("fetch"):
        data = section(DataConfig, data_section, revision=data_commit)
        digests = dict(zip(data_folders(data.path), (preferences_digest, instructions_digest), strict=True))
        dataset.metadata.update({"data_commit": data_commit, **digests})
        base.metadata.update({"reference": base_reference, "digest": base_digest})
        return run_fetch(
            data,
            digests,
            section(ModelConfig, model_section, base=base_reference),
            base_reference,
            base_digest,
            Path(dataset.path),
            Path(base.path),
        )
