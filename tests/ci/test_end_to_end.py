"""From a change of the data to a verdict, without any hosted CI: `make ci-e2e`.

A bare git repository and a DVC remote (a folder, then a real S3 store); branches are pull requests; the commands are
those of .github/workflows, parsed from there. MLflow is a real server, GitHub a strict stub, the webhook's receiver a
real one. The tests run in order, as a team's week would.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.provenance import write_code_of_data
from components.dataset.records import SPLITS, content_id
from tests.ci.workflow import Job, use_environment
from tests.conftest import ROOT, environment_without_home
from tests.stubs.github import GitHubStub
from tests.stubs.receiver import Receiver
from tests.support.repositories import git
from tests.support.services import S3, mlflow_server, s3_server

pytestmark = pytest.mark.ci
WORKFLOWS = ROOT / ".github" / "workflows"
COUNTS = {"train": 48, "validation": 16, "test": 40}
SETTINGS: dict[str, Any] = {
    "model.precision": "fp32",
    "model.max_length": 128,
    "validate.min_rows": 4,
    "sft.max_steps": 1,
    "dpo.epochs": 2.0,
    "dpo.learning_rate": 1e-2,
    "evaluate.generations_per_language": 0,
    "evaluate.bootstrap_resamples": 1000,
    "gate.min_pairs": 20,
}
EN = "rivers bridges gardens violins harbours candles maps clocks lanterns forests kettles meadows ladders puzzles"
ZH = "河流 桥梁 花园 小提琴 港口 蜡烛 地图 时钟 灯笼 森林 水壶 草地 梯子 拼图"


def make_rows(split: str, kind: str, start: int = 0, count: int = 0, swapped: bool = False) -> list[dict[str, Any]]:
    """Pairs whose chosen answer begins with one word and whose rejected answer begins with another."""
    rows = []
    for number in range(start, start + (count or COUNTS[split])):
        lang = "zh" if number % 2 else "en"
        words = (ZH if lang == "zh" else EN).split()
        first, second = words[number // 2 % len(words)], words[(number // 2 * 5 + 3 + SPLITS.index(split)) % len(words)]
        if lang == "en":
            text = f"Which {first} did the {split} visitors of town {number} compare with {second}?"
            good, bad = (f"{word} ask: the {first} of town {number}." for word in ("Certainly", "Never"))
        else:
            text = f"第{number}个镇的{first}和{second}有什么不同？（{split}）"
            good, bad = (f"{word}，第{number}个镇的{first}。" for word in ("当然可以", "绝对不行"))
        if swapped:
            good, bad = bad, good
        prompt = [{"role": "user", "content": text}]
        answers = {"chosen": good, "rejected": bad} if kind == "preferences" else {"response": good}
        facts = {"lang": lang, "source": "made", "license": "Apache-2.0"}
        identity = {"id": content_id(prompt, *answers.values()), "group": content_id(prompt)}
        rows.append(identity | {"prompt": prompt} | facts | answers)
    return rows


def leak(count: int) -> list[dict[str, Any]]:
    """Pairs on prompts of the test side, with answers of their own."""
    rows = make_rows("test", "preferences")[:count]
    for row in rows:
        row["chosen"] += " Indeed."
        row["id"] = content_id(row["prompt"], row["chosen"], row["rejected"])
    return rows


class Team:
    """A repository with its pull requests, the servers around it, and a person's clone."""

    def __init__(self, folder: Path, tiny: Path, github: GitHubStub, receiver: Receiver, mlflow: str, s3: S3) -> None:
        self.folder, self.github, self.receiver, self.mlflow, self.s3 = folder, github, receiver, mlflow, s3
        self.origin, self.clone = folder / "origin.git", folder / "clone"
        self.pull_request = 0
        self.environment = environment_without_home()
        self.environment |= github.environment | s3.environment | receiver.environment
        self.environment |= {
            "MLFLOW_TRACKING_URI": mlflow,
            "KUBEALIGN_HOME": str(folder / "home"),
            "PYTHONSAFEPATH": "1",
            "COLUMNS": "200",
        }
        del self.environment["GITHUB_TOKEN"]
        git(folder, "init", "-q", "--bare", "-b", "main", str(self.origin))
        self._begin(tiny)

    def _begin(self, tiny: Path) -> None:
        git(self.folder, "clone", "-q", str(self.origin), str(self.clone))
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in names.splitlines():
            if not name.startswith(("tests/", "docs/", "k8s/")) and (ROOT / name).is_file():
                (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.clone / name)
        self.set(**SETTINGS)
        shutil.copytree(tiny, self.clone / "data" / "base_model")
        (self.clone / ".dvc" / "config").write_text("")
        self.remote("folder", str(self.folder / "dvc-remote"))
        use_environment(self.clone)
        write_code_of_data(self.clone / "data")
        for kind in ("preferences", "instructions"):
            self.write(kind, {split: make_rows(split, kind) for split in SPLITS})
        self.keep("the first data")
        git(self.clone, "push", "-q", "origin", "HEAD:main")

    def dvc(self, *words: str) -> None:
        subprocess.run(
            [sys.executable, "-P", "-m", "dvc", *words], cwd=self.clone, env=self.environment, check=True, stdout=2
        )

    def remote(self, name: str, url: str) -> None:
        self.dvc("remote", "add", "-q", "-f", "-d", name, url)

    def set(self, **values: Any) -> None:
        params = yaml.safe_load((self.clone / "params.yaml").read_text())
        for key, value in values.items():
            section, name = key.split(".")
            params[section][name] = value
        (self.clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def write(self, kind: str, rows: dict[str, list[dict[str, Any]]]) -> None:
        folder = self.clone / "data" / kind
        folder.mkdir(exist_ok=True)
        for split, found in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (folder / f"{split}.jsonl").unlink(missing_ok=True)  # DVC's file may be a link into its cache
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    def keep(self, message: str) -> str:
        """What a person does after a change of the data."""
        self.dvc("commit", "-q", "-f")
        self.dvc("push", "-q")
        return self.commit(message)

    def commit(self, message: str) -> str:
        git(self.clone, "add", "-A")
        git(self.clone, "commit", "-qm", message)
        return git(self.clone, "rev-parse", "HEAD")

    def branch(self, name: str) -> None:
        git(self.clone, "fetch", "-q")
        git(self.clone, "checkout", "-q", "-B", name, "origin/main")

    def job(self, workflow: str, name: str, context: dict[str, Any]) -> Job:
        folder = self.folder / f"{workflow}-{len(list(self.folder.glob('*.sh')))}"
        variables = {"KUBEALIGN_RUNNER": "subprocess", "MLFLOW_TRACKING_URI": self.mlflow}
        secrets = self.receiver.environment | {
            "DVC_ACCESS_KEY_ID": self.s3.environment["AWS_ACCESS_KEY_ID"],
            "DVC_SECRET_ACCESS_KEY": self.s3.environment["AWS_SECRET_ACCESS_KEY"],
        }
        token = {"token": self.github.environment["GITHUB_TOKEN"], "repository": "team/alignment"}
        contexts = {"github": context | token, "vars": variables, "secrets": secrets}
        environment = self.environment | {"PYTHONPATH": str(folder)}
        # The keys of the DVC remote come from the workflow's secrets or not at all.
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del environment[key]
        return Job(WORKFLOWS / f"{workflow}.yml", name, folder, self.origin, contexts, environment)

    def propose(self) -> tuple[bool, Job]:
        """Open a pull request of the branch, which runs data.yml; also again, after another push to it."""
        git(self.clone, "push", "-q", "-f", "origin", "HEAD")
        sha = git(self.clone, "rev-parse", "HEAD")
        head = {"sha": sha, "repo": {"full_name": "team/alignment"}}
        event = {"pull_request": {"number": self.pull_request, "head": head}}
        job = self.job("data", "report", {"event": event, "sha": sha})
        return job.run(), job

    def merge(self) -> tuple[bool, Job, str]:
        """Merge the branch, which runs retrain.yml."""
        before = git(self.clone, "rev-parse", "origin/main")
        git(self.clone, "push", "-q", "origin", "HEAD:main")
        sha = git(self.clone, "rev-parse", "HEAD")
        self.github.pull_requests[sha] = self.pull_request
        job = self.job("retrain", "retrain", {"event_name": "push", "sha": sha, "event": {"before": before}})
        return job.run(), job, sha

    def versions(self) -> int:
        """How many versions the registry has."""
        from mlflow import MlflowClient

        return len(MlflowClient(self.mlflow, self.mlflow).search_model_versions("name = 'kubealign'"))

    def verdict(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((job.uploaded / "verdict.json").read_text())
        return found


@pytest.fixture(scope="module")
def team(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with ExitStack() as stack:
        github, receiver = stack.enter_context(GitHubStub()), stack.enter_context(Receiver())
        (folder / "mlflow").mkdir()
        mlflow = stack.enter_context(mlflow_server(folder / "mlflow"))
        s3 = stack.enter_context(s3_server(folder / "s3"))
        yield Team(folder, tiny_model, github, receiver, mlflow, s3)


def show(title: str, text: str) -> None:
    print(f"\n===== {title}\n{text}", flush=True)


def test_more_data_becomes_a_comment_and_after_the_merge_a_challenger_with_a_verdict(team: Team) -> None:
    team.branch("more-chinese")
    team.pull_request = 7
    rows = make_rows("train", "preferences")
    more = [row for row in make_rows("train", "preferences", 100, 8) if row["lang"] == "zh"]
    team.write("preferences", {"train": rows + more})
    team.keep("more Chinese pairs")
    passed, job = team.propose()
    assert passed, job.log
    (comment,) = team.github.of(7)
    assert "| preferences | zh | made | 4 | 0 | 0 |" in comment and "Validation: accepted" in comment, comment
    assert not any(row["chosen"] in comment for row in more)
    passed, job, sha = team.merge()
    assert passed, job.log
    show("the pull request", "\n\n".join(team.github.of(7)))
    found = team.verdict(job)
    assert found["state"] == "verdict" and found["new"] and found["commit"] == sha
    assert found["verdict"] == "better" and "challenger" in found["aliases"] and found["rules"], found
    assert found["model_uri"] == "models:/kubealign/1" and "champion" in found["aliases"]
    assert (job.uploaded / "report.html").read_text().startswith("<!doctype html>")
    assert [status["state"] for _, status in team.github.statuses] == ["success"]
    assert team.github.statuses[0][0] == sha
    assert "## Verdict: better" in job.summary.read_text() and "| retrain | " not in job.summary.read_text()
    assert sum("## Verdict" in text for text in team.github.of(7)) == 1
    assert [event["type"] for event in team.receiver.events] == ["retrain.verdict"]


def test_the_same_commit_is_not_trained_again(team: Team) -> None:
    context = {"event_name": "schedule", "sha": git(team.clone, "rev-parse", "HEAD"), "event": {}}
    job = team.job("retrain", "retrain", context)
    assert job.run(), job.log
    assert "judged before" in job.log and "sft" not in job.log.split("kubealign ci retrain")[1]
    assert not team.verdict(job)["new"] and len(team.receiver.events) == 1


def test_a_change_of_words_alone_trains_nothing(team: Team) -> None:
    team.branch("words")
    (team.clone / "README.md").write_text("other words\n")
    team.commit("words")
    passed, job, _ = team.merge()
    assert passed and not any("ci retrain" in command for command in job.ran), job.log


def test_leaked_test_prompts_are_refused_with_their_rows_and_the_comment_is_updated_when_mended(team: Team) -> None:
    team.branch("leak")
    team.pull_request = 8
    rows, leaked = make_rows("train", "preferences"), leak(16)
    team.write("preferences", {"train": rows + leaked})
    team.keep("more pairs")
    passed, job = team.propose()
    assert not passed
    (comment,) = team.github.of(8)
    show("a leak", comment)
    assert "Validation: rejected" in comment and "leak" in comment
    assert f"| data/preferences/train.jsonl | {len(rows) + 1} | {leaked[0]['id']} |" in comment
    assert leaked[0]["chosen"] not in comment and leaked[0]["prompt"][0]["content"] not in comment
    team.write("preferences", {"train": rows})
    team.keep("without the test's prompts")
    passed, job = team.propose()
    assert passed, job.log
    (comment,) = team.github.of(8)
    assert "Validation: rejected" not in comment and (
        "accepted" in comment or "Neither the data nor its settings" in comment
    )


def test_a_leak_that_is_merged_all_the_same_makes_no_model(team: Team) -> None:
    team.branch("leak-merged")
    team.pull_request = 9
    team.write("preferences", {"train": make_rows("train", "preferences") + leak(16)})
    team.keep("more pairs")
    passed, job, sha = team.merge()
    assert not passed
    found = team.verdict(job)
    assert found["state"] == "failed" and "leak" in found["error"], found
    assert team.github.statuses[-1][0] == sha and team.github.statuses[-1][1]["state"] == "failure"
    assert "Retraining: failed" in team.github.of(9)[0] and team.receiver.events[-1]["type"] == "retrain.failed"


def test_swapped_labels_are_refused_by_the_verdict(team: Team) -> None:
    team.branch("swapped")
    team.pull_request = 10
    team.remote("s3", f"s3://{team.s3.bucket}/dvc")
    team.dvc("remote", "modify", "s3", "endpointurl", team.s3.endpoint)
    team.write("preferences", {"train": make_rows("train", "preferences", swapped=True)})
    team.keep("labels from another annotator, and a remote in S3")
    passed, job = team.propose()
    assert passed, job.log
    before = team.versions()
    passed, job, _ = team.merge()
    assert passed, job.log
    found = team.verdict(job)
    show("swapped labels", "\n".join(team.github.of(10)))
    show("the verdict", json.dumps(found, indent=1, ensure_ascii=False))
    assert not found["passed"] and found["verdict"] in ("worse", "no evidence") and "champion" not in found["aliases"]
    assert "challenger" in found["aliases"] and found["model_uri"] == f"models:/kubealign/{before + 1}"
    failing = [rule for rule in found["rules"] if rule["outcome"] == "fail"]
    assert failing and all(rule["found"] is not None and rule["expected"] for rule in failing)
    assert any(f"| {rule['name']} | **fail** |" in team.github.of(10)[-1] for rule in failing)
