"""SFT of the embedded model with 1 and 2 processes and several token budgets; writes the table of docs/scaling.md.

Run it from the project's folder after `make data`: python tests/bench/scaling.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from components.common.files import write_text
from components.config.params import load_config

ROOT = Path(__file__).resolve().parents[2]

POINTS = [(1, 1024), (1, 2048), (1, 4096), (2, 2048)]
STEPS = 4
"""Optimiser steps of a point; the first is left out, which allocates and compiles."""


def measure(processes: int, tokens: int, folder: Path) -> dict[str, float]:
    """Tokens a second, seconds a step and peak memory (MiB) of the first process, medians over the steps."""
    settings = [f"sft.max_steps={STEPS}", f"sft.max_tokens_per_microbatch={tokens}", "sft.eval_every_steps=0"]
    config = load_config(ROOT / "params.yaml", [*settings, "sft.compute_ref_log_probs=false"])
    (folder / "params.yaml").write_text(yaml.safe_dump(config.sections()))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += ["-m", "components", "sft", "--params", str(folder / "params.yaml"), "--dataset", str(folder / "clean")]
    words += ["--base", str(folder / "base"), "--out", str(folder / "out")]
    cores = max(1, (os.cpu_count() or 1) // processes)
    home = {"KUBEALIGN_HOME": str(folder / f"home-{processes}-{tokens}"), "OMP_NUM_THREADS": str(cores)}
    subprocess.run(words, check=True, env=os.environ | home, stdout=subprocess.DEVNULL)
    lines = (folder / "out" / "history.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) for line in lines]
    seconds = [record["seconds"] for record in records]
    return {
        "seconds": statistics.median(seconds),
        "speed": sum(record["tokens"] for record in records) / sum(seconds),
        "memory": max(record["memory_mib"] for record in records),
    }


def prepare(folder: Path) -> None:
    """A validated copy of the real data, and the base model with its manifest."""
    door = [sys.executable, "-m", "components"]
    given = ["--dataset", str(folder / "dataset"), "--base", str(folder / "base")]
    home = os.environ | {"KUBEALIGN_HOME": str(folder / "home")}
    for words in (["fetch"], ["validate", *given]):
        subprocess.run([*door, *words, "--out", str(folder)], check=True, env=home, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure every point and write the table."""
    os.chdir(ROOT)
    rows = [
        "| processes | tokens in a pass | tokens/s | seconds a step | memory of a process, MiB |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for processes, tokens in POINTS:
            found = measure(processes, tokens, Path(name))
            row = f"| {processes} | {tokens} | {found['speed']:.0f} | {found['seconds']:.1f} | {found['memory']:.0f} |"
            rows.append(row)
            print(row, flush=True)
    page = ROOT / "docs" / "scaling.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- bench:scaling -->\n")
    after = rest.partition("<!-- /bench:scaling -->")[2]
    table = "\n".join(rows)
    write_text(page, f"{before}<!-- bench:scaling -->\n{table}\n<!-- /bench:scaling -->{after}")


if __name__ == "__main__":
    main()
