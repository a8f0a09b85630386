"""KFP shell of fetch."""

from kfp import dsl

from components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def fetch(
    order: str,
    dataset: dsl.Output[dsl.Dataset],
    base: dsl.Output[dsl.Model],
) -> str:
    """Bring the resolved data set and base model here, checked against their digests.

    Args:
        order: what this step depends on, from `resolve`: digests of data, base model and chat template, where
            they are, and the digest of its code.
        dataset: The data set: preferences/ and instructions/.
        base: The base model's folder: safetensors, tokenizer, one chat template, manifest.json.

    Returns:
        Id of the MLflow run.
    """
    from datetime import date
    from pathlib import Path

    from components.config.data import DataConfig
    from components.fetch.stage import run_fetch
    from components.orders import read_order
    from components.sources.data import data_folders
    from components.tracking.errors import report_errors

    with report_errors("fetch"):
        given = read_order(order)
        facts, origin = given.facts, given.origin
        preferences, instructions = data_folders(origin["data_path"])
        digests = {preferences: facts["preferences_digest"], instructions: facts["instructions_digest"]}
        dataset.metadata.update({"data_commit": origin["data_commit"], **digests})
        base.metadata.update({"reference": origin["base_reference"], "digest": facts["base_digest"]})
        return run_fetch(
            DataConfig(repo=origin["data_repo"], path=origin["data_path"], revision=origin["data_commit"]),
            digests,
            origin["template"],
            date.fromisoformat(facts["template_date"]),
            origin["base_reference"],
            facts["base_digest"],
            Path(dataset.path),
            Path(base.path),
        )
