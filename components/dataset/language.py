"""Language (English or Chinese) and refusals, recognized from the characters and first words of a text."""

import re
from collections.abc import Sequence

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
OTHER_SCRIPT = re.compile(
    "[\u0400-\u052f\u0530-\u06ff\u0900-\u0dff\u0e00-\u0eff\u10a0-\u11ff\u3040-\u30ff\uac00-\ud7af]|[\u0370-\u03ff]{3,}"
)
"""A character of a script that neither English nor Chinese uses; Greek in words, as mathematics uses single letters."""
OTHER_SHARE = 0.25
"""Japanese is a third to a half kana, and a Chinese text about it has little of them."""
LATIN_WORD = re.compile("[A-Za-z]+")
LANGUAGE_SAMPLE = 500
"""Leading characters of a text from which its language is guessed."""
REFUSAL_SAMPLE = 160
"""Leading characters of an answer in which a refusal is looked for."""
REFUSAL = re.compile(
    r"\W*(?:(?:unfortunately,? )?(?:(?:i'?m|i am) (?:very |so |really )?(?:sorry|afraid|unable|not able)"
    r"|(?:i )?apologi[sz]e|my apologies|sorry\b"
    r"|i (?:can(?:not|'?t)|do ?n[o']t (?:have|think i can)|won'?t|will not)\b"
    r"|as an? (?:\w+ ){0,2}(?:ai|artificial intelligence|language model)\b"
    r"|(?:i'?m|i am) (?:just |only )?an? (?:\w+ )?(?:ai|language model|artificial intelligence)\b)"
    r"|unfortunately,? i\b"
    r"|(?:非常|很|十分)?(?:抱歉|对不起|遗憾)"
    r"|作为(?:大型|大)?(?:人工智能|ai|语言模型|智能助手)|作为一[个名款][^,.，。]{0,10}(?:人工智能|ai|语言模型|智能助手)"
    r"|我(?:是一[个名]|只是一个)?(?:ai|人工智能|语言模型)|我(?:无法|不能|没有办法)|(?:不能|无法)提供)"
)
"""A refusal or disclaimer that opens an answer, in lower case; a later one is often part of a real answer."""


def count_han(text: str) -> int:
    """Number of Chinese characters in a text."""
    return sum(map(len, HAN.findall(text)))


def count_latin_words(text: str) -> int:
    """Number of words in Latin letters in a text."""
    return len(LATIN_WORD.findall(text))


def guess_language(texts: Sequence[str]) -> str | None:
    """`zh` if the texts' beginnings have more Chinese characters than words in Latin letters, else `en`.

    None if another script prevails, as in Japanese, Korean or Russian.
    """
    starts = [text[:LANGUAGE_SAMPLE] for text in texts]
    if all(start.isascii() for start in starts):
        return "en"
    han, words = sum(map(count_han, starts)), sum(map(count_latin_words, starts))
    other = sum(len(OTHER_SCRIPT.findall(start)) for start in starts)
    if other > words and other > OTHER_SHARE * (han + other):
        return None
    return "zh" if han > words else "en"


def is_refusal(answer: str) -> bool:
    """Whether an answer opens like a refusal or a disclaimer, by a list of English and Chinese phrases."""
    return REFUSAL.match(answer[:REFUSAL_SAMPLE].lower().replace("’", "'")) is not None
