"""Mojibake: text that was decoded with another encoding than it was written in."""

import re

LATIN = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122\u20ac]"
    "|\u00e2[\u20ac\u0080][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122\u20ac]"
    "|(?:[\u00e4-\u00e9][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122\u20ac]{2}){2}"
)
"""UTF-8 read as Latin-1 or Windows-1252: an accented letter, a quotation mark, two Chinese characters."""
FIRSTS = "\u00c2\u00c3\u00e2\u00e4\u00e5\u00e6\u00e7\u00e8\u00e9"
REMAINS = ("\u951f\u65a4\u62f7", "\u70eb\u70eb\u70eb", "\u5c6f\u5c6f\u5c6f")
"""What is left of lost bytes read as GBK."""
GBK = re.compile(
    "[\u9428\u951b\u9286\u6d93\u93c4\u9366\u6d5c\u9225\u6d63\u7ecb\u9359\u93b4\u934f\u7487\u7eef\u7f01\u9418\u93c8]"
)
"""First characters that frequent Chinese characters and punctuation become when their UTF-8 is read as GBK."""
RUN = re.compile("[\u3400-\u9fff\ue000-\uf8ff\u20ac\u3000-\u303f\uff00-\uffef]{4,}")
LEAST = 3
"""Characters that must come out of a run when it is read as it was meant."""


def is_mojibake(text: str) -> bool:
    """Whether a text shows that it was decoded with another encoding than it was written in."""
    if text.isascii():
        return False
    if any(first in text for first in FIRSTS) and LATIN.search(text):
        return True
    if any(remains in text for remains in REMAINS):
        return True
    return GBK.search(text) is not None and any(map(_is_utf8_read_as_gbk, RUN.findall(text)))


def _is_utf8_read_as_gbk(run: str) -> bool:
    """Whether the bytes of a run of Chinese characters in GBK are UTF-8; those of real text hardly ever are."""
    try:
        raw = run.encode("gb18030")
    except UnicodeEncodeError:
        return False
    for end in (len(raw), len(raw) - 1, len(raw) - 2):  # the last character may have lost bytes
        try:
            return len(raw[:end].decode("utf-8")) >= LEAST
        except UnicodeDecodeError:
            continue
    return False
