"""The stages of the pipeline, in the order in which they run."""

STAGES = ("resolve", "fetch", "validate", "sft", "dpo", "evaluate", "register")
