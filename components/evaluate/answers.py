"""A model's greedy and sampled answers to the fixed prompts, batched with the key-value cache, and their metrics.

Both kinds of answer are generated in one batch; one at a time where a batch changes what a model says, as padding does
in RWKV's state. Samples are drawn at temperature 1 from the full distribution, so the KL can
be estimated on them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from typing_extensions import TypedDict

from components.common.documents import read_document
from components.common.errors import InputError
from components.common.files import digest, write_json
from components.common.provenance import modules_digest
from components.dataset.chat import encode_prompt, end_of_answer
from components.dataset.language import count_han, count_latin_words, is_refusal
from components.dataset.records import LANGUAGES, Preference
from components.engine.models import PackedModel, batch_matters, plain_attention
from components.gate.results import Estimate, Generation, Metrics
from components.gate.statistics import Floats, GroupBootstrap
from components.tracking import store
from components.tracking.keys import is_sealed, seal
from components.tracking.run import StageRun

BATCH_PROMPTS = 8
REPEATED_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """A generated answer: tokens, including the end of sequence if it was reached, and text."""

    tokens: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Answers:
    """One greedy and one sampled answer to each prompt."""

    greedy: list[Answer]
    sampled: list[Answer]


class _CachedAnswers(TypedDict):
    """A cache file: the answers, and this pipeline's seal over them and their key."""

    seal: str
    answers: Answers


def fixed_prompts(rows: Sequence[Preference], per_language: int) -> list[Preference]:
    """The rows whose prompts are answered: the first of each language by id, which is a hash, one from each group."""
    chosen = []
    for lang in LANGUAGES:
        groups: dict[str, Preference] = {}
        for row in sorted((row for row in rows if row.lang == lang), key=lambda row: row.id):
            groups.setdefault(row.group, row)
        chosen += list(groups.values())[:per_language]
    return chosen


def answer(
    run: StageRun,
    open_model: Callable[[], PackedModel],
    cache_key_parts: Sequence[Any],
    tokenizer: Any,
    rows: Sequence[Preference],
    max_new_tokens: int,
    seed: int,
    what: str,
) -> Answers:
    """A greedy and a sampled answer to the prompt of each row, from the cache or by running the model.

    Args:
        run: reports progress.
        open_model: loads the model; not called if its answers are cached.
        cache_key_parts: everything that identifies the model and how it is run.
        tokenizer: the model's tokenizer.
        rows: rows with the prompts.
        max_new_tokens: most tokens of an answer.
        seed: random seed of the samples.
        what: name of the model, for the progress line.
    """
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    key = digest([list(cache_key_parts), prompts, max_new_tokens, seed, modules_digest("components.evaluate.answers")])
    path = store.home() / "cache" / "answers" / f"{key}.json"
    cached = _load(path, len(rows))
    if cached is not None:
        run.log(f"answers of {what}: {len(rows)} prompts from the cache")
        return cached
    both: list[Answer] = [Answer([], "", False)] * (2 * len(rows))
    model = open_model()
    longest = max(map(len, prompts)) + max_new_tokens
    together = not batch_matters(model, _padding(tokenizer), longest)
    if not together:
        run.log(f"the answers of {what} would depend on the other prompts of a batch: they are made one at a time")
    batches = _batches([len(prompt) for prompt in prompts], together)
    for batch_index, batch in enumerate(batches):

        def progress(step: int, before: int = batch_index * max_new_tokens) -> None:
            run.progress(before + step, len(batches) * max_new_tokens, f"answers of {what}")

        asked, n_greedy = [prompts[place % len(rows)] for place in batch], sum(place < len(rows) for place in batch)
        texts = _generate(model, tokenizer, asked, n_greedy, max_new_tokens, seed + batch_index, progress)
        for place, text in zip(batch, texts, strict=True):
            both[place] = text
    answers = Answers(both[: len(rows)], both[len(rows) :])
    write_json(path, {"seal": seal(path.name, _bytes(answers)), "answers": asdict(answers)})
    return answers


def _batches(lengths: Sequence[int], together: bool) -> list[list[int]]:
    """The answers that are made at a time: of N prompts the greedy ones are 0 to N - 1, the sampled ones N to 2 N - 1.

    Args:
        lengths: tokens of each prompt.
        together: whether several may be.
    """
    n = len(lengths)
    shortest_first = sorted(range(n), key=lengths.__getitem__)
    if not together:
        return [[place + index] for place in (0, n) for index in shortest_first]
    batches = (shortest_first[first : first + BATCH_PROMPTS] for first in range(0, n, BATCH_PROMPTS))
    return [[*batch, *(n + index for index in batch)] for batch in batches]


