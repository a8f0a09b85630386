"""Prepare and validate a million preference pairs with planted defects: seconds, memory, recall and precision.

`make bench-data`, or `python tests/bench/data.py --rows 100000`. The pairs are random walks over the words (English)
and characters (Chinese) of the real ones, so that their statistics are real and their texts new. Each class of defect
is planted in a known share of the rows, which carry its name in `source`; nothing looks at that. Prepare and validate
run in a process tree of their own on at most two cores, with params.yaml as it is but for the sources; its memory is
sampled. It prints and writes build/bench/data.json.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import psutil

from components.common.errors import DataValidationError
from components.common.files import read_json, sha256_file, write_json, write_manifest
from components.config.params import load_config
from components.dataset.records import SPLITS, iter_lines
from components.validate.privacy import is_identity_card, is_payment_card, is_phone

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "bench" / "data.json"
CORES = 2
SENTENCES = 200_000
"""Different sentences per language that texts are made of; two prompts share one now and then, as real ones do."""
RATE = 0.002
"""Share of the rows that each class of defect is planted in."""
LISTED = 500
"""Prompts of the decontamination list."""

Row = dict[str, Any]
Make = Callable[[random.Random, Row], Row]


# ---- realistic text


class Language:
    """Sentences that are walks over the word pairs of real text."""

    def __init__(self, lang: str, rng: random.Random) -> None:
        self.lang = lang
        following: dict[str, list[str]] = {}
        for split in SPLITS:
            for _, row in iter_lines(ROOT / "data" / "preferences" / f"{split}.jsonl"):
                if row["lang"] == lang:
                    pattern = r"[a-z]+" if lang == "en" else r"[\u4e00-\u9fff]"
                    units = re.findall(pattern, (row["chosen"] + row["rejected"]).lower())
                    for one, other in pairwise(units):
                        following.setdefault(one, []).append(other)
        starts = list(following)
        self.sentences = [self._sentence(following, starts, rng) for _ in range(SENTENCES)]

    def _sentence(self, following: dict[str, list[str]], starts: list[str], rng: random.Random) -> str:
        length = max(5, int(rng.lognormvariate(2.5 if self.lang == "en" else 2.8, 0.4)))
        units = [starts[int(rng.random() * len(starts))]]
        while len(units) < length:
            after = following.get(units[-1]) or starts
            units.append(after[int(rng.random() * len(after))])
        return " ".join(units).capitalize() + "." if self.lang == "en" else "".join(units) + "。"

    def text(self, rng: random.Random, sentences: int) -> str:
        """Some sentences."""
        made = [self.sentences[int(rng.random() * SENTENCES)] for _ in range(sentences)]
        return (" " if self.lang == "en" else "").join(made)


def pair(language: Language, rng: random.Random, name: str = "clean") -> Row:
    """A pair of usual length: a prompt of two or three sentences, answers of one to four, every twentieth longer."""
    return {
        "prompt": [{"role": "user", "content": language.text(rng, 2 + int(rng.random() * 2))}],
        "chosen": language.text(rng, length(rng)),
        "rejected": language.text(rng, length(rng)),
        "lang": language.lang,
        "source": name,
        "license": "CC0-1.0",
    }


def length(rng: random.Random) -> int:
    """Sentences of an answer."""
    return 1 + int(rng.random() * 4) + (min(8, int(rng.expovariate(0.25))) if rng.random() < 0.05 else 0)


# ---- planted defects: each makes of a good row one or more rows, the last of which must be found


def inside(row: Row, text: str) -> Row:
    """The row with a text in the middle of its chosen answer."""
    words = row["chosen"]
    return row | {"chosen": f"{words[: len(words) // 2]} {text} {words[len(words) // 2 :]}"}


def with_check(make: Callable[[], str], check: Callable[[str], bool]) -> str:
    """The first of random numbers that can be what they look like."""
    while not check(number := make()):
        pass
    return number


def digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(n))


def letters(rng: random.Random, n: int) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(n))


def near_variant(rng: random.Random, row: Row) -> Row:
    """A row whose prompt has a Jaccard similarity to `row`'s of 0.8 or as little above as its length allows."""
    text = row["prompt"][0]["content"]
    if row["lang"] == "en":
        units = re.findall(r"\w+", text.lower())
        sets = {tuple(units[i : i + 3]) for i in range(len(units) - 2)}
    else:
        units = list(text)
        sets = {tuple(units[i : i + 3]) for i in range(len(units) - 2)}
    changed = int(len(sets) / 9)  # replacing the last k of n shingles leaves (n - k) / (n + k), 0.8 at k = n / 9
    kept = units[: len(units) - changed]
    new = [
        f"qz{letters(rng, 5).lower()}" if row["lang"] == "en" else chr(0x3400 + rng.randrange(6000))
        for _ in range(changed)
    ]
    varied = (" " if row["lang"] == "en" else "").join([*kept, *new])
    return row | {"prompt": [{"role": "user", "content": varied}]}


