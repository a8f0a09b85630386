"""Validation: every check finds its defect, and with its detector switched off the same test fails."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from components.common.errors import DataValidationError, InputError, KubealignError
from components.common.files import read_json, verify_manifest, write_json, write_manifest
from components.config.params import load_config
from components.dataset.distribution import Distribution, distance, remember
from components.dataset.language import is_refusal
from components.dataset.records import SPLITS, content_id, read_lines
from components.dataset.similarity import find_frames, near_groups
from components.dataset.sketches import normalize_text, sketch
from components.validate import checks as checks_module
from components.validate import privacy, scan
from components.validate.bias import Share, find_bias, interval, measures
from components.validate.checks import KINDS, Check, row_checks
from components.validate.duplicates import mark_prompts, mark_rows, read_decontamination_list
from components.validate.stage import run_validate
from components.validate.suite import Suite
from components.validate.tokens import TokenCounter
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def base_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base model as fetch writes it, with a manifest, but for the weights."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(base_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_manifest(folder)
    return folder


Row = dict[str, Any]
LIMIT = 256
LONG = "please write a short story about a lighthouse keeper who finds a message in a bottle on the northern shore"
CHINESE = "请写一篇关于灯塔看守人在北方海岸发现瓶中信的短篇小说并描述他的心情"


def pair(question: str, chosen: str = "yes", rejected: str = "no", **changes: Any) -> Row:
    messages = [{"role": "user", "content": question}]
    row = {"id": content_id(messages, chosen, rejected), "group": content_id(messages), "prompt": messages}
    row |= {"lang": "en", "source": "test", "license": "Apache-2.0", "chosen": chosen, "rejected": rejected}
    return row | changes


def instruction(question: str, response: str = "yes") -> Row:
    row = pair(question, response, "")
    del row["chosen"], row["rejected"]
    return row | {"id": content_id(row["prompt"], response), "response": response}


GOOD = [pair(f"question {i}", f"a good answer {i}", f"a bad answer {i}") for i in range(12)]
SECRET = "AKIA" + "Z7QX" * 4
PERSON = "11010519491231002X"
CARD = "4111 1111 1111 1111"

DEFECTS: dict[str, list[Row]] = {
    "schema": [pair("no source", source="")],
    "turns": [pair("x", prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])],
    "characters": [pair("broken", chosen="caf\ufffd")],
    "language": [pair("which language", lang="fr")],
    "template_text": [pair("which markers", chosen="<|im_start|>assistant\nThese.<|im_end|>")],
    "special_tokens": [pair("which token", chosen="It ends with <|endoftext|> and goes on")],
    "placeholder": [pair("what is missing", chosen="NaN")],
    "license": [pair("no licence", license=" ")],
    "repeated": [GOOD[0]],
    "repeated_id": [pair("two things, one id", id=GOOD[0]["id"])],
    "repeated_prompt": [pair("question 0", "another good answer", "another bad answer")],
    "near_duplicate": [pair(LONG), pair(LONG + " today")],
    "same_answer": [pair("same", chosen="the  same\tthing ①", rejected="the same thing 1")],
    "truncated_answer": [pair("cut", chosen="It was a bright cold day in April.", rejected="It was a bright cold")],
    "contradiction": [pair("better?", "this one", "that one"), pair("better?", "that one", "this one")],
    "other_language": [
        pair(
            "Wie komme ich von hier zum nächsten Bahnhof?",
            "Gehen Sie die Straße hinunter.",
            "Gar nicht, es ist zu weit.",
        )
    ],
    "email": [pair("mail", chosen="Write to jane.doe@mail.kubealign.org today.")],
    "phone": [pair("call", chosen="我的手机是138-1234-5678。", rejected="不", lang="zh")],
    "ip_address": [pair("host", chosen="It is 8.8.4.4 as far as I know.")],
    "identity_card": [pair("card", chosen=f"The number is {PERSON}.")],
    "payment_card": [pair("pay", chosen=f"Use {CARD} for that.")],
    "credential": [pair("key", chosen=f"aws_access_key_id = {SECRET}")],
    "contaminated": [pair(LONG.replace("short", "brief").replace("please ", ""))],
    "too_long": [pair("long", chosen="word " * 400)],
}
"""Rows of which the last fails the check."""

NEVER = re.compile(r"(?!)")
NOTHING: Callable[..., bool] = lambda *given: False  # noqa: E731
OFF: dict[str, tuple[str, Any]] = {
    "schema": ("scan.fits", lambda kind, value: True),
    "turns": ("scan.ROLES", re.compile(".*")),
    "characters": ("scan.BROKEN", NEVER),
    "template_text": ("scan.has_markers", NOTHING),
    "special_tokens": ("scan.special_names", lambda tokenizer: NEVER),
    "placeholder": ("scan.PLACEHOLDERS", frozenset()),
    "language": ("scan.LANGUAGES", ("en", "zh", "fr")),
    "license": ("scan.NON_BLANK", re.compile("")),
    "repeated": ("duplicates._seen_before", lambda values: np.zeros(len(values), np.uint8)),
    "repeated_id": ("duplicates._seen_before", lambda values: np.zeros(len(values), np.uint8)),
    "repeated_prompt": ("duplicates._seen_before", lambda values: np.zeros(len(values), np.uint8)),
    "near_duplicate": ("duplicates.near_groups", lambda sketches, threshold, frames: np.arange(len(sketches))),
    "same_answer": ("scan.is_same", NOTHING),
    "truncated_answer": ("scan.is_truncated", NOTHING),
    "contradiction": ("duplicates._is_swapped", lambda contents, swapped: np.zeros(len(contents), np.uint8)),
    "other_language": ("scan.is_in_another_language", NOTHING),
    "email": ("privacy.EMAIL", NEVER),
    "phone": ("privacy.PHONE", NEVER),
    "ip_address": ("privacy._is_public_address", NOTHING),
    "identity_card": ("privacy.is_identity_card", NOTHING),
    "payment_card": ("privacy.is_payment_card", NOTHING),
    "credential": ("privacy._has_credential", NOTHING),
    "contaminated": ("duplicates._is_listed", lambda *given: np.zeros(len(given[0]), bool)),
    "too_long": ("tokens.TokenCounter.count", lambda self, asked, said: np.zeros((2, len(asked)), np.int32)),
}
"""What takes a detector's place when it is switched off."""


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite()


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("list") / "decontaminate.jsonl"
    question = DEFECTS["contaminated"][0]["prompt"][0]["content"] + " coast"
    path.write_text(json.dumps({"question": question}) + "\n")
    return path