def _padding(tokenizer: Any) -> int:
    """Token id that stands before shorter prompts of a batch."""
    return int(end_of_answer(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _load(path: Path, n: int) -> Answers | None:
    """Cached answers to `n` prompts; None if there are none, or the file is damaged or not ours."""
    try:
        cached = read_document(path, _CachedAnswers)
    except InputError:
        return None
    answers = cached["answers"]
    return answers if is_sealed(path.name, _bytes(answers), cached["seal"]) and len(answers.greedy) == n else None


def _bytes(answers: Answers) -> bytes:
    return digest(asdict(answers)).encode()


class _FirstRowsGreedy(LogitsProcessor):  # type: ignore[misc]
    """Masks all but the likeliest token in the first rows of the batch, so sampling is greedy; reports progress."""

    def __init__(self, n_greedy: int, progress: Callable[[int], None]) -> None:
        self._n_greedy, self._progress, self._step = n_greedy, progress, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._step += 1
        self._progress(self._step)
        first = scores[: self._n_greedy]
        best = first.argmax(dim=-1, keepdim=True)
        scores = scores.clone()
        scores[: self._n_greedy] = first.new_full(first.shape, -math.inf).scatter(1, best, 0.0)
        return scores


@torch.no_grad()
def _generate(
    model: PackedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    n_greedy: int,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """Greedy answers to the first prompts, sampled ones to the others.

    The model runs with its plain attention; prompts are left-padded and masked.
    """
    width = max(map(len, prompts))
    end, padding = end_of_answer(tokenizer), _padding(tokenizer)
    ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    lm = model.causal_lm
    generation_config, lm.generation_config = lm.generation_config, GenerationConfig()  # without the model's penalties
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with plain_attention(lm, "sdpa"), model.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            output = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                logits_processor=LogitsProcessorList([_FirstRowsGreedy(n_greedy, progress)]),
                pad_token_id=padding,
                eos_token_id=end,
            )
    finally:
        lm.generation_config = generation_config
    return [_truncate_at_end(tokenizer, end, row) for row in output[:, width:].tolist()]


def _truncate_at_end(tokenizer: Any, end: int, tokens: list[int]) -> Answer:
    finished = end in tokens
    if finished:
        tokens = tokens[: tokens.index(end) + 1]
    # The token limit can split a character; its first half is not part of the answer.
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")
    return Answer(tokens, text, finished)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the answer's 4-grams that already occurred in it; 0 for an answer without a 4-gram.

    Source: seq-rep-n of "Neural text generation with unlikelihood training", arXiv 1908.04319, section 5.
    """
    runs = list(zip(*(tokens[start:] for start in range(REPEATED_TOKENS)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def speaks(text: str, lang: str) -> bool:
    """Whether a text is in the language, by counting Chinese characters and Latin words; True if it has neither."""
    han, latin = count_han(text), count_latin_words(text)
    return han >= latin if lang == "zh" else latin >= han


def measure(bootstrap: GroupBootstrap, answers: Sequence[Answer], langs: Sequence[str]) -> Metrics:
    """Metrics of greedy or sampled answers, as in results.Generation; a share over no answers is left out."""
    nonempty = np.array([bool(answer.text) for answer in answers], dtype=np.float64)
    ones = np.ones_like(nonempty)
    match = [speaks(answer.text, lang) for answer, lang in zip(answers, langs, strict=True)]
    columns = {
        "tokens": (lengths(answers), ones),
        "repetition": (np.array([repetition(answer.tokens) for answer in answers]), ones),
        "language_match": (nonempty * np.array(match), nonempty),
        "refusal": (np.array([float(is_refusal(answer.text)) for answer in answers]), ones),
        "empty": (1.0 - nonempty, ones),
        "unfinished": (np.array([float(not answer.finished) for answer in answers]), ones),
    }
    return bootstrap.table(columns, {"": ones.astype(bool)})[""]


def generation(
    bootstrap: GroupBootstrap,
    answers: Answers,
    langs: Sequence[str],
    sft_answers: Answers | None,
    kl: Floats | None,
) -> Generation:
    """Metrics of a model's answers.

    Args:
        bootstrap: resamples the groups of the prompts.
        answers: the model's answers.
        langs: language of each prompt.
        sft_answers: the SFT model's answers, for the length ratio; None for the base, and where the policy is the SFT
            model.
        kl: estimate of the KL on each sample, nats; None without a reference.
    """
    ratio: Estimate | None = None
    if sft_answers is not None:
        ratio = bootstrap.ratio(lengths(answers.greedy), lengths(sft_answers.greedy))
    return {
        "prompts": len(langs),
        "greedy": measure(bootstrap, answers.greedy, langs),
        "sampled": measure(bootstrap, answers.sampled, langs),
        "length_ratio": ratio,
        "kl": None if kl is None else bootstrap.estimate(kl),
    }


def lengths(answers: Sequence[Answer]) -> Floats:
    """Tokens of each answer, including the end of sequence, so that no answer has 0."""
    return np.array([float(len(answer.tokens)) for answer in answers])
