"""Kinds of personal data and secrets in a text; the values themselves are never returned.

Regular expressions find candidates cheaply; libphonenumber and python-stdnum validate them. Credentials are detected by
detect-secrets, with those of its plugins that know a provider's format (its entropy and keyword plugins mistake
ordinary prose for secrets).
"""

import ipaddress
import re
from functools import cache
from typing import Any

import phonenumbers
from stdnum import luhn
from stdnum.cn import ric

KINDS = ("email", "phone", "identity_card", "payment_card", "ip_address", "credential")

EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@(?!example\.)[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,4}\.[A-Za-z]{2,24}"
)
AMERICAN = r"(?:\([0-9]{3}\) ?|[0-9]{3}[ .-])[0-9]{3}[ .-][0-9]{4}"
PHONE = re.compile(
    r"(?<![0-9A-Za-z.-])(?:(?:\+?86[ -]?)?1[0-9]{2}[ -]?[0-9]{4}[ -]?[0-9]{4}"  # Chinese mobile
    r"|0[0-9]{2,3}-[0-9]{7,8}"  # Chinese land line
    r"|\+[1-9][0-9]{0,2}(?:[ .-]?\(?[0-9]{1,4}\)?){2,5}"  # international
    rf"|{AMERICAN})(?![0-9A-Za-z-])"
)
"""Common notations of phone numbers; libphonenumber alone takes every tenth number of an arithmetic text for one."""
IDENTITY_CARD = re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])")
PAYMENT_CARD = re.compile(r"(?<![0-9A-Za-z.-])[2-6][0-9]{3}(?:[ -]?[0-9]){11,15}(?![0-9A-Za-z])")
ISSUER = re.compile(
    r"4(?:[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|35[0-9]{14}"
    r"|6(?:011|5[0-9]{2})[0-9]{12}|62[0-9]{14,17}"
)
IPV4 = re.compile(r"(?<![0-9A-Za-z.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z]|\.[0-9])")
IPV6 = re.compile(r"(?<![0-9A-Za-z:])[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?![0-9A-Za-z:])")

NUMBER = re.compile(r"[0-9][0-9 .()-]{5,}[0-9]")
"""A run that every phone number, card number and IPv4 address contains and few texts do: a cheap pre-filter."""
TOKEN = re.compile(r"(?<![\w+/=.:-])[\w+/=.:-]{20}", re.ASCII)
KEYS = re.compile(
    r"(?<![\w-])(?:"
    r"hf_[A-Za-z]{34}|hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|sk-(?:proj|svcacct|admin|None)-[\w-]{20,}|sk-ant-(?:api|admin|sid)[0-9]{2}-[\w-]{20,}"  # OpenAI, Anthropic
    r"|sk-or-v1-[0-9a-f]{32,}|sk-[A-Za-z0-9]{32,}"  # OpenRouter; OpenAI, DeepSeek, DashScope, Moonshot, SiliconFlow
    r"|github_pat_[A-Za-z0-9_]{22,}|gh[pousr]_[A-Za-z0-9]{30,}|gl(?:pat|dt|rt|ptt)-[\w-]{20,}"  # GitHub, GitLab
    r"|AIza[\w-]{30,}|ya29\.[\w-]{30,}|GOCSPX-[\w-]{20,}"  # Google
    r"|A(?:KIA|SIA|BIA|CCA)[A-Z0-9]{16}"  # AWS
    r"|LTAI[A-Za-z0-9]{12,30}|AKID[A-Za-z0-9]{13,}|AKLT[A-Za-z0-9_-]{20,}|ALTAK-?[A-Za-z0-9]{10,}"  # Chinese clouds
    r"|bce-v3/[\w/-]{20,}"
    r"|xai-[A-Za-z0-9]{40,}|gsk_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{30,}|pplx-[A-Za-z0-9]{30,}|nvapi-[\w-]{40,}"  # models
    r"|dop_v1_[0-9a-f]{60,}|dckr_pat_[\w-]{20,}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|hv[sbr]\.[\w-]{24,}"
    r"|(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{20,}|sbp_[0-9a-f]{40}|ntn_[A-Za-z0-9]{40,}|figd_[\w-]{30,}"
    r"|lin_api_[A-Za-z0-9]{30,}|tskey-[a-z]+-[\w-]{20,}|AGE-SECRET-KEY-1[A-Z0-9]{50,}|pypi-AgE[\w-]{50,}"
    r"|npm_[A-Za-z0-9]{36}|xapp-[0-9]-[\w-]{20,}|[0-9a-f]{32}\.[A-Za-z0-9]{16}(?![\w-])"  # the last one is Zhipu's
    r")"
)
"""Keys of today's providers that detect-secrets does not know, by their prefixes."""
MARKS = ("PRIVATE KEY", "PuTTY-", "://", "xox", "XOX", "eyJ")
"""Every credential that the plugins know contains one of these marks or a TOKEN: a cheap pre-filter."""
PLUGINS = (
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
PIECE, OVERLAP = 8192, 512
"""Characters that a plugin sees at once, and their overlap: some patterns take time quadratic in the text's length."""


def kinds_in(text: str) -> list[str]:
    """The kinds of personal data and secrets in a text."""
    kinds = []
    if "@" in text and EMAIL.search(text):
        kinds.append("email")
    if NUMBER.search(text):
        if any(is_phone(match[0]) for match in PHONE.finditer(text)):
            kinds.append("phone")
        if any(is_identity_card(match[0]) for match in IDENTITY_CARD.finditer(text)):
            kinds.append("identity_card")
        if any(is_payment_card(match[0]) for match in PAYMENT_CARD.finditer(text)):
            kinds.append("payment_card")
        if any(_is_public_address(match[0]) for match in IPV4.finditer(text)):
            kinds.append("ip_address")
    if "ip_address" not in kinds and ":" in text and any(_is_public_address(m[0]) for m in IPV6.finditer(text)):
        kinds.append("ip_address")
    if (TOKEN.search(text) or any(mark in text for mark in MARKS)) and _has_credential(text):
        kinds.append("credential")
    return kinds


def is_phone(number: str) -> bool:
    """Whether a number in a phone notation is valid: an assigned prefix and the right length."""
    region = "US" if re.fullmatch(AMERICAN, number) else "CN"
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False


def is_identity_card(number: str) -> bool:
    """Whether a Chinese identity-card number has a region and a date of birth, and its check digit (GB 11643)."""
    return ric.is_valid(number)


def is_payment_card(number: str) -> bool:
    """Whether a number has the length and prefix of an issuer's cards and a valid Luhn check digit."""
    digits = re.sub(r"[ -]", "", number)
    return ISSUER.fullmatch(digits) is not None and luhn.is_valid(digits)


def _is_public_address(text: str) -> bool:
    """Whether a text is a public IP address; private and documentation addresses identify nobody."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _has_credential(text: str) -> bool:
    if KEYS.search(text):
        return True
    pieces = [text[start : start + PIECE + OVERLAP] for start in range(0, len(text), PIECE)]
    return any(True for piece in pieces for plugin in _plugins() for _ in plugin.analyze_string(piece))


@cache
def _plugins() -> list[Any]:
    import importlib
    import pkgutil

    from detect_secrets import plugins

    names = [f"{plugins.__name__}.{module.name}" for module in pkgutil.iter_modules(plugins.__path__)]
    modules = [importlib.import_module(name) for name in names]
    known = {name: getattr(module, name) for module in modules for name in PLUGINS if hasattr(module, name)}
    return [known[name]() for name in PLUGINS]