def find(base: Path, rows: list[Row], name: str, suite: Suite, listed: Path | None = None) -> set[int]:
    """The positions of the rows, all on the train side, that fail a check."""
    kind = KINDS["preferences"]
    lines = list(enumerate((orjson.dumps(row) for row in rows), start=1))
    found = scan.scan_lines(scan.Scan(kind, base, LIMIT, 0.6), Path("rows.jsonl"), lines)
    sides = {"preferences": np.zeros(len(rows), np.uint8)}
    flags = mark_prompts({"preferences": found}, sides, read_decontamination_list(listed) if listed else None, 0.8)
    columns = found.columns | mark_rows(kind, found) | flags["preferences"]
    (check,) = [check for check in row_checks(kind, LIMIT) if check.name == name]
    return set(suite.failing(columns, [check])[name].tolist())


def assert_found(base: Path, name: str, suite: Suite, listed: Path) -> None:
    rows = [*GOOD, *DEFECTS[name]]
    found = find(base, rows, name, suite, listed)
    assert len(rows) - 1 in found, f"{name} is not found"
    assert not found & set(range(len(GOOD))), "a good row fails"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(base_model: Path, suite: Suite, listed: Path, name: str) -> None:
    assert_found(base_model, name, suite, listed)


@pytest.mark.parametrize("name", DEFECTS)
def test_with_its_detector_switched_off_a_defect_is_not_found(
    base_model: Path, suite: Suite, listed: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, harmless = OFF[name]
    monkeypatch.setattr(f"components.validate.{where}", harmless)
    with pytest.raises(AssertionError, match=f"{name} is not found"):
        assert_found(base_model, name, suite, listed)


def test_every_check_of_rows_has_a_planted_defect() -> None:
    named = {check.name for kind in KINDS.values() for check in row_checks(kind, LIMIT)}
    assert named - DEFECTS.keys() == {"split_leak", "same_tokens"}, "these two have tests of their own below"
    assert DEFECTS.keys() <= named and OFF.keys() == DEFECTS.keys()


# ---- privacy


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("call +49 30 1234 5678 now", ["phone"]),
        ("(415) 155-0132", []),  # an exchange begins with 2 to 9
        ("(415) 555-0132", ["phone"]),
        ("0571-87654321", ["phone"]),
        ("021-1234567", []),  # Shanghai has eight digits
        ("-1484724+960397912423686", []),  # a sum
        ("5336352000 + 1482320", []),
        ("13812345678", ["phone"]),
        ("order 113812345678", []),
        ("version 1.2.3.4.5, 192.168.0.1, 127.0.0.1, 192.0.2.7", []),
        ("2001:4860:4860::8888", ["ip_address"]),
        ("at 12:30:45", []),
        ("you@example.com", []),
        ("a.b+c@d-e.co.uk", ["email"]),
        (PERSON, ["identity_card"]),
        ("110105194912310021", []),
        ("999105194912310021", []),  # the check digit is right, the region is none
        ("110105194902310026", []),  # and neither is the 31st of February a date
        ("4111 1111 1111 1112", []),
        ("5500-0055-5555-5559", ["payment_card"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["credential"]),
        ("https://user:hunter22@host/", ["credential"]),
        ("ghp_" + "a1B2" * 9, ["credential"]),
        ("a perfectly ordinary sentence-with-a-very-long-word", []),
        ("手机１３８１２３４５６７８", ["phone"]),
    ],
)
def test_personal_data_is_told_from_what_looks_like_it(text: str, kinds: list[str]) -> None:
    assert privacy.kinds_in(normalize_text(text)) == kinds


