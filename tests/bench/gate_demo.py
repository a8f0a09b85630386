"""Four models before the shipped gate, on the embedded model and real pairs: `make gate-demo`.

A better model is promoted, an equal one (the same training with another seed) is not, a worse one (trained on swapped
labels) is refused, and so is a lucky small sample: the twelve test pairs on which the equal model happens to look best.
Then the champion is changed by force, rolled back, and verified.

The first two are whole runs of `kubealign run`; SFT is trained once and comes from the cache. The other two do the
steps dpo, evaluate and register on a changed copy of the clean data, since other data would make a whole run train SFT
again. Pairs may have 1,024 tokens and DPO takes two passes (768 and one are shipped), so that there are enough test
pairs and enough training to show that it helps; SFT takes ten steps, and one pass is enough to become worse.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from components.common.files import digest, sha256_file, write_manifest
from components.config.params import Config, load_config
from components.dataset.records import read_lines, write_lines
from components.dpo.stage import run_dpo
from components.evaluate.candidates import Inputs
from components.evaluate.stage import run_evaluate
from components.gate.statistics import compared_loss
from components.register.package import content_digest
from components.register.stage import Lineage, RegisterInputs, run_register
from components.registry.audit import Audit, next_use
from components.tracking import store

ROOT = Path(__file__).resolve().parent.parent.parent
HOME = ROOT / "build" / "gate-demo"
TRAINING = [
    "model.max_length=1024",
    "sft.max_steps=10",
    "dpo.epochs=2",
    "dpo.eval_every_steps=43",
    "evaluate.generations_per_language=2",
    "evaluate.max_new_tokens=48",
]
EXPECTED = {"better": ["better"], "equal": ["no evidence"], "worse": ["worse", "no evidence"], "lucky": ["refused"]}
LUCKY_PAIRS = 12
console = Console(width=150)


@dataclass
class Demo:
    """The registered model of this demonstration, new each time, and how it is trained."""

    name: str
    sets: list[str]

    def words(self, command: str, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "pipelines.cli", command, *words, "--project", str(ROOT)]

    def config(self, *sets: str) -> Config:
        return load_config(ROOT / "params.yaml", [*self.sets, *sets])

    def run(self, *sets: str) -> dict[str, Any]:
        """A whole run."""
        options = [word for setting in (*self.sets, *sets) for word in ("--set", setting)]
        subprocess.run(self.words("run", *options), check=True)
        done = subprocess.run(self.words("report", "--json"), check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def judge(self, first: dict[str, Any], clean: Path, policy: Path, out: Path) -> dict[str, Any]:
        """evaluate and register on a data set of our making, against the champion, as a run with that data does."""
        client, config = store.client(), self.config()
        test = Path("preferences", "test.jsonl")
        pairs = sha256_file(clean / test)
        test_set = first["test_set"] if pairs == sha256_file(step("validate/clean") / test) else pairs[:32]
        incumbent = f"models:/{self.name}/{first['version']}"
        decision = digest([content_digest(policy, "merged"), incumbent, test_set])[:32]
        audit = Audit.find(client, self.name)
        assert audit, "there is a first run"
        told = {field.name: first[field.name] for field in fields(Lineage)}
        # As if a commit held the changed data: what is shown is what the other rules make of it.
        lineage = replace(Lineage(**told), incumbent=incumbent, test_set=test_set, decision=decision, data_clean=True)
        lineage = replace(lineage, decision_index=next_use(audit.decisions(test_set), decision), lineage=decision)
        base, sft = step("fetch/base"), step("sft/sft_model")
        inputs = Inputs(clean, base, sft, policy, incumbent, lineage.decision_index, lineage.data_clean, test_set)
        reports = (out / "report.html", out / "report.md")
        run_evaluate(config.evaluate, config.gate, config.model, inputs, {}, "", out / "evaluation", *reports)
        judged = RegisterInputs(policy, base, out / "evaluation", clean, out / "report.html")
        runs = {name: found["run_id"] for name, found in first["stages"].items() if name != "register"}
        return run_register(config.register_, config.gate, lineage, runs, judged, out / "result.json")


def step(output: str) -> Path:
    """The newest output of a step, such as `fetch/base`."""
    return max((HOME / "steps").glob(f"*/{output}"), key=lambda path: path.stat().st_mtime)


def policy_of(version: str, name: str) -> Path:
    """The folder that dpo wrote for a version."""
    wanted = store.client().get_model_version(name, version).tags["kubealign.model"]
    folders = (HOME / "steps").glob("*/dpo/policy")
    return next(folder for folder in folders if content_digest(folder, "merged") == wanted)


def changed_data(name: str, split: str, change: Any) -> Path:
    """A copy of the clean data in which the preference pairs of a split are changed."""
    folder = HOME / "data" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(step("validate/clean"), folder)
    path = folder / "preferences" / f"{split}.jsonl"
    write_lines(path, change(read_lines(path)))
    write_manifest(folder)
    return folder


def swapped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def luckiest(version: dict[str, Any]) -> set[str]:
    """Ids of the test pairs on which a model gains most over the champion."""
    import mlflow

    found = json.loads(mlflow.artifacts.load_text(f"{version['model_uri']}/artifacts/evaluation.json"))
    rival = "incumbent" if "incumbent" in found["models"] else "sft"
    scale = {name: found["models"][name]["scale"] for name in ("policy", rival)}
    losses = {
        name: compared_loss(np.array([row["margins"][name] for row in found["held_out"]]), scale[name])
        for name in scale
    }
    order = np.argsort(losses["policy"] - losses[rival])
    return {found["held_out"][number]["id"] for number in order[:LUCKY_PAIRS]}


def row(name: str, result: dict[str, Any]) -> tuple[list[str], bool]:
    """A line of the table, and whether it is what was expected."""
    verdict = result["verdict"]
    gain = result["comparisons"]["incumbent" if verdict["incumbent"] else "sft"]
    estimate = gain["improvement"]
    failed = [rule["name"] for rule in verdict["rules"] if rule["outcome"] == "fail"]
    as_expected = verdict["verdict"] in EXPECTED[name] and (result["decided"]["state"] == "promoted") == (
        name == "better"
    )
    cells = [
        name,
        verdict["incumbent"].replace("models:/", "champion ") or "SFT model",
        str(estimate["n"]),
        f"{estimate['value']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]",
        f"{gain['p_value']:.4f}",
        f"{verdict['alpha_for_decision']:.4f} ({verdict['decision_index']})",
        verdict["verdict"],
        ", ".join(failed) or "none",
        result["decided"]["state"],
        "yes" if as_expected else "NO",
    ]
    return cells, as_expected


def main() -> int:
    """Train, judge, print the table, roll back, verify; 1 when a verdict is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    os.environ[store.HOME_VARIABLE] = str(HOME)
    demo = Demo("", [])
    demo.name = f"demo-{int(time.time())}"
    demo.sets = [*TRAINING, *given.set, f"register.name={demo.name}"]
    results = {"better": demo.run(), "equal": demo.run("dpo.seed=77")}
    first = results["better"]
    out = HOME / "data"
    data = changed_data("swapped", "train", swapped)
    config = demo.config("dpo.epochs=1")
    policy = out / "worse" / "policy"
    run_dpo(config.dpo, config.model, data, step("fetch/base"), step("sft/sft_model"), policy)
    results["worse"] = demo.judge(first, data, policy, out / "worse")
    lucky = luckiest(results["equal"])
    data = changed_data("small", "test", lambda rows: [each for each in rows if each["id"] in lucky])
    equal = policy_of(results["equal"]["version"], demo.name)
    results["lucky"] = demo.judge(first, data, equal, out / "lucky")
    titles = ("run", "against", "pairs", "improvement, nats", "p", "level (use)", "verdict", "rules failed", "decided")
    table = Table(*titles, "as expected", box=box.SIMPLE_HEAD)
    good = True
    for name, result in results.items():
        cells, as_expected = row(name, result)
        good &= as_expected
        table.add_row(*cells)
    console.print(table)
    if results["better"]["decided"]["state"] != "promoted":
        console.print("the first model did not become champion, so there is nothing to roll back to")
        return 1
    forced = ("--force", "--reason", "to have something to roll back", "--name", demo.name)
    subprocess.run(demo.words("promote", str(results["worse"]["version"]), *forced), check=True)
    subprocess.run(
        demo.words("rollback", "--reason", "it was trained on swapped labels", "--name", demo.name), check=True
    )
    subprocess.run(demo.words("history", "--name", demo.name), check=True)
    subprocess.run(demo.words("verify", f"models:/{demo.name}@champion"), check=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
