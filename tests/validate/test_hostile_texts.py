"""A text that is made to be slow for a pattern costs at most ten times an ordinary one of the same length."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import phonenumbers
import pytest

from components.dataset.rendered import opens_rendered, parse_rendered, strip_ending
from components.dataset.sketches import normalize_text
from components.prepare.convert import RowDefaults, convert_files
from components.validate import privacy, scan
from components.validate.checks import KINDS

N = 20_000
MOST = 10
WORDS = "the quick brown fox jumps over a lazy dog while reading about several interesting things in a morning paper"
RNG = random.Random(0)


def repeated(piece: str, n: int = N) -> str:
    return (piece * (n // len(piece) + 1))[:n]


def ordinary(n: int = N) -> str:
    rng = random.Random(1)
    return " ".join(rng.choice(WORDS.split()) for _ in range(n))[:n]


def numbers(start: str, digits: int) -> str:
    """Different numbers, most of which are nobody's."""
    return " ".join(f"{start}{RNG.randrange(10**digits):0{digits}}" for _ in range(N // (len(start) + digits + 1)))


HOSTILE = {
    "spaces": " " * N + "x",
    "newlines": "x" + "\n" * N + "x",
    "digits": "7" * N,
    "accents in the wrong order": "a" + "\u0301\u0316" * (N // 2),
    "long compatibility forms": "\ufdfa" * N,
    "keys that never end": repeated("sk-"),
    "hosts of npm": repeated("//x"),
    "web tokens": repeated("eyJ"),
    "credentials in addresses": repeated("://a"),
    "mail addresses": repeated("a@a"),
    "American numbers": numbers("(222) 222-", 4),
    "Chinese numbers": numbers("100", 8),
    "international numbers": repeated("+1 1 1 "),
    "payment cards": numbers("4", 15),
    "identity cards": numbers("1", 17),
    "addresses": repeated("999.999.999.999 "),
    "half an address": repeated(":a"),
    "mojibake": repeated("鈥涓"),
    "role markers": repeated("\n\nHuman: a"),
    "headings": repeated("### "),
    "turns": repeated("<|im_start|>user\na"),
    "instructions that never end": repeated("[INST] <<SYS>> "),
    "brackets": "[" * N,
    "objects": repeated('[{"role":'),
    "base64": repeated("QUJD/+QUJD="),
    "invisible": repeated("a\u200b"),
    "bold": repeated("**"),
    "list items": repeated("\n- "),
}


def best(run: Callable[[], Any], times: int) -> float:
    """The least CPU time of several runs, which other work on the machine disturbs least."""

    def seconds() -> Iterator[float]:
        for _ in range(times):
            started = time.process_time()
            run()
            yield time.process_time() - started

    return min(seconds())


@pytest.fixture(scope="module")
def check(base_model: Path) -> Callable[[str], Callable[[], Any]]:
    setting = scan.Scan(KINDS["preferences"], base_model, 768, 0.6)

    def checks(text: str) -> Callable[[], Any]:
        row = {"id": "0" * 16, "group": "0" * 16, "prompt": [{"role": "user", "content": f"x {text}"}]}
        row |= {"chosen": f"a {text}", "rejected": f"b {text}", "lang": "en", "source": "s", "license": "l"}
        line = orjson.dumps(row)
        return lambda: scan.scan_lines(setting, Path("rows.jsonl"), [(1, line)])

    checks("loads the tokenizer and the tables")()
    return checks


@pytest.fixture(scope="module")
def ordinary_check(check: Callable[[str], Callable[[], Any]]) -> float:
    return best(check(ordinary()), 8)


@pytest.mark.parametrize("name", HOSTILE)
def test_checking_a_hostile_text(check: Callable[[str], Callable[[], Any]], ordinary_check: float, name: str) -> None:
    assert best(check(HOSTILE[name]), 3) < MOST * ordinary_check


RENDERED = {
    "answers that end again and again": "[INST] a [/INST] b" + "</s>" * (N // 4),
    "white space before a marker": "USER: a" + " " * N + "x",
    "lines before a marker": "### Instruction:\na" + "\n" * N + "x",
    "systems that never end": repeated("[INST] <<SYS>> a [/INST] b </s>"),
    "ends of no system": "[INST] <<SYS>>" + repeated("<</SYS>>"),
    "a preamble without an instruction": repeated("Below is an instruction that describes a task. "),
    "turns that end": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb" + repeated("<|im_end|>"),
}


def test_converting_hostile_rows(tmp_path: Path) -> None:
    """Five times as long as above, so that what is quadratic shows beside what a file costs."""

    def conversion(text: str) -> Callable[[], Any]:
        rows = [{"prompt": text, "chosen": f"a {text}", "rejected": f"b {text}"}]
        rows += [{"chosen": f"{text} x", "rejected": f"{text} y"}, {"prompt": "q", "chosen": "g", "rejected": "b"}]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        return lambda: convert_files([path], RowDefaults("", "auto", "MIT", "s"), tmp_path, print)

    usual = best(conversion(ordinary(5 * N)), 8)
    slow = {}
    for name, text in (HOSTILE | RENDERED).items():
        ratio = best(conversion(text * 5), 3) / usual
        if ratio > MOST:
            slow[name] = ratio
    assert not slow


def test_a_column_with_a_hostile_name(tmp_path: Path) -> None:
    """A name of half a million underscores is read in no more than ten times that of letters."""

    def conversion(name: str) -> Callable[[], Any]:
        path = tmp_path / "rows.jsonl"
        rows = [
            {"prompt": "q", "chosen": "g", "rejected": "b", name: "text"},
            {"prompt": "q", "chosen": "g", "rejected": "b"},
        ]
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in reversed(rows)))
        return lambda: convert_files([path], RowDefaults("", "auto", "MIT", "s"), tmp_path, print)

    assert best(conversion("x" + "_" * 500_000 + "x"), 3) < MOST * best(conversion("x" * 500_000), 5)


def test_accents_in_any_order_are_normalized_as_unicode_says() -> None:
    """Against Unicode's own normalization, on texts long enough to be put in order before."""
    import unicodedata

    rng = random.Random(2)
    marks = [chr(point) for point in range(0x300, 0x20000) if unicodedata.combining(chr(point))]
    marks += ["\u0f73", "\u0f75", "\u0f81", "\uff9e", "\uff9f"]
    for _ in range(20):
        text = "".join(rng.choice("aé\u1eadカ中") + "".join(rng.choices(marks, k=rng.randrange(90))) for _ in range(80))
        assert normalize_text(text) == normalize_text(unicodedata.normalize("NFKC", text))


def test_rendered_texts_without_an_end_are_none() -> None:
    assert parse_rendered("[INST] <<SYS>> never ends") is None
    assert parse_rendered("### Instruction:\nx" + "\n### Response:\ny" * 2000) is None
    assert opens_rendered("  <s>[INST] " + "a" * 5000)
    assert strip_ending("yes</s> <|im_end|></s>\n") == "yes"


def test_a_phone_number_is_valid_as_libphonenumber_says() -> None:
    """Of 4,000 numbers in the notations that are looked for."""
    rng = random.Random(3)

    def digits(n: int) -> str:
        return f"{rng.randrange(10**n):0{n}}"

    countries = (1, 33, 34, 39, 44, 47, 49, 55, 61, 65, 81, 86, 91, 212, 262, 358, 599, 800, 852, 886)
    makers: list[Callable[[], str]] = [
        lambda: "1" + digits(10),
        lambda: f"0{rng.randint(1, 9)}{digits(2)}-{digits(7)}",
        lambda: f"({digits(3)}) {digits(3)}-{digits(4)}",
        lambda: f"+{rng.choice(countries)} {digits(rng.randint(2, 4))} {digits(3)} {digits(rng.randint(2, 4))}",
    ]
    valid = 0
    for number in range(4000):
        match = privacy.PHONE.search(makers[number % 4]())
        if match:
            region = "US" if match[0].startswith("(") else "CN"
            expected = phonenumbers.is_valid_number(phonenumbers.parse(match[0], region))
            assert privacy.is_phone(match[0]) == expected, match[0]
            valid += expected
    assert valid > 500


def test_an_identity_card_of_no_county_is_none() -> None:
    """python-stdnum raises KeyError for such a code; the check digits are right."""
    for number in ("110001198001010023", "11000219800101002X"):
        assert privacy.kinds_in(f"It is {number}.") == []
