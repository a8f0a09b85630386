"""params.yaml as one typed configuration, and its form as arguments of a pipeline run: form fields and JSON sections.

The settings that people change most are typed fields of the run form (FORM_FIELDS); they are left out of their
section's JSON, and `config_from_arguments` puts them back.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from components.common.errors import InputError
from components.config.cluster import ClusterConfig
from components.config.data import DataConfig
from components.config.gate import GateConfig
from components.config.loading import keys, validated
from components.config.model import ModelConfig
from components.config.section import Section
from components.dataset.chat import read_template
from components.dpo.config import DpoConfig
from components.evaluate.config import EvaluateConfig
from components.prepare.config import PrepareConfig
from components.register.config import RegisterConfig
from components.sft.config import SftConfig
from components.validate.config import ValidateConfig

PARAMS = "params.yaml"
FORM_FIELDS: dict[str, tuple[str, str]] = {
    "data_revision": ("data", "revision"),
    "base_model": ("model", "base"),
    "sft_epochs": ("sft", "epochs"),
    "sft_learning_rate": ("sft", "learning_rate"),
    "dpo_epochs": ("dpo", "epochs"),
    "dpo_learning_rate": ("dpo", "learning_rate"),
    "dpo_beta": ("dpo", "beta"),
    "dpo_loss_type": ("dpo", "loss_type"),
    "promote": ("register", "promote"),
}
"""Typed fields of the pipeline's run form: name -> (section, key)."""
SECTION_SUFFIX = "_section"
"""Suffix of a run parameter that holds a section as JSON."""


class Config(Section):
    """All of params.yaml; omitted fields have their defaults."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prepare: PrepareConfig = PrepareConfig()
    validate_: ValidateConfig = Field(default=ValidateConfig(), alias="validate")
    sft: SftConfig = SftConfig()
    dpo: DpoConfig = DpoConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    register_: RegisterConfig = Field(default=RegisterConfig(), alias="register")
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.sft.epochs == 0 and self.dpo.epochs == 0:
            raise ValueError("sft.epochs and dpo.epochs are both 0, which trains nothing; set one of them above 0")
        return self

    @model_validator(mode="after")
    def _adapters_belong_to_their_base(self) -> Self:
        if self.register_.format == "adapter" and self.model.quantization != "none":
            raise ValueError(
                "register.format=adapter with model.quantization=nf4: the adapter belongs to the 4-bit base, and"
                " readers would put it on the full one, which nobody judged; set register.format=merged"
            )
        return self

    def sections(self) -> dict[str, dict[str, Any]]:
        """The configuration as plain values, with the keys of params.yaml."""
        return self.model_dump(by_alias=True, mode="json")


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read params.yaml and apply `section.key=value` overrides.

    A chat template that is given as a file is read here, once: steps get its text, and read no file by name.

    Raises:
        InputError: the file or an override is wrong; the message names the key and the nearest valid one.
    """
    raw = _read(path)
    for override in overrides or []:
        _override(raw, override)
    config = validated(Config, raw, str(path))
    template = read_template(config.model.chat_template, path.parent)
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_template": template})})


def pipeline_arguments(config: Config, project_commit: str = "") -> dict[str, Any]:
    """The arguments of a pipeline run: each form field, and each section as JSON text without its form fields.

    Args:
        config: the whole configuration.
        project_commit: the commit that the run judges, if it is made of that and nothing else.
    """
    sections = config.sections()
    form = {name: sections[name_of].pop(key) for name, (name_of, key) in FORM_FIELDS.items()}
    names = [name for name in sections if name not in ("prepare", "cluster")]
    texts = {f"{name}{SECTION_SUFFIX}": json.dumps(sections[name], sort_keys=True) for name in names}
    return form | texts | {"project_commit": project_commit}


def config_from_arguments(arguments: Mapping[str, Any]) -> Config:
    """The configuration of a run from its arguments, which come from `pipeline_arguments` or an edited run form.

    Raises:
        InputError: a field is set both in a section's JSON and on the form, or a value is wrong.
    """
    raw = {name.removesuffix(SECTION_SUFFIX): _parsed(name, text) for name, text in _sections_of(arguments).items()}
    for name, (section, key) in FORM_FIELDS.items():
        if key in raw[section]:
            raise InputError(f"{section}.{key} is the form field {name}; remove it from {section}{SECTION_SUFFIX}")
        raw[section][key] = arguments[name]
    return validated(Config, raw, "the run")


def _sections_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name, text in arguments.items() if name.endswith(SECTION_SUFFIX)}


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: not found; run this in the project's folder, or name that folder with --project"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected sections ({', '.join(keys(Config))}), found {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    name, _, field = key.strip().partition(".")
    if not equals or not field:
        raise InputError(f"--set {override}: expected section.key=value, such as dpo.beta=0.2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: {text!r} is not a YAML value") from error
    *parents, last = [name, *field.split(".")]
    target: Any = raw
    default: Any = _defaults()
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else target
        default = default.get(parent) if isinstance(default, dict) else None
    if not isinstance(target, dict):
        raise InputError(f"--set {override}: {key} is not inside a section")
    old = default.get(last) if isinstance(default, dict) else None
    target[last] = _like(target.get(last, old), value, text)


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    return Config().sections()


def _like(old: Any, value: Any, text: str) -> Any:
    """The new value with the old one's type: a tag 1.2 stays text, and 5e-7, text in YAML 1.1, becomes a number."""
    if isinstance(old, str) and not isinstance(value, str):
        return text
    if isinstance(old, int | float) and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