def test_a_long_text_takes_no_quadratic_time() -> None:
    """Doubling a hostile text at most about doubles the work; counted in time, with a wide margin."""
    import time

    def seconds(n: int) -> float:
        started = time.process_time()
        for text in ("a" * n + "@", "1 " * n, "aws" * n, "//x" * n, ":a" * n):
            privacy.kinds_in(text)
        return time.process_time() - started

    seconds(1000)
    assert seconds(80_000) < 16 * seconds(20_000) + 0.5


# ---- tokens


def test_bounds_and_counts_agree_with_the_encoder(base_model: Path) -> None:
    """No row that is too long passes by its bound, and what is counted is counted as training does."""
    from components.dataset.chat import encode, load_tokenizer
    from components.dataset.records import Message

    tokenizer = load_tokenizer(base_model)
    rows = read_lines(ROOT / "data" / "preferences" / "validation.jsonl")[:60]
    asked, said = [row["prompt"] for row in rows], [(row["chosen"], row["rejected"]) for row in rows]
    for limit in (64, 768):
        counter = TokenCounter(tokenizer, limit)
        assert counter.lossless
        tokens, same = counter.count(asked, said)
        for prompt, answers, n in zip(asked, said, tokens.tolist(), strict=True):
            messages = [Message.model_validate(turn) for turn in prompt]
            exact = max(sum(map(len, encode(tokenizer, messages, answer))) for answer in answers)
            assert n >= exact and (n <= limit) == (exact <= limit)
        assert not same.any()


def test_answers_that_a_tokenizer_cannot_tell_apart_are_found(
    base_model: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a normaliser that lowers the case two answers that differ in it are the same tokens."""
    from tokenizers.normalizers import Lowercase

    from components.dataset.chat import load_tokenizer

    tokenizer = load_tokenizer(base_model)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    monkeypatch.setattr(scan, "_counters", {(base_model, LIMIT): TokenCounter(tokenizer, LIMIT)})
    rows = [pair("shout?", "YES", "yes"), pair("say?", "yes", "no")]
    assert find(base_model, rows, "same_tokens", suite) == {0}
    monkeypatch.setattr(scan, "_counters", {})
    assert find(base_model, rows, "same_tokens", suite) == set()


# ---- similarity


def test_near_duplicates_are_those_whose_exact_similarity_says_so() -> None:
    """Against a brute-force search over all pairs of 400 texts, in both languages."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(200):
        words = [f"w{rng.integers(500)}" for _ in range(30)]
        changed = [*words[: 30 - int(rng.integers(1, 8))], f"x{number}"]
        texts += [" ".join(words), " ".join(changed)]
    sets = [{tuple(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)} for text in texts]
    sketches = sketch([[{"role": "user", "content": text}] for text in texts])
    groups = near_groups(sketches, 0.8, find_frames(sketches))
    true = {(i, j) for i in range(400) for j in range(i) if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])}
    found = {(i, j) for i in range(400) for j in range(i) if groups[i] == groups[j]}
    assert found <= true and len(found) >= 0.97 * len(true) > 0


# ---- bias and drift


