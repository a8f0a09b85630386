"""Secrets in texts: what this process's environment keeps secret, and what stands in URLs, becomes `***`."""

import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import parse_qsl, quote, unquote

MASK = "***"
MIN_LENGTH = 6
"""Characters of a value from which it is masked by itself: a shorter one is part of too many words."""
SECRET_NAME = re.compile(r"PASSW|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?!IZER)|KEY(?!BOARD|RING)", re.IGNORECASE)
NO_SECRET_NAME = re.compile(r"PUBLIC|_(FILE|PATH|DIR|FOLDER|HOST|NAME|USERNAME|ID|URL|URI)$|^SSH_|^GPG_", re.IGNORECASE)
"""Public keys, and variables that say where a secret lies."""
USER_INFO = re.compile(r"(?<=://)(?!/)\S*@")
"""From the scheme to the last `@` before white space: a password may hold any of `/ @ ? #`."""
SECRET_PARAMETER = re.compile(
    r"([?&;][\w.%-]*(?:passw|secret|token|key|credential|signature|\bsig\b|\bauth)[\w.%-]*=)[^\s&;'\"<>]+",
    re.IGNORECASE,
)
QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


def without_credentials(text: str) -> str:
    """The text without the values of this process's secrets, users and passwords in URLs, and secret parameters."""
    values = _pattern(tuple(_secret_values()))
    text = values.sub(MASK, text) if values else text
    return SECRET_PARAMETER.sub(rf"\1{MASK}", USER_INFO.sub(f"{MASK}@", text))


def without_query(text: str) -> str:
    """The text without credentials, and without the query and fragment of any URL: for one that is refused."""
    return QUERY.sub(rf"\1?{MASK}", without_credentials(text))


class MaskedStream:
    """Masks a stream of bytes that comes in pieces; everything else passes unchanged.

    A line is written when it ends. Of an endless one, MAX_WAITING bytes wait: no secret is longer.
    """

    MAX_WAITING = 1 << 16

    def __init__(self) -> None:
        self._waiting = b""

    def feed(self, piece: bytes) -> bytes:
        """The bytes that can be written once this piece came; an empty piece is the end."""
        self._waiting += piece
        end = len(self._waiting)
        if piece:
            end = max(self._waiting.rfind(b"\n"), self._waiting.rfind(b"\r")) + 1
            if not end and len(self._waiting) > 2 * self.MAX_WAITING:
                end = len(self._waiting) - self.MAX_WAITING
        ready, self._waiting = self._waiting[:end], self._waiting[end:]
        return without_credentials(ready.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _secret_values() -> Iterator[str]:
    """The values to mask: of variables named as secrets, and what stands before the host and in the query of URLs."""
    for name, value in os.environ.items():
        if _names_a_secret(name):
            yield value
        if "://" in value:
            rest = value.partition("://")[2]
            user_info, at, _ = rest.rpartition("@")
            if at:
                yield from (user_info, user_info.partition(":")[2])
            for _, parameter in parse_qsl(rest.partition("?")[2]):
                yield parameter


@lru_cache(maxsize=1024)
def _names_a_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name) and not NO_SECRET_NAME.search(name))


@lru_cache(maxsize=8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What matches any of the values in any of the ways in which they are written, longer ones first."""
    written = {form for value in values for form in _forms(value) if len(form) >= MIN_LENGTH}
    return re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True)))) if written else None


def _forms(value: str) -> Iterator[str]:
    """A value as it is, on one line, line by line, as part of a URL, and within JSON or a Python literal.

    The frame of a PEM file is the same in all of them, and no secret.
    """
    plain = value.strip()
    lines = [line.strip() for line in plain.splitlines() if not line.startswith("-----")]
    yield from (plain, " ".join(plain.split()), *lines)
    yield from (quote(plain), quote(plain, safe=""), unquote(plain))
    yield from (json.dumps(plain)[1:-1], json.dumps(plain, ensure_ascii=False)[1:-1], repr(plain)[1:-1])
