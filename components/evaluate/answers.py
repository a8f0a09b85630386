"""Answers of a model to the fixed prompts, greedy and sampled, batched with the key-value cache; and what they measure.

Both kinds of answer are made in one batch. Samples are drawn at temperature 1 from the whole distribution, so that they
are the model's own and a divergence can be estimated on them.
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

from components.common.errors import InputError
from components.common.files import digest, read_json, write_json
from components.common.provenance import modules_digest
from components.dataset.chat import encode_prompt
from components.dataset.language import count_han, count_latin_words, is_refusal
from components.dataset.records import LANGUAGES, Preference
from components.engine.models import PackedModel, plain_attention
from components.evaluate.statistics import Floats, GroupBootstrap
from components.gate.results import Estimate, Generation, Metrics
from components.tracking import store
from components.tracking.run import StageRun

BATCH_PROMPTS = 8
REPEATED_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its tokens, with the end of sequence where it came, and its text."""

    tokens: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Answers:
    """One greedy and one sampled answer to each prompt."""

    greedy: list[Answer]
    sampled: list[Answer]


def fixed_prompts(rows: Sequence[Preference], per_language: int) -> list[Preference]:
    """The rows whose prompts are answered: the first of each language by id, which is a hash, one of each group."""
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
    how: Sequence[Any],
    tokenizer: Any,
    rows: Sequence[Preference],
    max_new_tokens: int,
    seed: int,
    what: str,
) -> Answers:
    """A greedy and a sampled answer to the prompt of each row, from the cache or by running the model.

    Args:
        run: says how far it is.
        open_model: gives the model; not called when its answers are known.
        how: everything that names the model and the way it is run.
        tokenizer: of the model.
        rows: with the prompts.
        max_new_tokens: limit of an answer.
        seed: of the samples.
        what: name of the model, for the progress line.
    """
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    key = digest([list(how), prompts, max_new_tokens, seed, modules_digest("components.evaluate.answers")])
    place = store.home() / "cache" / "answers" / f"{key}.json"
    kept = _load(place, len(rows))
    if kept is not None:
        run.log(f"answers of {what}: {len(rows)} prompts from the cache")
        return kept
    found: list[Answer] = [Answer([], "", False)] * (2 * len(rows))
    shortest_first = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    total = -(-len(rows) // BATCH_PROMPTS) * max_new_tokens
    for number, first in enumerate(range(0, len(rows), BATCH_PROMPTS)):
        batch = shortest_first[first : first + BATCH_PROMPTS]

        def progress(step: int, before: int = number * max_new_tokens) -> None:
            run.progress(before + step, total, f"answers of {what}")

        made = _generate(open_model(), tokenizer, [prompts[i] for i in batch], max_new_tokens, seed + number, progress)
        for position, index in enumerate(batch):
            found[index], found[len(rows) + index] = made[position], made[len(batch) + position]
    answers = Answers(found[: len(rows)], found[len(rows) :])
    values = asdict(answers)
    write_json(place, {"sha256": digest(values), "answers": values})
    return answers


def _load(place: Path, n: int) -> Answers | None:
    try:
        kept = read_json(place)
        values = kept["answers"]
        if kept["sha256"] != digest(values) or len(values["greedy"]) != n:
            return None
        return Answers(*([Answer(**one) for one in values[kind]] for kind in ("greedy", "sampled")))
    except (InputError, KeyError, TypeError):
        return None


class _FirstRowsGreedy(LogitsProcessor):  # type: ignore[misc]
    """Leaves the first half of the rows only their most likely token, so that sampling takes it; tells the progress."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress, self._step = progress, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._step += 1
        self._progress(self._step)
        half = len(scores) // 2
        best = scores[:half].argmax(dim=-1, keepdim=True)
        scores = scores.clone()
        scores[:half] = scores.new_full(scores[:half].shape, -math.inf).scatter(1, best, 0.0)
        return scores


@torch.no_grad()
def _generate(
    model: PackedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    """The greedy answers to all prompts, then the sampled ones.

    The model attends by its plain implementation meanwhile; prompts are padded on the left, by mask and not by id.
    """
    width = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts] * 2, device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts] * 2, device=model.device)
    lm = model.causal_lm
    own, lm.generation_config = lm.generation_config, GenerationConfig()  # no penalties of the model's own
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
                logits_processor=LogitsProcessorList([_FirstRowsGreedy(progress)]),
                pad_token_id=padding,
                eos_token_id=tokenizer.eos_token_id,
            )
    finally:
        lm.generation_config = own
    return [_cut(tokenizer, row) for row in output[:, width:].tolist()]


def _cut(tokenizer: Any, tokens: list[int]) -> Answer:
    finished = tokenizer.eos_token_id in tokens
    if finished:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id) + 1]
    # A limit can cut a character in two; its half is not part of the answer.
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")
    return Answer(tokens, text, finished)


def repetition(tokens: Sequence[int]) -> float:
    """Share of the answer's runs of four tokens that it has written before; 0 for an answer shorter than that.

    Source: seq-rep-n of "Neural text generation with unlikelihood training", arXiv 1908.04319, section 5.
    """
    runs = list(zip(*(tokens[start:] for start in range(REPEATED_TOKENS)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def speaks(text: str, lang: str) -> bool:
    """Whether a text is in the language, by its script: Chinese characters against Latin words; True for neither."""
    han, latin = count_han(text), count_latin_words(text)
    return han >= latin if lang == "zh" else latin >= han


def measure(bootstrap: GroupBootstrap, answers: Sequence[Answer], langs: Sequence[str]) -> Metrics:
    """The automatic measures of one kind of answer; see results.Generation. A share of nothing is left out."""
    written = np.array([bool(answer.text) for answer in answers], dtype=np.float64)
    every = np.ones_like(written)
    match = [speaks(answer.text, lang) for answer, lang in zip(answers, langs, strict=True)]
    columns = {
        "tokens": (lengths(answers), every),
        "repetition": (np.array([repetition(answer.tokens) for answer in answers]), every),
        "language_match": (written * np.array(match), written),
        "refusal": (np.array([float(is_refusal(answer.text)) for answer in answers]), every),
        "empty": (1.0 - written, every),
        "unfinished": (np.array([float(not answer.finished) for answer in answers]), every),
    }
    return bootstrap.table(columns, {"": every.astype(bool)})[""]


def generation(
    bootstrap: GroupBootstrap,
    answers: Answers,
    langs: Sequence[str],
    compared: Answers | None,
    divergence: Floats | None,
) -> Generation:
    """What a model's answers measure.

    Args:
        bootstrap: over the groups of the prompts.
        answers: of the model.
        langs: language of each prompt.
        compared: the SFT model's answers, for the length ratio; None for the base.
        divergence: estimate of KL on each sample, nats; None without a reference.
    """
    ratio: Estimate | None = None
    if compared is not None:
        ratio = bootstrap.ratio(lengths(answers.greedy), lengths(compared.greedy))
    return {
        "prompts": len(langs),
        "greedy": measure(bootstrap, answers.greedy, langs),
        "sampled": measure(bootstrap, answers.sampled, langs),
        "length_ratio": ratio,
        "kl": None if divergence is None else bootstrap.estimate(divergence),
    }


def lengths(answers: Sequence[Answer]) -> Floats:
    """Tokens of each answer, the end of sequence included, so that no answer has none."""
    return np.array([float(len(answer.tokens)) for answer in answers])
