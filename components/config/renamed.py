"""Keys that params.yaml does not have, and what to write instead: renamed ones, and those of peft that are refused."""

RENAMED = {
    "model.template": "model.chat_template",
    "model.head_precision": "model.lm_head_precision",
    "model.tuning": "model.finetuning",
    "validate.max_shortcut": "validate.max_shortcut_accuracy",
    "validate.decontaminate": "validate.decontamination_file",
    "sft.lr": "sft.learning_rate",
    "sft.max_tokens_per_step": "sft.max_tokens_per_microbatch",
    "sft.schedule": "sft.lr_scheduler",
    "sft.loss_on": "sft.train_on_turns (`last` stays, `every` is `all` now)",
    "sft.reference_logps": "sft.compute_ref_log_probs",
    "dpo.lr": "dpo.learning_rate",
    "dpo.max_tokens_per_step": "dpo.max_tokens_per_microbatch",
    "dpo.schedule": "dpo.lr_scheduler",
    "dpo.reference": "dpo.precompute_ref_log_probs (`cached` is `true` now, `live` is `false`)",
    "dpo.loss": "dpo.loss_type",
    "dpo.orpo_weight": "dpo.orpo_lambda",
    "evaluate.bootstrap": "evaluate.bootstrap_resamples",
    "evaluate.answers": "evaluate.generations_per_language",
    "gate.max_own_loss": "gate.max_policy_loss",
    "gate.clean_data": "gate.require_committed_data",
    "cluster.s3_secret": "cluster.data_secret (resolve and fetch read data with it) and, for a state in a bucket,"
    " cluster.state_secret (sft and dpo)",
}
"""Old key -> new key, with the new values where they changed."""
REFUSED = {
    "use_dora": "DoRA rescales whole weights, which no ranks hold: SFT and DPO would not add up to one ordinary adapter"
    " whose first ranks are the SFT model; use use_rslora, a higher lora_rank, or model.finetuning=full",
    "modules_to_save": "copies of modules do not add up over SFT and DPO as ranks do, and the output layer is read past"
    " them; name linear layers of the decoder in lora_targets, or use model.finetuning=full",
}
"""Settings of peft's LoRA in `sft` and `dpo` -> why there are none, and what there is."""
