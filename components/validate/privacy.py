"""Kinds of personal data and secrets in a text; the values themselves are never returned.

Regular expressions find candidates cheaply; libphonenumber's patterns and python-stdnum validate them. Credentials are
detected by detect-secrets, with those of its plugins that know a provider's format (its entropy and keyword plugins
mistake ordinary prose for secrets) and take time linear in the length of a text.
"""

import ipaddress
import re
from functools import cache
from typing import Any

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata
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
COLONS = re.compile("(?<=[0-9A-Fa-f]):[0-9A-Fa-f]{0,4}:")

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
OPENAI = re.compile(r"[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}")
NPM = re.compile(r"/:_authToken=\s{0,8}(?:npm_|[A-Fa-f0-9-]{36})")
JWT = re.compile(r"(?<![\w-])eyJ[\w=-]++\.[\w=-]++", re.ASCII)
"""As in detect-secrets, whose own patterns of these three take time quadratic in the length of a hostile text."""
MARKS = ("PRIVATE KEY", "PuTTY-", "://", "xox", "XOX", "eyJ", ":_authToken=")
"""Every credential that the plugins know contains one of these marks or a TOKEN: a cheap pre-filter."""
PLUGINS = (
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "MailchimpDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
KINDS_OF_NUMBER = (
    *("premium_rate", "toll_free", "shared_cost", "voip", "personal_number", "pager", "uan", "voicemail"),
    *("fixed_line", "mobile"),
)


def kinds_in(text: str, has_number: bool = True, has_token: bool = True) -> list[str]:
    """The kinds of personal data and secrets in a text.

    Args:
        text: normalized.
        has_number: whether it may match NUMBER.
        has_token: whether it may match TOKEN.
    """
    kinds = []
    if "@" in text and EMAIL.search(text):
        kinds.append("email")
    if has_number and NUMBER.search(text):
        if any(is_phone(match[0]) for match in PHONE.finditer(text)):
            kinds.append("phone")
        if any(is_identity_card(match[0]) for match in IDENTITY_CARD.finditer(text)):
            kinds.append("identity_card")
        if any(is_payment_card(match[0]) for match in PAYMENT_CARD.finditer(text)):
            kinds.append("payment_card")
        if any(_is_public_address(match[0]) for match in IPV4.finditer(text)):
            kinds.append("ip_address")
    if "ip_address" not in kinds and COLONS.search(text) and _has_ipv6(text):
        kinds.append("ip_address")
    is_suspect = (has_token and TOKEN.search(text)) or any(mark in text for mark in MARKS)
    if is_suspect and _has_credential(text):
        kinds.append("credential")
    return kinds


def is_phone(number: str) -> bool:
    """Whether a number in a phone notation is valid: an assigned prefix and the right length.

    By libphonenumber's data; parsing by the library itself takes 100 times as long, which a text full of numbers shows.
    """
    digits = re.sub("[^0-9]", "", number)
    if number.startswith(("+", "00")):
        digits = digits.removeprefix("00")
        country = next((int(digits[:n]) for n in (1, 2, 3) if int(digits[:n]) in COUNTRY_CODE_TO_REGION_CODE), 0)
        national = digits.removeprefix(str(country))
    elif re.fullmatch(AMERICAN, number):
        country, national = 1, digits
    else:
        country, national = 86, digits.removeprefix("86")
    return _is_national(country, national) or (
        national.startswith("0") and _has_trunk_zero(country) and _is_national(country, national[1:])
    )


def _is_national(country: int, number: str) -> bool:
    for leading, valid in _regions(country):
        if leading is None:
            if valid.fullmatch(number):
                return True
        elif leading.match(number):
            return valid.fullmatch(number) is not None
    return False


def _has_trunk_zero(country: int) -> bool:
    return any(region.national_prefix == "0" for region in _metadata(country))


def _metadata(country: int) -> list[Any]:
    names = COUNTRY_CODE_TO_REGION_CODE.get(country, ())
    return [PhoneMetadata.metadata_for_region_or_calling_code(country, name) for name in names]


@cache
def _regions(country: int) -> list[tuple[re.Pattern[str] | None, re.Pattern[str]]]:
    """Of each region of a calling code, the first digits that tell it, if any, and what matches its valid numbers."""
    regions = []
    for region in _metadata(country):
        kinds = [getattr(region, kind) for kind in KINDS_OF_NUMBER]
        alternatives = "|".join(_pattern(kind) for kind in kinds if kind is not None and kind.national_number_pattern)
        valid = re.compile(f"(?={_pattern(region.general_desc)})(?:{alternatives})")
        regions.append((re.compile(region.leading_digits) if region.leading_digits else None, valid))
    return regions


def _pattern(kind: Any) -> str:
    lengths = "|".join(f"[0-9]{{{n}}}" for n in kind.possible_length if n > 0)
    return (rf"(?=(?:{lengths})\Z)" if lengths else "") + rf"(?:{kind.national_number_pattern})\Z"


def is_identity_card(number: str) -> bool:
    """Whether a Chinese identity-card number has a region and a date of birth, and its check digit (GB 11643)."""
    try:
        return ric.is_valid(number)
    except KeyError:  # the code of a province, which nobody was born in as such
        return False


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


def _has_ipv6(text: str) -> bool:
    return any(_is_public_address(match[0]) for match in IPV6.finditer(text))


def _has_credential(text: str) -> bool:
    if KEYS.search(text) or ("T3BlbkFJ" in text and OPENAI.search(text)):
        return True
    if ":_authToken=" in text and NPM.search(text):
        return True
    if "eyJ" in text and any(_is_jwt(match[0]) for match in JWT.finditer(text)):
        return True
    return any(True for plugin in _plugins() for _ in plugin.analyze_string(text))


def _is_jwt(token: str) -> bool:
    from detect_secrets.plugins.jwt import JwtTokenDetector

    return bool(JwtTokenDetector.is_formally_valid(token))


@cache
def _plugins() -> list[Any]:
    import importlib
    import pkgutil

    from detect_secrets import plugins

    names = [f"{plugins.__name__}.{module.name}" for module in pkgutil.iter_modules(plugins.__path__)]
    modules = [importlib.import_module(name) for name in names]
    known = {name: getattr(module, name) for module in modules for name in PLUGINS if hasattr(module, name)}
    return [known[name]() for name in PLUGINS]
