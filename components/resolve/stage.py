"""Turn names into facts before anything else runs: data version, base model, code, incumbent champion.

Never cached. Every later task takes what it depends on from here as parameters, so that the cache cannot serve it a
stale result (DESIGN, decision 2).
"""

from typing import NamedTuple

from components.common import tracking
from components.common.chat import template_digest
from components.common.config import DataConfig, ModelConfig, RegisterConfig
from components.common.files import digest
from components.common.identity import code_digest, git_commit
from components.resolve.base import resolve_base
from components.resolve.data import resolve_data

CHAMPION = "champion"


class Resolved(NamedTuple):
    """The facts of a run. Digests of folders are DVC's, the others are sha256.

    `lineage` is the key of everything that decides the weights; `config` of all settings, those of the judgement too.
    """

    data_commit: str
    preferences_digest: str
    instructions_digest: str
    base_reference: str
    base_digest: str
    git_commit: str
    code_fetch: str
    code_validate: str
    code_sft: str
    code_dpo: str
    code_evaluate: str
    template_digest: str
    config: str
    lineage: str
    incumbent: str
    run_id: str


def run_resolve(
    data: DataConfig, model: ModelConfig, register: RegisterConfig, training: list[str | float], judging: list[str]
) -> Resolved:
    """Resolve a run's names.

    Args:
        data: repository and revision.
        model: the base model's name.
        register: the registered model whose champion is the incumbent.
        training: every other setting that decides what is trained.
        judging: the settings of evaluate and gate.

    Raises:
        InputError: a name that means nothing.
    """
    with tracking.stage_run(
        "resolve", {"data_repo": tracking.without_credentials(data.repo), "data_revision": data.revision}
    ) as run:
        version = resolve_data(data.repo, data.revision)
        base = resolve_base(model, data)
        code = {stage: code_digest(stage) for stage in ("fetch", "validate", "sft", "dpo", "evaluate")}
        template = template_digest(model.template)
        config = [template, model.how(), model.max_length, *training]
        trained_by = {stage: value for stage, value in code.items() if stage != "evaluate"}
        lineage = digest([version.digests, base.digest, trained_by, config])[:32]
        facts = Resolved(
            data_commit=version.commit,
            preferences_digest=version.digests["data/preferences"],
            instructions_digest=version.digests["data/instructions"],
            base_reference=base.reference,
            base_digest=base.digest,
            git_commit=git_commit(),
            **{f"code_{stage}": value for stage, value in code.items()},
            template_digest=template,
            config=digest([config, judging])[:32],
            lineage=lineage,
            incumbent=_incumbent(register.name, lineage),
            run_id=run.run_id,
        )
        run.log_params(facts._asdict())
        run.say(f"data {version.commit[:12]}, base model {base.reference}, incumbent {facts.incumbent or 'none'}")
        return facts


def _incumbent(name: str, lineage: str) -> str:
    """The version to beat, as models:/name/version, or nothing before the first champion.

    When the champion is what this very lineage once made, the run repeats that one, and so has the same incumbent.
    """
    from mlflow.exceptions import MlflowException

    client = tracking.client()
    # A server with users answers 403 when asked for the alias of a model that is not there; a search is let through.
    if not client.search_registered_models(f"name = '{name}'"):
        return ""
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return ""
        raise
    if champion.tags.get("kubealign.lineage") == lineage:
        return str(champion.tags.get("kubealign.incumbent", ""))
    return f"models:/{name}/{champion.version}"
