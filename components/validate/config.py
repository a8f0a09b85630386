"""The section `validate`."""

from typing import Literal

from pydantic import Field

from components.config.section import Probability, Section


class ValidateConfig(Section):
    """Thresholds of the data checks."""

    max_quarantined: Probability = Field(
        default=0.1,
        description="share of bad rows in a data set above which the run stops; rows that are only too long are not"
        " counted",
    )
    min_rows: int = Field(default=8, ge=1, description="usable rows that each split must have")
    near_duplicate: Probability = Field(
        default=0.8, description="Jaccard similarity of shingles from which two prompts are near-duplicates"
    )
    language_confidence: Probability = Field(
        default=0.6,
        description="probability from which the detected language of a text counts against its `lang`",
    )
    max_shortcut_accuracy: float = Field(
        default=0.6,
        ge=0.5,
        le=1,
        description="accuracy of predicting the chosen answer from length alone, or from refusals and AI disclaimers"
        " alone, above which the report warns; 0.5 is chance",
    )
    max_drift: Probability = Field(
        default=0.2,
        description="total variation distance from the previous data version (the share of rows that would have to"
        " move to another bin) above which the report warns",
    )
    decontamination_file: str = Field(
        default="decontaminate.jsonl",
        pattern=r"^([^/\\\s]+\.jsonl)?$",
        description="file beside the preference data's train.jsonl with prompts that must not appear, such as a"
        " benchmark's; `dvc repro` copies data/decontaminate.jsonl there; empty for none",
    )
    severity: dict[str, Literal["error", "stop", "warn"]] = Field(
        default={},
        description="severities that differ from those in the validate step's README, such as {email: error};"
        " error: the row is quarantined, stop: the run fails as well, warn: the report lists the row",
    )
