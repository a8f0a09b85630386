"""Token counts of rows, and whether a row's answers differ as tokens; most rows need no tokenization.

A byte-level BPE tokenizer is lossless and emits at most one token per byte. So a row with no more bytes than the limit
fits, and answers that differ as text differ as tokens; only the remaining rows are tokenized.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.dataset.chat import REFUSALS, encode, encode_many, render_limit
from components.dataset.records import Message

PROBE = "\u241f"
"""A character that no chat template emits by itself."""
BATCH = 256
"""Rows that are rendered and tokenized at once; a few MB of ids."""


class TokenCounter:
    """Counts the tokens of rows with a model's tokenizer and chat template.

    Raises:
        InputError: the template cannot be used for training; `encode` says why.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        encode(tokenizer, [Message(role="user", content="Why?")], "Because.")
        self.lossless = _is_byte_level(tokenizer)
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))
        self._overhead = cache(self._find_overhead)

    def count(
        self, prompts: Sequence[list[dict[str, str]]], answers: Sequence[tuple[str, ...]]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Tokens of each row's prompt and longest answer, and whether its two answers are the same tokens.

        Returns:
            [n] tokens: exact, or an upper bound that is within `max_length`; -1 where the template rejects the row.
            [n] 1 where the answers are the same tokens.
        """
        tokens = np.full(len(prompts), -1, np.int32)
        same = np.zeros(len(prompts), np.uint8)
        uncertain_rows = []
        for row, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
            bound = self._bound(prompt, texts)
            if bound is not None and bound <= self.max_length and len(set(texts)) == len(texts):
                tokens[row] = bound
            else:
                uncertain_rows.append(row)
        for start in range(0, len(uncertain_rows), BATCH):
            batch = uncertain_rows[start : start + BATCH]
            encoded = encode_many(self.tokenizer, [prompts[row] for row in batch], [answers[row] for row in batch])
            for row, ids in zip(batch, encoded, strict=True):
                if ids is not None:
                    prompt_ids, completions = ids
                    tokens[row] = len(prompt_ids) + max(map(len, completions))
                    same[row] = len(completions) > 1 and completions[0] == completions[1]
        return tokens, same

    def _bound(self, prompt: list[dict[str, str]], answers: tuple[str, ...]) -> int | None:
        if not self.lossless:
            return None
        overhead = self._overhead(tuple([turn["role"] for turn in prompt]))
        if overhead is None:
            return None
        texts = [turn["content"] for turn in prompt] + [max(answers, key=len)]
        size = sum(map(len, texts))
        if size > self.max_length:
            return size
        size = sum([_size(turn["content"]) for turn in prompt]) + max([_size(answer) for answer in answers])
        return size + overhead

    def _find_overhead(self, roles: tuple[str, ...]) -> int | None:
        """Upper bound of the tokens that the template adds to the bytes of a conversation; None where it rejects the
        roles, or repeats a text, so that the total size does not follow from the sizes of the texts.

        Special tokens split the text before any merge. So a piece between two of them that holds no text of the row is
        counted exactly; in the other pieces every byte counts as a token.
        """
        overheads = []
        for length in (1, 33):
            probe = PROBE * length
            conversation = [{"role": role, "content": probe} for role in (*roles, "assistant")]
            try:
                with render_limit(1):
                    text: str = self.tokenizer.apply_chat_template(conversation, tokenize=False)
            except REFUSALS:
                return None
            pieces = self.special.split(text)
            fixed = [piece for piece in pieces if piece and PROBE not in piece]
            size = len(pieces) - 1 + sum(_size(piece) for piece in pieces if PROBE in piece)
            size += sum(len(self.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in fixed)
            overheads.append(size - _size(probe) * len(conversation))
        return overheads[0] if overheads[0] == overheads[1] else None


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer is a byte-level BPE that leaves the text unchanged before splitting it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    splitter = parts["pre_tokenizer"] or {}
    splitters = splitter.get("pretokenizers", [splitter])
    levels = [part for part in splitters if part.get("type") == "ByteLevel"]
    return (
        parts["model"]["type"] == "BPE"
        and parts["normalizer"] is None
        and len(levels) == 1
        and not levels[0]["add_prefix_space"]
    )
