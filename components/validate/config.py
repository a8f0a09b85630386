"""The section `validate`."""

from typing import Literal

from pydantic import Field

from components.config.section import Probability, Section


class ValidateConfig(Section):
    """When data is too bad to train on."""

    max_quarantined: Probability = Field(
        default=0.1,
        description="share of bad rows in a data set above which the run stops; those just too long do not count",
    )
    min_rows: int = Field(default=8, ge=1, description="usable rows that each split needs")
    near_duplicate: Probability = Field(
        default=0.8, description="Jaccard similarity of shingles from which two prompts are near"
    )
    language_confidence: Probability = Field(
        default=0.6,
        description="probability from which the language that a text seems to be written in counts against `lang`",
    )
    max_shortcut_accuracy: float = Field(
        default=0.6,
        ge=0.5,
        le=1,
        description="accuracy from which a warning says that length alone, or refusals and AI disclaimers alone, tell"
        " the chosen answer; 0.5 is chance",
    )
    max_drift: Probability = Field(
        default=0.2,
        description="share of the rows that would have to change places to have the distribution of the data version"
        " before, from which a warning says so",
    )
    decontamination_file: str = Field(
        default="decontaminate.jsonl",
        pattern=r"^([^/\\\s]+\.jsonl)?$",
        description="file of the preference data, beside train.jsonl, with prompts that must not appear, such as a"
        " benchmark's; `dvc repro` copies data/decontaminate.jsonl there; empty for none",
    )
    severity: dict[str, Literal["error", "stop", "warn"]] = Field(
        default={},
        description="checks that are taken more or less seriously than the validate step's README says, such as"
        " {email: error}; error: the row is quarantined, stop: the run fails, warn: the report says so",
    )
