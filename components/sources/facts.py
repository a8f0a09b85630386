"""Resolution of the names in a configuration: data version, base model, chat template, code."""

from components.common.provenance import code_digest, git_commit
from components.config.data import DataConfig
from components.config.model import ModelSource
from components.dataset.chat import template_digest
from components.orders import Facts
from components.sources.base_model import resolve_base
from components.sources.data import data_folders, resolve_data
from components.stages import ORDERED


def resolve_facts(data: DataConfig, model: ModelSource) -> Facts:
    """Resolve everything that a run depends on except the registry's champion.

    Raises:
        InputError: a name does not resolve.
    """
    version = resolve_data(data.repo, data.revision, data_folders(data.path))
    base = resolve_base(model, data)
    preferences, instructions = data_folders(data.path)
    return Facts(
        data_repo=data.repo,
        data_path=data.path,
        data_commit=version.commit,
        preferences_digest=version.digests[preferences],
        instructions_digest=version.digests[instructions],
        data_clean=version.clean,
        test_set=version.test_set,
        base_reference=base.reference,
        base_digest=base.digest,
        template=model.chat_template,
        template_digest=template_digest(model.chat_template),
        template_date=model.template_date.isoformat(),
        git_commit=git_commit(),
        code={stage: code_digest(stage) for stage in ORDERED},
    )