def test_the_interval_is_wilsons() -> None:
    """Worked out by hand: 8 of 10 gives [0.490, 0.943] (Brown, Cai and DasGupta 2001, equation 4)."""
    share = interval(8, 10)
    assert (round(share.low, 3), round(share.high, 3)) == (0.490, 0.943)
    assert interval(0, 0) == Share(0.5, 0.0, 1.0, 0)


def biased(base: Path, n_longer: int, n: int) -> scan.RowTable:
    rows = [
        pair(f"question {i}", "a long answer, really" if i < n_longer else "short", "medium answer") for i in range(n)
    ]
    rows += [pair(f"refused {i}", "It is the sun.", "I'm sorry, but as an AI I cannot say.") for i in range(4)]
    lines = list(enumerate((orjson.dumps(row) for row in rows), start=1))
    return scan.scan_lines(scan.Scan(KINDS["preferences"], base, LIMIT, 0.6), Path("rows.jsonl"), lines)


def test_length_and_refusals_that_tell_the_answer_are_measured_and_warned_of(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = biased(base_model, 30, 36)
    (whole, english) = find_bias(found, np.ones(40, bool))
    assert (whole.lang, english.lang) == ("all", "en")
    assert (whole.longer_wins.value, whole.longer_wins.n) == (30 / 40, 40)
    assert whole.length_accuracy == 30 / 40
    assert (whole.refusals_chosen, whole.refusals_rejected) == (0, 4)
    assert whole.refusal_loses.value == 1.0 and whole.refusal_accuracy == 0.5 + 0.5 * 4 / 40
    lines = {measure.name: measure.value for measure in measures([whole], 0.6) if measure.name != "format_shortcut"}
    assert lines == {"length_shortcut": 0.75, "refusal_shortcut": 0.55}
    monkeypatch.setattr(scan, "is_refusal", NOTHING)
    off = find_bias(biased(base_model, 30, 36), np.ones(40, bool))[0]
    assert off.refusals_rejected == 0 and off.refusal_accuracy == 0.5


ANSWERS = {
    "opening_tag": "<think>\nWhy?\n</think>\nBecause.",
    "list": "Two things:\n- one\n- another",
    "heading": "# Why\nBecause.",
    "code": "So:\n```python\n1\n```",
    "bold": "It is **so**.",
}


def laid_out(base: Path, cue: str, chosen: int, rejected: int) -> scan.RowTable:
    rows = [pair(f"question {i}", f"{ANSWERS[cue]} {i}", "It is not.") for i in range(chosen)]
    rows += [pair(f"asked {i}", "It is so.", f"{ANSWERS[cue]} {i}", lang="zh") for i in range(rejected)]
    rows += [pair(f"plain {i}", f"yes 3 - 2 #{i}", "no <b> * x") for i in range(20)]
    lines = list(enumerate((orjson.dumps(row) for row in rows), start=1))
    return scan.scan_lines(scan.Scan(KINDS["preferences"], base, LIMIT, 0.6), Path("rows.jsonl"), lines)


@pytest.mark.parametrize("cue", ANSWERS)
def test_a_format_that_tells_the_answer_is_measured_and_warned_of(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, cue: str
) -> None:
    def failing(chosen: int, rejected: int) -> list[str]:
        found = laid_out(base_model, cue, chosen, rejected)
        parts = find_bias(found, np.ones(len(found.columns["line"]), bool))
        assert parts[0].formats[cue].n == chosen + rejected
        assert parts[0].formats[cue].value == chosen / (chosen + rejected)
        return [measure.part for measure in measures(parts, 0.6) if measure.value > measure.limit]

    def formats(chosen: int, rejected: int) -> list[str]:
        return [part for part in failing(chosen, rejected) if part.endswith(cue)]

    assert formats(30, 0) == [f"all {cue}", f"en {cue}"]
    assert formats(0, 30) == [f"all {cue}", f"zh {cue}"]
    assert formats(20, 17) == [f"en {cue}", f"zh {cue}"], "each language by itself"
    assert formats(8, 0) == [], "eight pairs may be chance"
    monkeypatch.setattr(scan, "formats_of", lambda answer: 0)
    off = find_bias(laid_out(base_model, cue, 30, 0), np.ones(50, bool))[0]
    assert off.formats[cue].n == 0


def test_a_share_that_may_be_chance_warns_of_nothing(base_model: Path) -> None:
    part = find_bias(biased(base_model, 24, 36), np.ones(40, bool))[0]
    assert part.length_accuracy == 0.6 and part.longer_wins.low < 0.5
    assert measures([part], 0.55)[0].value == 0.5


@pytest.mark.parametrize(
    "opening",
    [
        "I'm sorry, but I can't",
        "As an AI language model, I",
        "作为一个人工智能语言模型，我",
        "很抱歉，我无法",
        "I cannot help",
        "I’m sorry",
        "Unfortunately, as an AI language model, I",
        "作为一名负责任和道德的人工智能助手，我",
        "无法提供",
    ],
)
def test_a_refusal_is_told_by_its_opening(opening: str) -> None:
    assert is_refusal(opening)
    assert not is_refusal(f"The model said: {opening}")


def test_drift_is_the_share_of_rows_that_would_have_to_move() -> None:
    before = Distribution(rows=4, language={"en": 2, "zh": 2})
    now = Distribution(rows=8, language={"en": 8})
    assert distance(now, before, "language") == 0.5 and distance(now, now, "language") == 0


def test_what_was_before_a_version_never_changes(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    one, two = Distribution(rows=1), Distribution(rows=2)
    assert remember(path, "v1", one) is None
    assert remember(path, "v2", two) == one
    assert remember(path, "v1", one) is None and remember(path, "v2", two) == one
    assert len(read_json(path)) == 2
    write_json(path, [{"digest": 1}])
    with pytest.raises(InputError, match="statistics.json: .*`git checkout HEAD -- "):
        remember(path, "v3", one)


# ---- the stage


class Project:
    """A data set in a folder, and what validation makes of it."""

    def __init__(self, folder: Path, base: Path, train: list[Row]) -> None:
        self.folder, self.base = folder, base
        self.out, self.html, self.markdown = folder / "out", folder / "report.html", folder / "report.md"
        for name in KINDS:
            for split in SPLITS:
                made = [pair if name == "preferences" else instruction][0]
                rows = [made(f"{split} {name} {i}") for i in range(2)]
                self.write(name, split, train if (name, split) == ("preferences", "train") else rows)

    def write(self, name: str, split: str, rows: list[Row]) -> None:
        path = self.folder / "in" / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def validate(self, *sets: str) -> dict[str, Any]:
        config = load_config(
            ROOT / "params.yaml",
            ["model.max_length=256", "validate.min_rows=1", "validate.max_quarantined=0.9", *sets],
        )
        run_validate(
            config.validate_, config.model.max_length, self.folder / "in", self.base, self.out, self.html, self.markdown
        )
        return dict(read_json(self.out / "validation.json"))

    def quarantine(self) -> list[Row]:
        return [json.loads(line) for line in (self.out / "quarantine.jsonl").read_text().splitlines()]

    def warnings(self) -> list[Row]:
        return [json.loads(line) for line in (self.out / "warnings.jsonl").read_text().splitlines()]


def test_in_is_clean_and_quarantined_with_every_reason(tmp_path: Path, base_model: Path) -> None:
    rows = [*GOOD, *(row for rows in DEFECTS.values() for row in rows)]
    project = Project(tmp_path, base_model, rows)
    summary = project.validate()
    quarantined = project.quarantine()
    assert summary["preferences"]["rows"] == len(rows) + 4
    for name in KINDS:
        kept = {split: read_lines(project.out / name / f"{split}.jsonl") for split in SPLITS}
        mine = [entry for entry in quarantined if entry["data_set"] == name]
        for split in SPLITS:
            came = read_lines(project.folder / "in" / name / f"{split}.jsonl")
            aside = {entry["line"]: entry["row"] for entry in mine if entry["split"] == split}
            again = iter(kept[split])
            assert came == [aside.get(line) or next(again) for line in range(1, len(came) + 1)], (
                "nothing lost or changed"
            )
            assert next(again, None) is None
        assert summary[name]["rows"] == summary[name]["clean"] + summary[name]["quarantined"]
        assert summary[name]["quarantined"] == len(mine)
    reasons = {entry["row"]["prompt"][0]["content"]: set(entry["reasons"]) for entry in quarantined}
    assert reasons["no licence"] == {"license", "schema"} and reasons["which language"] == {"language", "schema"}
    assert next(e for e in quarantined if e["reasons"] == ["schema"])["detail"].startswith("'source'")
    assert {"email", "phone", "ip_address", "near_duplicate"} <= {c for e in project.warnings() for c in e["checks"]}
    verify_manifest(project.out)


def test_the_reports_say_where_and_never_what(tmp_path: Path, base_model: Path) -> None:
    secret = [
        row
        for name in ("email", "phone", "ip_address", "identity_card", "payment_card", "credential")
        for row in DEFECTS[name]
    ]
    project = Project(tmp_path, base_model, [*GOOD, *secret])
    project.validate()
    values = (SECRET, PERSON, CARD, "jane.doe", "138-1234-5678", "8.8.4.4")
    reports = [
        path.read_text()
        for path in (project.html, project.markdown, project.out / "validation.json", project.out / "warnings.jsonl")
    ]
    assert not [value for text in reports for value in values if value in text]
    page = project.html.read_text()
    assert "train.jsonl:18" in page and "http" not in page and "src=" not in page and "<link" not in page


def test_a_group_on_two_sides_stops_the_run_and_the_report_is_there(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, base_model, [*GOOD, pair("test preferences 0", chosen="another yes")])
    with pytest.raises(DataValidationError, match="preferences: 1 fail `split_leak`: .*run `dvc repro`"):
        project.validate()
    (entry,) = project.quarantine()
    assert entry["reasons"] == ["split_leak"] and entry["split"] == "train"
    assert "The run stops: split_leak" in project.html.read_text()
    off = lambda label, side: np.zeros(len(label), bool)  # noqa: E731
    monkeypatch.setattr("components.validate.duplicates._in_two_splits", off)
    project.validate()


def test_a_near_duplicate_of_a_test_prompt_among_the_instructions_is_a_leak(tmp_path: Path, base_model: Path) -> None:
    """Whatever the field `group` says."""
    project = Project(tmp_path, base_model, GOOD)
    project.write("preferences", "test", [pair(LONG)])
    project.write("instructions", "train", [instruction(LONG + " today"), instruction("fine")])
    with pytest.raises(DataValidationError, match="instructions: 1 fail `split_leak`"):
        project.validate()
    assert [entry["data_set"] for entry in project.quarantine()] == ["instructions"]


def test_too_many_bad_rows_stop_the_run_and_say_why(tmp_path: Path, base_model: Path) -> None:
    bad = [pair(f"same {i}", "equal", "equal") for i in range(6)]
    project = Project(tmp_path, base_model, [*GOOD, *bad, *DEFECTS["too_long"]])
    with pytest.raises(
        DataValidationError, match=r"preferences: 6 of 23 rows are bad \(26.1%.*most fail `same_answer` \(6\)"
    ):
        project.validate("validate.max_quarantined=0.2")
    assert "same_answer" in project.html.read_text(), "the report is written before the run stops"


TUTOR = "You are a patient tutor. Here is the problem of today, which was sent in by a pupil: {} Show every step of it."
TEACHER = "你是一位耐心的数学老师。下面是今天一位同学寄来的题目：{}。请把每一步都写清楚。"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("same_answer", pair("same", chosen="the same thing", rejected="the same\u200b thing")),
        ("same_answer", pair("same", chosen="the same thing", rejected="ｔｈｅ same thing")),
        ("same_answer", pair("哪一个", chosen="同一件事", rejected="同\ufeff一件事", lang="zh")),
        ("contaminated", pair(TUTOR.format(LONG))),
        ("contaminated", pair(TUTOR.format(LONG.upper()))),
        ("contaminated", pair(TEACHER.format(CHINESE), lang="zh")),
    ],
)
def test_what_is_hidden_or_stands_inside_a_longer_text_is_found(
    tmp_path: Path, base_model: Path, suite: Suite, name: str, row: Row
) -> None:
    listed = tmp_path / "decontaminate.jsonl"
    listed.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in (LONG, CHINESE)))
    assert find(base_model, [*GOOD, row], name, suite, listed) == {len(GOOD)}


