"""Turn names into facts before anything else runs: data version, base model, code, incumbent champion.

Never cached. Every later task takes what it depends on from here as parameters, so that the cache cannot serve it a
stale result.
"""

from typing import Any, NamedTuple

import yaml

from components.common.errors import InputError
from components.common.files import digest
from components.common.provenance import git_commit
from components.config.sections import DataConfig, ModelConfig, RegisterConfig
from components.registry.audit import Audit, next_use
from components.registry.champion import champion_alias, reconcile_alias
from components.sources.data import data_folders
from components.sources.lineage import resolve_key
from components.tracking import store
from components.tracking.run import SETTINGS, StageRun, stage_run


class Resolved(NamedTuple):
    """The facts of a run. Digests of folders are DVC's, the others are sha256.

    `lineage` is the key of everything that decides the weights; `config` of all settings, those of the judgement too.
    `decision` is the key of what will be asked of the test set, and `test_use` its number among all that were asked.
    """

    data_commit: str
    preferences_digest: str
    instructions_digest: str
    data_clean: bool
    test_set: str
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
    decision: str
    test_use: int
    run_id: str


def run_resolve(
    data: DataConfig,
    model: ModelConfig,
    register: RegisterConfig,
    training: list[str | float],
    judging: list[str],
    settings: dict[str, Any],
) -> Resolved:
    """Resolve a run's names.

    Args:
        data: repository and revision.
        model: the base model's name.
        register: the registered model whose champion is the incumbent.
        training: every other setting that decides what is trained.
        judging: the settings of evaluate and gate.
        settings: all sections, as they can be run again.

    Raises:
        InputError: a name that means nothing, or a format that the model cannot be stored in.
    """
    if register.format == "adapter" and model.tuning == "full":
        raise InputError("register.format=adapter: full fine-tuning makes no adapter; set register.format=merged")
    named = {
        "data_repo": store.without_credentials(data.repo),
        "data_revision": data.revision,
        "data_path": data.path,
    }
    with stage_run("resolve", named) as run:
        key = resolve_key(data, model, training, judging, register.format)
        version, base, lineage = key.data, key.base, key.lineage
        preferences, instructions = data_folders(data.path)
        incumbent = _incumbent(run, register.name, lineage)
        decision = digest([lineage, incumbent, judging])[:32]
        facts = Resolved(
            data_commit=version.commit,
            preferences_digest=version.digests[preferences],
            instructions_digest=version.digests[instructions],
            data_clean=version.clean,
            test_set=version.test_set,
            base_reference=base.reference,
            base_digest=base.digest,
            git_commit=git_commit(),
            **{f"code_{stage}": value for stage, value in key.code.items()},
            template_digest=key.template,
            config=key.config,
            lineage=lineage,
            incumbent=incumbent,
            decision=decision,
            test_use=_test_use(run.client, register.name, version.test_set, decision),
            run_id=run.run_id,
        )
        run.log_params(facts._asdict())
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        run.client.log_text(run.run_id, store.without_credentials(text), SETTINGS)
        run.log(f"data {version.commit[:12]}, base model {base.reference}, incumbent {facts.incumbent or 'none'}")
        if facts.test_use > 1:
            run.log(f"this will be decision {facts.test_use} on the test set; the gate's level follows")
        return facts


def _incumbent(run: StageRun, name: str, lineage: str) -> str:
    """The version to beat, as models:/name/version, or nothing before the first champion.

    When the champion is what this very lineage once made, the run repeats that one, and so has the same incumbent.
    """
    audit = Audit.find(run.client, name)
    if audit:
        reconcile_alias(audit)
    version = champion_alias(run.client, name)
    if not version:
        return ""
    tags = run.client.get_model_version(name, version).tags
    if tags.get("kubealign.lineage") == lineage:
        return str(tags.get("kubealign.incumbent", ""))
    return f"models:/{name}/{version}"


def _test_use(client: Any, name: str, test_set: str, decision: str) -> int:
    audit = Audit.find(client, name)
    return next_use(audit.decisions(test_set), decision) if audit else 1