def cut_off(rng: random.Random, row: Row) -> Row:
    """A row whose rejected answer is the first part of the chosen one."""
    whole = row["chosen"] + " " + row["rejected"]
    return row | {"chosen": whole, "rejected": whole[: max(20, len(whole) * 2 // 3)].rstrip(".。 ")}


def phone(rng: random.Random, row: Row) -> str:
    if row["lang"] == "zh":
        return with_check(lambda: f"1{digits(rng, 10)}", is_phone)
    return with_check(lambda: f"({digits(rng, 3)}) {digits(rng, 3)}-{digits(rng, 4)}", is_phone)


def identity_card(rng: random.Random) -> str:
    def make() -> str:
        birthday = f"19{70 + rng.randrange(30)}0{1 + rng.randrange(9)}1{rng.randrange(10)}"
        return f"110101{birthday}{digits(rng, 3)}{rng.choice('0123456789X')}"

    return with_check(make, is_identity_card)


def payment_card(rng: random.Random) -> str:
    return with_check(lambda: f"4{digits(rng, 3)} {digits(rng, 4)} {digits(rng, 4)} {digits(rng, 4)}", is_payment_card)


SECRETS: list[Callable[[random.Random], str]] = [
    lambda rng: "AKIA" + letters(rng, 16),
    lambda rng: "ghp_" + letters(rng, 36),
    lambda rng: f"xoxb-{digits(rng, 11)}-{digits(rng, 11)}-{letters(rng, 24).lower()}",
    lambda rng: "sk_live_" + letters(rng, 24),
    lambda rng: "-----BEGIN RSA PRIVATE KEY-----",
]

SINGLE: dict[str, Make] = {
    "turns": lambda rng, row: row | {"prompt": [*row["prompt"], {"role": "assistant", "content": "Yes."}]},
    "characters": lambda rng, row: inside(row, "caf\ufffd"),
    "language": lambda rng, row: row | {"lang": "fr"},
    "license": lambda rng, row: row | {"license": ""},
    "same_answer": lambda rng, row: row | {"rejected": row["chosen"].replace(" ", "  ") + "\n"},
    "truncated_answer": cut_off,
    "too_long": lambda rng, row: (
        row | {"chosen": " ".join([row["chosen"]] * (9000 // len(row["chosen"].encode()) + 1))}
    ),
    "email": lambda rng, row: inside(row, f"{letters(rng, 7).lower()}@{letters(rng, 5).lower()}.org"),
    "phone": lambda rng, row: inside(row, phone(rng, row)),
    "identity_card": lambda rng, row: inside(row, identity_card(rng)),
    "payment_card": lambda rng, row: inside(row, payment_card(rng)),
    "ip_address": lambda rng, row: inside(row, f"8.{rng.randrange(256)}.{rng.randrange(256)}.{1 + rng.randrange(254)}"),
    "credential": lambda rng, row: inside(row, rng.choice(SECRETS)(rng)),
}
DOUBLE: dict[str, Make] = {
    "repeated": lambda rng, row: row,
    "repeated_prompt": lambda rng, row: row | {"chosen": row["rejected"] + "!", "rejected": row["chosen"] + "!"},
    "contradiction": lambda rng, row: row | {"chosen": row["rejected"], "rejected": row["chosen"]},
    "near_duplicate": near_variant,
}
OTHER = ["other_language", "contaminated", "contaminated_near"]
EXPECTED = {
    "repeated_prompt": {"repeated_prompt", "contradiction"},
    "contradiction": {"contradiction", "contradiction first"},
    "contaminated": {"contaminated", "contaminated_near"},
}
"""Checks that more than the rows of their own name must fail; the first of a contradiction is as bad as the second."""
ALLOWED = {"repeated_prompt": {"contaminated"}, "near_duplicate": {"contaminated", "contaminated_near"}}
"""Rows that fail a check by the way, and rightly: the listed prompts are planted again and again."""


def rows(n: int, seed: int, listed: list[Row]) -> Iterator[Row]:
    """Pairs with planted defects; the list gets the prompts that are planted as contaminated."""
    rng = random.Random(seed)
    languages = {lang: Language(lang, rng) for lang in ("en", "zh")}
    classes = [*SINGLE, *DOUBLE, *OTHER]
    made = 0
    while made < n:
        lang = "en" if rng.random() < 0.5 else "zh"
        draw = rng.random() / RATE
        name = classes[int(draw)] if draw < len(classes) else "clean"
        row = pair(languages[lang], rng)
        found = [row]
        if name in SINGLE:
            found = [SINGLE[name](rng, row)]
        elif name in DOUBLE:
            first = row | {"source": f"{name} first"} if name == "contradiction" else row
            found = [first, DOUBLE[name](rng, row)]
        elif name == "other_language":
            found = [pair(languages["zh" if lang == "en" else "en"], rng) | {"lang": lang}]
        elif name.startswith("contaminated"):
            if len(listed) < LISTED:
                listed.append(row)
            source = listed[int(rng.random() * len(listed))]
            asked = near_variant(rng, source) if name == "contaminated_near" else source
            found = [row | {"prompt": asked["prompt"], "lang": source["lang"]}]
        found[-1] = found[-1] | {"source": name}
        yield from found
        made += len(found)


# ---- the run


def generate(project: Path, n: int, seed: int) -> dict[str, int]:
    """A project folder whose only source is the generated rows."""
    data = project / "data"
    folder = data / "added" / "bench"
    folder.mkdir(parents=True)
    listed: list[Row] = []
    counts: Counter[str] = Counter()
    with (folder / "pairs.jsonl").open("wb") as file:
        for row in rows(n, seed, listed):
            counts[row["source"]] += 1
            file.write(orjson.dumps(row) + b"\n")
    with (data / "decontaminate.jsonl").open("wb") as file:
        for row in listed:
            file.write(orjson.dumps({"prompt": row["prompt"][0]["content"]}) + b"\n")
    source = (ROOT / "data" / "sources.lock").read_text(encoding="utf-8")
    entry = {"sha256": sha256_file(folder / "pairs.jsonl"), "rows": sum(counts.values()), "files": {}}
    (data / "sources.lock").write_text(re.sub(r"(?m)^added:.*", f"added: {json.dumps({'bench': entry})}", source))
    shutil.copy(ROOT / "params.yaml", project)
    return dict(counts)


def child(project: Path) -> None:
    """Prepare and validate, in this process; the seconds of both go to seconds.json."""
    from components.prepare.stage import prepare_data
    from components.validate.stage import run_validate

    config = load_config(project / "params.yaml", ["prepare.preferences=[]"])
    seconds = {}
    started = time.monotonic()
    prepare_data(config.prepare, project / "data")
    seconds["prepare"] = time.monotonic() - started
    base = project / "base"  # as fetch writes it, with a manifest
    shutil.copytree(ROOT / "data" / "base_model", base, copy_function=os.link, dirs_exist_ok=True)
    write_manifest(base)
    started = time.monotonic()
    reports = (project / "report.html", project / "report.md")
    try:
        run_validate(config.validate_, config.model.max_length, project / "data", base, project / "clean", *reports)
    except DataValidationError as stop:
        print(stop)
    seconds["validate"] = time.monotonic() - started
    write_json(project / "seconds.json", seconds)


def measured(project: Path) -> dict[str, Any]:
    """Run the child and sample the memory of its process tree; what its processes share is counted once.

    `cpu_seconds` are of the whole tree: with other work on the machine `seconds` may be much more than half of it.
    """
    environment = os.environ | {"KUBEALIGN_HOME": str(project / "home"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(project)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:CORES]))
    peak = 0
    before = _cpu_seconds()
    started = time.monotonic()
    with subprocess.Popen(["taskset", "-c", cores, *command], env=environment, cwd=ROOT) as running:
        tree = psutil.Process(running.pid)
        while running.poll() is None:
            peak = max(peak, _memory(tree))
            time.sleep(0.2)
    if running.returncode:
        raise SystemExit(f"the run failed with exit code {running.returncode}")
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": _cpu_seconds() - before,
        "peak_mib": peak / 2**20,
        "parts": read_json(project / "seconds.json"),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(tree: psutil.Process) -> int:
    total = 0
    for process in [tree, *_children(tree)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.Error:
        return []


def score(project: Path, planted: dict[str, int]) -> dict[str, dict[str, float]]:
    """Recall and precision of every planted class on the preference pairs."""
    names = {
        split: [row["source"] for _, row in iter_lines(project / "data" / "preferences" / f"{split}.jsonl")]
        for split in SPLITS
    }
    reached = Counter(name for found in names.values() for name in found)
    assert reached == planted, "prepare loses no row"
    flagged: dict[str, Counter[str]] = {}
    for _, entry in iter_lines(project / "clean" / "quarantine.jsonl"):
        for reason in entry["reasons"] if entry["data_set"] == "preferences" else ():
            flagged.setdefault(reason, Counter())[entry["row"]["source"]] += 1
    for _, entry in iter_lines(project / "clean" / "warnings.jsonl"):
        for reason in entry["checks"] if entry["data_set"] == "preferences" else ():
            flagged.setdefault(reason, Counter())[names[entry["split"]][entry["line"] - 1]] += 1
    scores = {}
    for name in [*SINGLE, *DOUBLE, "other_language", "contaminated"]:
        expected = EXPECTED.get(name, {name})
        there = sum(planted[part] for part in expected)
        right = sum(flagged.get(name, Counter())[part] for part in expected)
        every = sum(flagged.get(name, Counter()).values())
        rightly = right + sum(flagged.get(name, Counter())[part] for part in ALLOWED.get(name, ()))
        precision = rightly / max(1, every)
        scores[name] = {"planted": there, "flagged": every, "recall": right / there, "precision": precision}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="kept; otherwise a temporary one")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory(prefix="kubealign-bench-") as temporary:
        project = options.folder or Path(temporary)
        planted = generate(project, options.rows, options.seed)
        size = (project / "data" / "added" / "bench" / "pairs.jsonl").stat().st_size
        print(f"{sum(planted.values())} pairs, {size / 1e6:.0f} MB", flush=True)
        result = {"rows": sum(planted.values()), "bytes": size} | measured(project)
        result |= {"classes": score(project, planted), "cores": CORES, "python": platform.python_version()}
        result["params"] = hashlib.sha256((ROOT / "params.yaml").read_bytes()).hexdigest()
    write_json(OUT, result)
    print(
        json.dumps(
            {key: result[key] for key in ("rows", "bytes", "seconds", "cpu_seconds", "parts", "peak_mib")}, indent=1
        )
    )
    for name, found in result["classes"].items():
        print(f"{name:18} planted {found['planted']:6} recall {found['recall']:.4f} precision {found['precision']:.4f}")


if __name__ == "__main__":
    main()