def test_a_severity_can_be_changed_and_an_unknown_check_is_named(tmp_path: Path, base_model: Path) -> None:
    project = Project(tmp_path, base_model, [*GOOD, *DEFECTS["email"]])
    project.validate("validate.severity={email: error}")
    assert [entry["reasons"] for entry in project.quarantine()] == [["email"]]
    with pytest.raises(DataValidationError, match="1 fail `email`"):
        project.validate("validate.severity={email: stop}")
    with pytest.raises(InputError, match=r"validate.severity: e_mail .*expected one of .*email"):
        project.validate("validate.severity={e_mail: stop}")


def test_the_list_of_prompts_and_the_version_before_travel_in_the_data_set(tmp_path: Path, base_model: Path) -> None:
    project = Project(tmp_path, base_model, [*GOOD, pair(CHINESE, lang="zh")])
    summary = project.validate()["preferences"]["statistics"]
    assert summary["listed_prompts"] is None and not summary["drift_known"]
    assert (
        "Decontamination was not run" in project.html.read_text()
        and "Drift was not measured" in project.markdown.read_text()
    )
    folder = project.folder / "in" / "preferences"
    (folder / "decontaminate.jsonl").write_text(json.dumps({"prompt": CHINESE + "吧"}, ensure_ascii=False) + "\n")
    write_json(folder / "previous.json", Distribution(rows=4, language={"en": 2, "zh": 2}).model_dump())
    summary = project.validate()["preferences"]
    assert [entry["reasons"] for entry in project.quarantine()] == [["contaminated"]]
    assert summary["statistics"]["listed_prompts"] == 1
    moved = {line["part"]: line for line in summary["statistics"]["lines"] if line["name"] == "drift"}
    assert round(moved["language"]["value"], 3) == round(16 / 17 - 0.5, 3) and moved["language"]["fails"]
    (folder / "decontaminate.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"decontaminate.jsonl:1: .*expected .* one of prompt, question"):
        project.validate()


def test_several_processes_make_what_one_makes(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path, base_model, [*GOOD, *(row for name in DEFECTS for row in DEFECTS[name])])
    project.validate()
    alone = verify_manifest(project.out)
    monkeypatch.setattr(scan, "LARGE", 0)
    monkeypatch.setattr(scan, "CHUNK", 5)
    project.validate()
    assert verify_manifest(project.out) == alone


def test_bad_data_is_no_engine_error(tmp_path: Path, base_model: Path) -> None:
    strange: list[Any] = [1, None, True, [], {}, [[]], {"a": {"b": []}}, "", "\x00", 1e300, -1]
    rows = [GOOD[1] | {key: value} for key in GOOD[0] for value in strange]
    rows += [{}, {"prompt": [{"role": "user"}]}, {"prompt": [{"content": "x"}], "chosen": "y"}]
    project = Project(tmp_path, base_model, [GOOD[0], *rows])
    project.validate("validate.max_quarantined=1.0")
    assert len(project.quarantine()) == len(rows), "all of them, and nothing else"


def test_an_engine_error_is_not_reported_as_bad_data(
    tmp_path: Path, base_model: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Check("broken", "error", "", "ExpectColumnValuesToBeBetween", {"column": "no_such_column", "max_value": 0})
    with pytest.raises(KubealignError, match="check broken could not be evaluated") as error:
        suite.failing({"number": [0]}, [broken])
    assert not isinstance(error.value, DataValidationError | InputError)
    project = Project(tmp_path, base_model, GOOD)

    def fails(*given: Any) -> bool:
        raise RuntimeError("the model file is damaged")

    monkeypatch.setattr("components.validate.scan.is_in_another_language", fails)
    with pytest.raises(RuntimeError, match="the model file is damaged"):
        project.validate()
    assert not project.out.exists(), "no row is called bad"


# ---- the embedded data


@pytest.fixture(scope="module")
def embedded(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("embedded")
    config = load_config(ROOT / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBEALIGN_HOME", str(folder / "home"))
        reports = (folder / "report.html", folder / "report.md")
        run_validate(config.validate_, config.model.max_length, ROOT / "data", base_model, folder / "clean", *reports)
    return read_json(folder / "clean" / "validation.json"), reports[0].read_text()


def test_the_report_on_the_embedded_data_shows_what_is_wrong_with_it(embedded: tuple[dict[str, Any], str]) -> None:
    """Repeated rows, length bias in Chinese, e-mail-like strings, refusals and AI disclaimers, as counted by hand."""
    summary, page = embedded
    pairs = summary["preferences"]
    failed = {check["name"]: check["failed"] for check in pairs["checks"]}
    assert (pairs["rows"], pairs["clean"], pairs["quarantined"]) == (600, 266, 334)
    assert failed["repeated"] == 16 and failed["characters"] == 8 and failed["email"] >= 1
    parts = {part["lang"]: part for part in pairs["bias"]}
    assert 0.43 < parts["en"]["longer_wins"]["share"] < 0.45 and parts["en"]["longer_wins"]["n"] == 299
    assert 0.61 < parts["zh"]["longer_wins"]["share"] < 0.63 and parts["zh"]["longer_wins"]["low"] > 0.5
    assert parts["all"]["refusals_rejected"] + parts["all"]["refusals_chosen"] > 20
    assert [check["places"] for check in pairs["statistics"]["checks"] if check["name"] == "length_shortcut"] == [
        ["zh"]
    ]
    assert "62.4% [56.8%, 67.7%] of 298" in page and "length_shortcut" in page


def test_the_readme_names_every_check_with_its_severity() -> None:
    text = (ROOT / "components" / "validate" / "README.md").read_text(encoding="utf-8")
    every = [check for kind in KINDS.values() for check in row_checks(kind, LIMIT)] + checks_module.statistic_checks()
    missing = [check.name for check in every if f"| `{check.name}` | {check.severity} |" not in text]
    assert not missing


# ---- what the detectors know: public formats of today, and texts that they must leave alone

KEYS = {
    "Hugging Face": "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
    "OpenAI project": "sk-proj-" + "a1B2c3D4_e5F6-" * 6,
    "OpenAI": "sk-" + "a1B2c3D4" * 6,
    "Anthropic": "sk-ant-api03-" + "a1B2c3-D4_" * 9,
    "OpenRouter": "sk-or-v1-" + "0123456789abcdef" * 4,
    "GitHub": "github_pat_" + "11ABCDEFG0" * 8,
    "GitHub classic": "ghp_" + "a1B2c3D4e5F6" * 3,
    "GitLab": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "Google": "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q",
    "Aliyun": "LTAI" + "5tAbCdEfGhIjKlMnOpQr",
    "Tencent": "AKID" + "z8krbsJ5yKBZQpn74WFkmLPx3EXAMPLEKEY",
    "DeepSeek": "sk-" + "0123456789abcdef" * 2,
    "Zhipu": "0123456789abcdef" * 2 + "." + "AbCdEfGhIjKlMnOp",
    "Volcengine": "AKLT" + "YTNjNGI5ZDQtMTIzNC00",
    "Baidu": "bce-v3/ALTAK-" + "AbCdEfGhIjKlMn/0123456789abcdef",
    "xAI": "xai-" + "a1B2c3D4e5" * 8,
    "Groq": "gsk_" + "a1B2c3D4e5" * 5,
    "Replicate": "r8_" + "a1B2c3D4e5" * 4,
    "NVIDIA": "nvapi-" + "a1B2c3-D4_" * 6,
    "Stripe": "sk_live_" + "a1B2c3D4e5F6g7H8i9J0k1L2",
}
NO_KEYS = (
    "scikit-learn and sk-image are packages; the id is 123e4567-e89b-12d3-a456-426614174000",
    "the commit is 0123456789abcdef0123456789abcdef01234567, see https://example.org/0123456789abcdef",
    "AKIDO is a name, LTAI an abbreviation, and hf_hub_download a function",
)


@pytest.mark.parametrize("provider", KEYS)
def test_todays_keys_are_credentials(provider: str) -> None:
    assert "credential" in privacy.kinds_in(f"Use the key {KEYS[provider]} for it.")
    assert "credential" in privacy.kinds_in(f'api_key="{KEYS[provider]}"')


def test_what_only_looks_like_a_key_is_none() -> None:
    for text in NO_KEYS:
        assert privacy.kinds_in(text) == [], text


GARBLED = ("Où est le café", "it’s “fine” – really", "中文的内容在这里，你好", "El niño comió piñón")
ENCODINGS = (("utf-8", "latin-1"), ("utf-8", "cp1252"), ("utf-8", "gb18030"))


def test_text_of_another_encoding_is_found_and_real_text_is_not() -> None:
    from components.validate.encoding import is_mojibake

    for text in GARBLED:
        assert not is_mojibake(text)
        for written, read in ENCODINGS:
            garbled = text.encode(written).decode(read, errors="replace")
            chinese = any(character > "\u2fff" for character in text)
            if read != "gb18030" or chinese:
                assert is_mojibake(garbled) or "\ufffd" in garbled, (text, read, garbled)
    assert is_mojibake("手持两把锟斤拷") and is_mojibake("烫烫烫烫")
    for text in (
        "Ça va? Ângela, São Paulo, Åse, Żółć, Ärger, ÆØÅ",
        "锐利的镜片；银行的铁门；涓涓细流",
        "日本語の文章、カタカナ",
        "≤ ≥ … — “ ” ‘ ’ € £",
    ):
        assert not is_mojibake(text), text


def test_control_characters_are_found() -> None:
    for character in "\x00\x08\x1b\x7f\x85\ufffe":
        assert scan.BROKEN.search(f"a{character}b")
    assert not scan.BROKEN.search("tab\tline\r\nspace\u3000\u00a0\u2028")
