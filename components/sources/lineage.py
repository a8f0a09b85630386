"""What decides a model's weights and its judgement: digests that are the same for runs that would give the same."""

from dataclasses import dataclass

from components.common.files import digest
from components.common.provenance import code_digest
from components.config.sections import DataConfig, ModelConfig
from components.dataset.chat import template_digest
from components.sources.base_model import BaseModel, resolve_base
from components.sources.data import DataVersion, data_folders, resolve_data


@dataclass(frozen=True)
class Key:
    """The facts of a run before it begins.

    `lineage` is the key of everything that decides the weights; `config` of all settings, judgement and format too.
    """

    data: DataVersion
    base: BaseModel
    code: dict[str, str]
    template: str
    config: str
    lineage: str


def resolve_key(
    data: DataConfig, model: ModelConfig, training: list[str | float], judging: list[str], stored: str
) -> Key:
    """Resolve what a run depends on.

    Args:
        data: repository and revision.
        model: the base model's name.
        training: every other setting that decides what is trained.
        judging: the settings of evaluate and gate.
        stored: `register.format`.

    Raises:
        InputError: a name that means nothing.
    """
    version = resolve_data(data.repo, data.revision, data_folders(data.path))
    base = resolve_base(model, data)
    code = {stage: code_digest(stage) for stage in ("fetch", "validate", "sft", "dpo", "evaluate")}
    template = template_digest(model.template)
    # A number is the same one whether JSON on its way here wrote it as 1 or as 1.0.
    numbers = [value if isinstance(value, str) else float(value) for value in training]
    config = [template, model.how(), model.max_length, *numbers]
    trained_by = {stage: value for stage, value in code.items() if stage != "evaluate"}
    lineage = digest([version.digests, base.digest, trained_by, config])[:32]
    return Key(version, base, code, template, digest([config, judging, stored])[:32], lineage)
