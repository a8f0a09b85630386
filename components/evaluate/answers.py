"""Answers of a model to held-out prompts: greedy, batched, with the key-value cache."""

from collections.abc import Sequence
from typing import Any

import torch

from components.common.chat import encode_prompt
from components.common.records import Preference
from components.training.models import PackedModel, plain_attention


@torch.no_grad()
def answer(model: PackedModel, tokenizer: Any, rows: Sequence[Preference], max_new_tokens: int) -> list[str]:
    """The greedy answer to the prompt of each row.

    The model attends by its plain implementation meanwhile; prompts are padded on the left, by mask and not by id.
    """
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    lm = model.causal_lm
    with plain_attention(lm, "sdpa"), model.autocast():
        output = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    # A limit can cut a character in two; its half is not part of the answer.
    return [text.strip().rstrip("\ufffd") for text in texts]
