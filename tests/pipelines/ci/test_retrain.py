"""`kubealign ci retrain` on Kubeflow: KFP's real client against the strict stub, a real git and DVC repository, a real
MLflow database in which a stand-in for the cluster's steps records what they would.
"""

import contextlib
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from rich.console import Console

from components.common.errors import EvidenceError, InputError, InterruptedRunError, KubealignError, RunPendingError
from components.registry.evidence import RESULT_SIGNATURE, result_statement
from components.tracking import store
from pipelines import kubeflow
from pipelines.ci import follow, notify, retrain
from pipelines.ci import job as job_module
from pipelines.ci.judged import judged_before
from pipelines.ci.plan import make_plan
from tests.stubs.kfp_server import ABOUT_US, KfpServer, RefusalError, Run, closed, status
from tests.stubs.receiver import Receiver
from tests.support.clone import Clone, appended, setting
from tests.support.repositories import git
from tests.support.services import free_port

pytestmark = pytest.mark.integration

RUNS = "/apis/v2beta1/runs"
RULES = [
    {"name": "superiority", "outcome": "fail", "found": 0.31, "expected": "p <= 0.025", "sentence": "p = 0.31"},
    {"name": "min_pairs", "outcome": "pass", "found": 98, "expected": "at least 50", "sentence": "98 held-out pairs"},
]
ESTIMATE = {"value": 0.61, "low": 0.5, "high": 0.7, "n": 98}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("clone"))
    (clone.root / ".gitignore").write_text(".kubealign/\nbuild/\n")
    clone.base = clone.commit(setting("cluster.retries", 2))
    git(clone.root, "branch", "-f", "main", clone.base)
    git(clone.root, "remote", "add", "origin", "https://robot:t0k3n@git.example.com/team/alignment.git")
    return clone


@pytest.fixture(autouse=True)
def environment(
    clone: Clone, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_compiler: None
) -> None:
    for name in list(os.environ):
        if name.startswith(("KFP_", "KF_PIPELINES_", "KUBEALIGN_WEBHOOK")):
            monkeypatch.delenv(name)
    git(clone.root, "checkout", "-q", clone.base)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database(tmp_path)}")
    monkeypatch.setattr(kubeflow, "POLL_S", 0.01)
    monkeypatch.setattr(kubeflow, "SERVICE_ACCOUNT_TOKEN", Path("/nonexistent"))
    monkeypatch.setattr(follow, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(notify, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr("sys.argv", ["/x/kubealign", "ci", "retrain", "--retry-timeout", "5"])


_EMPTY: list[bytes] = []


def database(folder: Path) -> Path:
    """An MLflow database of the test's own; making its tables takes two seconds, once."""
    path = folder / "mlflow.db"
    if not _EMPTY:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
            store.client().search_experiments()
        _EMPTY.append(path.read_bytes())
    path.write_bytes(_EMPTY[0])
    return path


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with KfpServer() as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        server.next_run = Run(None, ["PENDING", "RUNNING", "SUCCEEDED"])
        yield server


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def say(line: str) -> None:
    print(line)


def make_job(clone: Clone, out: Path, *sets: str, rerun: bool = False, retry_timeout_s: float = 5.0) -> job_module.Job:
    console = Console(width=200, force_terminal=False)
    return job_module.make_job(clone.root, list(sets), "kubeflow", rerun, out, retry_timeout_s, 60, console)


def record(job: job_module.Job, kfp_run: str, signs: bool = True, **changes: Any) -> str:
    """What the steps of a run record in MLflow; returns the parent run."""
    client = store.client()
    experiment = store.experiment_id(client)
    parent = client.create_run(
        experiment, tags={"kubealign.kind": "pipeline", "kubealign.kfp_run": kfp_run}
    ).info.run_id
    tags = {"kubealign.stage": "resolve", "mlflow.parentRunId": parent}
    resolve = client.create_run(experiment, tags=tags).info.run_id
    facts = {"lineage": job.facts.lineage, "config": job.facts.config, "project_commit": job.judges}
    for key, value in (facts | {"code_evaluate": job.facts.code["evaluate"]}).items():
        client.log_param(resolve, key, value)
    if not client.search_registered_models():
        client.create_registered_model("kubealign")
    version = str(client.create_model_version("kubealign", "file:///nowhere").version)
    client.set_registered_model_alias("kubealign", "challenger", version)
    uri = f"models:/kubealign/{version}"
    metrics = {"preference_log_loss": ESTIMATE, "rewards/accuracies": ESTIMATE, "rewards/margins": ESTIMATE}
    sentence = "There is no evidence that the policy is better than the SFT model."
    verdict = {"passed": False, "verdict": "no evidence", "sentence": sentence, "rules": RULES, "decision_index": 1}
    verdict |= {"alpha_for_decision": 0.025, "incumbent": ""}
    result = {"run_id": parent, "model": "kubealign", "version": version, "model_uri": uri, "verdict": verdict}
    result |= {"metrics": {"sft": metrics, "policy": metrics}, "stages": {}, "data_commit": job.commit} | facts
    result["decided"] = {"state": "gate_failed", "sentence": "not promoted: no evidence"}
    texts = ("instructions_digest", "test_set", "base_reference", "base_digest", "incumbent", "decision")
    result |= dict.fromkeys(texts, "") | {"aliases": [], "promote": True, "data_clean": True, "decision_index": 1}
    result |= {"languages": {}, "comparisons": {}, "policy_metrics": None}
    result |= {"preferences_digest": "p", "git_commit": job.commit} | changes
    texts = {"result.json": json.dumps(result), "report.html": "<!doctype html>"}
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if signs:
        texts[RESULT_SIGNATURE] = result_statement(parent, files).decode()
    for name, text in texts.items():
        client.log_text(parent, text, name)
    for key, value in (("version", uri), ("verdict", "no evidence"), ("lineage", facts["lineage"])):
        client.set_tag(parent, f"kubealign.{key}", value)
    client.set_terminated(parent)
    return str(parent)


def recording(kfp: KfpServer, job: job_module.Job, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let every run that the stub starts record a result at once."""
    original: Callable[..., Any] = kfp._create_run

    def create(request: Any) -> Any:
        answer = original(request)
        record(job, answer["run_id"], **changes)
        return answer

    monkeypatch.setattr(kfp, "_create_run", create)


def written(out: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """verdict.json, status.json, summary.md."""
    found = [json.loads((out / name).read_text()) for name in ("verdict.json", "status.json")]
    return found[0], found[1], (out / "summary.md").read_text()


def test_a_verdict_is_told_in_files_and_to_the_webhook_and_not_asked_for_twice(
    clone: Clone,
    kfp: KfpServer,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "ci"
    job = make_job(clone, out)
    recording(kfp, job, monkeypatch)
    assert retrain.retrain(job) == 0
    ((run_id, run),) = kfp.runs.items()
    given = run.body.runtime_config.parameters
    assert given["data_revision"] == clone.base and run.body.display_name == f"alignment {clone.base[:12]} {job.key}"
    assert json.loads(given["data_section"])["repo"] == "https://git.example.com/team/alignment.git"
    verdict, state, summary = written(out)
    assert verdict["state"] == "verdict" and verdict["new"] and not verdict["passed"]
    assert (verdict["commit"], verdict["key"]) == (clone.base, job.key)
    assert verdict["link"] == f"{kfp.url}/#/runs/details/{run_id}" == state["target_url"]
    assert state["state"] == "success" and state["description"].startswith("no evidence: gate failed. There is no")
    assert len(state["description"]) <= 140
    shown = MarkdownIt("commonmark", {"html": False}).enable("table").render(summary)
    cells = [cell.split("</td>")[0] for cell in shown.split("<td>")[1:]]
    assert cells[:4] == ["superiority", "<strong>fail</strong>", "0.31", "p &lt;= 0.025"], cells
    assert cells[4:7] == ["min_pairs", "pass", "98"], cells
    assert any(cell.startswith("0.610 [0.500,") for cell in cells), cells
    assert (out / "report.html").read_text() == "<!doctype html>" and not (out / follow.STATE).exists()
    assert receiver.events[0]["type"] == "retrain.verdict" and receiver.events[0]["data"] == verdict
    capsys.readouterr()
    assert retrain.retrain(make_job(clone, out)) == 0
    said = capsys.readouterr()
    assert f"key {job.key}" in said.out and "were judged before; --rerun forces" in said.out
    assert len(kfp.runs) == 1 and len(receiver.events) == 1 and not written(out)[0]["new"]
    assert "t0k3n" not in said.out + said.err + summary


def test_a_forged_run_does_not_say_that_a_commit_was_judged(
    clone: Clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An EDIT user of the experiment makes parent and child runs with the parameters of a commit to come."""
    import mlflow

    job, client = make_job(clone, tmp_path), store.client()
    passed = {"state": "promoted", "sentence": "promoted: better"}
    record(job, "forged", signs=False, decided=passed)
    assert judged_before(job) is None
    assert "so nothing proves how it ended" in " ".join(capsys.readouterr().out.split())
    other = make_job(clone, tmp_path, "dpo.beta=0.3")
    genuine = record(other, "another commit's", decided=passed)
    assert judged_before(other)
    copy = record(job, "with the files of another run", signs=False)
    for name in ("result.json", "report.html", RESULT_SIGNATURE):
        client.log_text(copy, mlflow.artifacts.load_text(f"runs:/{genuine}/{name}"), name)
    child = client.create_run(store.experiment_id(client), tags={"kubealign.stage": "resolve"}).info.run_id
    client.set_tag(child, "mlflow.parentRunId", genuine)  # a child of a genuine run of another commit
    lost = client.create_run(store.experiment_id(client), tags={"kubealign.stage": "resolve"}).info.run_id
    client.set_tag(lost, "mlflow.parentRunId", "f" * 32)
    for run in (child, lost):
        for key, value in {"lineage": job.facts.lineage, "config": job.facts.config}.items():
            client.log_param(run, key, value)
    assert judged_before(job) is None
    client.set_tag(genuine, "kubealign.version", "models:/kubealign/1")
    with pytest.raises(EvidenceError, match="tagged with models:/kubealign/1, but its signed result is"):
        retrain.version_summary(clone.root, "1")


def test_of_three_merges_the_one_in_the_middle_is_not_lost(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queue of a CI system keeps one job that waits: here that of the second merge was dropped for the third's."""
    plan = make_plan(clone.root, "", "HEAD", "kubeflow", say)
    assert plan.sentence() == "No commit has been judged for kubealign yet, so everything counts as changed: retrain."
    assert plan.retrain and plan.images and plan.base == ""
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch)
    retrain.retrain(job)
    ((_, run),) = kfp.runs.items()
    assert run.body.runtime_config.parameters["project_commit"] == clone.base
    overridden = make_job(clone, tmp_path, "dpo.beta=0.3")
    assert make_job(clone, tmp_path, "cluster.pull_policy=Always").judges == clone.base and overridden.judges == ""
    record(overridden, "of something else")
    record(make_job(clone, tmp_path, "dpo.beta=0.4"), "forged", signs=False, project_commit="f" * 40)
    try:
        setting("dpo.beta", 0.2)(clone.root)
        git(clone.root, "commit", "-qam", "the second")
        appended("params.yaml", "# more\n")(clone.root)
        git(clone.root, "commit", "-qam", "the third")
        head = git(clone.root, "rev-parse", "HEAD")
        git(clone.root, "branch", "-f", "main", head)
        for _ in range(2):  # whatever became of the first of these jobs
            plan = make_plan(clone.root, "0" * 40, "HEAD", "kubeflow", say)
            assert plan.retrain and (plan.base, plan.head) == (clone.base, head)
        record(make_job(clone, tmp_path), "the third's")
        plan = make_plan(clone.root, "", "HEAD", "kubeflow", say)
        assert not plan.retrain and plan.base == head
        record(make_job(clone, tmp_path), "of a history that is gone", project_commit="beef" * 10)
        plan = make_plan(clone.root, "", "HEAD", "kubeflow", say)
        gone = (
            f"The last judged commit is gone ({'beef' * 10}: no such commit in this clone: was the history rewritten?)"
        )
        assert plan.retrain and plan.everything == gone
        git(tmp_path, "clone", "-q", "--depth=1", f"file://{clone.root}", "shallow")
        with pytest.raises(InputError, match="a shallow clone: .*fetch-depth: 0"):
            make_plan(tmp_path / "shallow", "", "HEAD", "kubeflow", say)
    finally:
        git(clone.root, "branch", "-f", "main", clone.base)


@pytest.mark.parametrize("name", ["result.json", RESULT_SIGNATURE])
def test_a_record_that_cannot_be_read_is_no_reason_to_train_everything_again(
    clone: Clone, tmp_path: Path, name: str
) -> None:
    job = make_job(clone, tmp_path)
    run_id = record(job, "a-run")
    (file,) = store.home().rglob(f"{run_id}/artifacts/{name}")
    content = file.read_bytes()
    file.write_bytes(b"\xff")  # it is listed, and nobody can read it
    for ask in (lambda: judged_before(job), lambda: make_plan(clone.root, "", "HEAD", "kubeflow", say)):
        with pytest.raises(InputError, match="so it is not known what has been judged: run it again") as error:
            ask()
        assert error.value.exit_code == 2
    file.unlink()
    assert judged_before(job) is None, "and one that is lost proves nothing"
    file.write_bytes(content)
    assert judged_before(job)


def test_an_mlflow_that_is_down_is_told_in_a_sentence(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:t0k3n@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="so it is not known what has been judged") as error:
        make_plan(clone.root, "", "HEAD", "kubeflow", say)
    assert "t0k3n" not in str(error.value)


def test_insisting_starts_a_run_in_which_nothing_is_cached(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path / "ci")
    recording(kfp, job, monkeypatch)
    retrain.retrain(job)
    retrain.retrain(make_job(clone, tmp_path / "ci", rerun=True))
    assert len(kfp.runs) == 2 and len(kfp.versions) == 2
    first, second = (package.spec.root.dag.tasks for package in kfp.packages.values())
    assert {name for name, task in first.items() if task.caching_options.enable_cache} == set(first) - {
        "resolve",
        "register",
    }
    assert not any(task.caching_options.enable_cache for task in second.values())


def test_other_settings_code_or_names_have_another_key_and_cluster_settings_have_not(
    clone: Clone, tmp_path: Path
) -> None:
    def key(*sets: str) -> str:
        return make_job(clone, tmp_path, *sets).key

    same = {key(), key("cluster.retries=9"), key("register.promote=false")}
    other = {key("dpo.beta=0.3"), key("gate.alpha=0.01"), key("register.name=x"), key("model.max_length=99")}
    other |= {key("register.format=adapter")}
    assert len(same) == 1 and len(other) == 5 and not same & other


def test_a_server_that_is_down_for_a_while_is_asked_again(
    clone: Clone,
    kfp: KfpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch)
    kfp.fail("GET", RUNS, status(503), times=2)
    kfp.fail("POST", RUNS, closed, times=1)
    assert retrain.retrain(job) == 0 and len(kfp.runs) == 1
    assert capsys.readouterr().out.count("; retrying in 0 s") == 3


def test_a_run_whose_start_was_never_answered_is_found_by_its_name(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch)
    create = kfp._create_run

    def started_and_lost(request: Any) -> Any:
        create(request)
        raise RefusalError(504, "upstream timed out", "a proxy's")

    monkeypatch.setattr(kfp, "_create_run", started_and_lost)
    assert retrain.retrain(job) == 0 and len(kfp.runs) == 1


def test_a_server_that_stays_down_leaves_a_state_with_which_the_same_command_goes_on(
    clone: Clone, kfp: KfpServer, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ci"
    job = make_job(clone, out, retry_timeout_s=0.2)
    recording(kfp, job, monkeypatch)
    kfp.fail("GET", f"{RUNS}/.*", status(503), times=10_000)
    with pytest.raises(RunPendingError, match="kubealign ci retrain --retry-timeout 5") as error:
        retrain.retrain(job)
    assert error.value.exit_code == 1
    state = json.loads((out / follow.STATE).read_text())
    (run_id,) = kfp.runs
    assert (state["run_id"], state["key"]) == (run_id, job.key)
    assert written(out)[0]["state"] == "unfinished" and receiver.events[-1]["type"] == "retrain.unfinished"
    kfp.faults.clear()
    monkeypatch.setattr(retrain, "judged_before", lambda job: None)  # the stand-in records before the run has ended
    assert retrain.retrain(job) == 0
    assert len(kfp.runs) == 1 and not (out / follow.STATE).exists() and written(out)[0]["state"] == "verdict"


@pytest.mark.parametrize("answer", ABOUT_US)
@pytest.mark.parametrize("phase", ["start", "wait"])
def test_an_answer_about_us_is_none_about_the_run(
    clone: Clone, kfp: KfpServer, receiver: Receiver, tmp_path: Path, answer: str, phase: str
) -> None:
    """Whatever it is, the outcome is `unfinished`, with the link, and the same command goes on with the same run."""
    out = tmp_path / "ci"
    job = make_job(clone, out, retry_timeout_s=0.1)
    kfp.next_run = Run(None, ["RUNNING"])
    kfp.fail(*(("POST", RUNS) if phase == "start" else ("GET", f"{RUNS}/.*")), ABOUT_US[answer])
    with pytest.raises(RunPendingError, match="run the same command to resume"):
        retrain.retrain(job)
    verdict, state, summary = written(out)
    assert (verdict["state"], state["state"]) == ("unfinished", "pending") and "## Retraining: unfinished" in summary
    assert receiver.events[-1]["type"] == "retrain.unfinished"
    left = json.loads((out / follow.STATE).read_text())
    if phase == "start":
        assert left["run_id"] == "" and verdict["link"] == "" and not kfp.runs
        return
    (run_id,) = kfp.runs
    assert left["run_id"] == run_id and verdict["link"] == state["target_url"] == f"{kfp.url}/#/runs/details/{run_id}"
    with pytest.raises(KubealignError):  # whoever may not ask may not cancel: the handle stays
        kfp.fail("POST", ".*:terminate", ABOUT_US[answer])
        follow.cancel_left(clone.root, out)
    assert (out / follow.STATE).exists()
    kfp.faults.clear()
    assert follow.cancel_left(clone.root, out) == [f"{run_id}: cancellation requested"]
    assert not (out / follow.STATE).exists()


def test_an_answer_about_the_run_ends_it(clone: Clone, kfp: KfpServer, tmp_path: Path) -> None:
    """Deleted, refused or over: nothing is left to go on with, nor to cancel."""
    out = tmp_path / "ci"
    handle = {"key": make_job(clone, out).key, "endpoint": kfp.url, "name": "x", "run_id": "deleted"}
    for act in (lambda: retrain.retrain(make_job(clone, out)), lambda: follow.cancel_left(clone.root, out)):
        out.mkdir(exist_ok=True)
        (out / follow.STATE).write_text(json.dumps(handle))
        with contextlib.suppress(KubealignError):
            assert act() == ["deleted: no longer exists"]
        assert not (out / follow.STATE).exists()
    assert written(out)[0]["state"] == "failed" and not kfp.runs
    (out / follow.STATE).write_text(json.dumps(handle | {"run_id": (ended := kfp.add_run("SUCCEEDED"))}))
    assert follow.cancel_left(clone.root, out) == [f"{ended}: had ended as SUCCEEDED"]
    kfp.fail("POST", RUNS, status(400))
    with pytest.raises(KubealignError, match="answered 400"):
        retrain.retrain(make_job(clone, out))
    assert written(out)[0]["state"] == "failed" and not (out / follow.STATE).exists()
    (out / follow.STATE).write_text(json.dumps(handle | {"endpoint": "https://elsewhere"}))
    with pytest.raises(InputError, match="the run is on https://elsewhere; found KFP_ENDPOINT=http"):
        follow.cancel_left(clone.root, out)
    assert (out / follow.STATE).exists()


def test_an_mlflow_that_falls_silent_after_the_run_says_nothing_about_it(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ci"
    job = make_job(clone, out)
    recording(kfp, job, monkeypatch)
    monkeypatch.setattr(retrain, "judged_before", lambda job: None)
    for address in (f"http://127.0.0.1:{free_port()}", f"sqlite:///{tmp_path}/of-another-team.db"):
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            wait = kubeflow.Server.wait

            def ended(*given: Any, patch: Any = patch, wait: Any = wait, address: str = address) -> Any:
                state = wait(*given)
                patch.setenv("MLFLOW_TRACKING_URI", address)
                return state

            patch.setattr(kubeflow.Server, "wait", ended)
            with pytest.raises(RunPendingError, match="run the same command to resume"):
                retrain.retrain(job)
        assert written(out)[0]["state"] == "unfinished" and written(out)[0]["link"]
    assert retrain.retrain(job) == 0 and len(kfp.runs) == 1 and not (out / follow.STATE).exists()


def test_a_token_that_is_renewed_in_mid_wait_is_read_again(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    kfp.token = "first"  # noqa: S105
    monkeypatch.setenv("KFP_TOKEN_FILE", str(token))
    job = make_job(clone, tmp_path / "ci")
    recording(kfp, job, monkeypatch)
    answer = kfp._get_run

    def expires(request: Any, run_id: str) -> Any:
        kfp.token = "second"  # noqa: S105
        threading.Timer(0.015, token.write_text, ["second"]).start()  # a moment after the server has changed its mind
        return answer(request, run_id)

    monkeypatch.setattr(kubeflow, "POLL_S", 0.05)
    monkeypatch.setattr(kfp, "_get_run", expires)
    assert retrain.retrain(job) == 0 and {one.authorization for one in kfp.requests} > {"Bearer second"}


def test_a_state_file_of_another_key_is_not_gone_on_with(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch)
    other = {"key": "other", "endpoint": kfp.url, "name": "x", "run_id": "of-another-key"}
    (tmp_path / follow.STATE).write_text(json.dumps(other))
    assert retrain.retrain(job) == 0
    assert not kfp.asked("GET", f"{RUNS}/of-another-key")


@pytest.mark.parametrize("known", [True, False])
def test_a_signal_cancels_the_run_also_when_its_id_was_never_heard(
    clone: Clone, kfp: KfpServer, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ci"
    job = make_job(clone, out)
    kfp.next_run = Run(None, ["RUNNING"])

    def interrupt() -> None:
        """Signals that arrive while the command waits for this answer, and not while it holds logging's lock, which the
        stub, in the same process, needs to answer."""
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # a second one does not end the cancelling

    if known:
        answer = kfp._get_run

        def asked(request: Any, run_id: str) -> Any:
            if len(kfp.asked("GET", f"{RUNS}/.*")) == 3:
                interrupt()
            return answer(request, run_id)

        monkeypatch.setattr(kfp, "_get_run", asked)
    else:
        create = kfp._create_run

        def started_and_lost(request: Any) -> Any:
            create(request)
            kfp.fail("GET", RUNS, status(503), times=1)
            interrupt()
            raise RefusalError(504, "upstream timed out", "a proxy's")

        monkeypatch.setattr(kfp, "_create_run", started_and_lost)
        monkeypatch.setattr(follow, "FIRST_DELAY_S", 0.5)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(InterruptedRunError) as stopped:
            retrain.retrain(job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    kfp.faults.clear()
    (run,) = kfp.runs.values()
    assert run.states[-1] == "CANCELED" and stopped.value.exit_code in (130, 143)
    assert not (out / follow.STATE).exists()
    verdict, state, _ = written(out)
    assert verdict["state"] == "canceled" and state["state"] == "error"


def test_what_a_killed_command_left_is_canceled_by_its_state_file(clone: Clone, kfp: KfpServer, tmp_path: Path) -> None:
    run_id = kfp.add_run("RUNNING")
    state = {"key": "k", "endpoint": kfp.url, "name": "a run", "run_id": run_id}
    (tmp_path / follow.STATE).write_text(json.dumps(state))
    assert follow.cancel_left(clone.root, tmp_path) == [f"{run_id}: cancellation requested"]
    assert kfp.runs[run_id].states[-1] == "CANCELED"
    assert follow.cancel_left(clone.root, tmp_path) == ["no run is in progress"]


def test_a_failed_step_is_told_with_the_end_of_its_log(
    clone: Clone, kfp: KfpServer, receiver: Receiver, tmp_path: Path
) -> None:
    job = make_job(clone, tmp_path / "ci")
    kfp.next_run = Run(
        None, ["RUNNING", "FAILED"], "validate", "x\n[error:1] validate preferences: 90 of 100 rows are bad"
    )
    with pytest.raises(KubealignError, match="step validate failed"):
        retrain.retrain(job)
    verdict, state, summary = written(tmp_path / "ci")
    assert verdict["state"] == "failed" and state["state"] == "failure"
    assert "> step validate failed" in summary and "90 of 100 rows are bad" in summary
    assert not (tmp_path / "ci" / "report.html").exists() and receiver.events[-1]["type"] == "retrain.failed"


def test_a_model_of_something_else_is_no_verdict_on_this_commit(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch, lineage="f" * 32)
    with pytest.raises(KubealignError, match="most likely the images .*`make images`"):
        retrain.retrain(job)


def test_a_webhook_that_is_down_changes_no_verdict(
    clone: Clone,
    kfp: KfpServer,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job(clone, tmp_path)
    recording(kfp, job, monkeypatch)
    receiver.answers = [500] * notify.TRIES
    assert retrain.retrain(job) == 0
    said = capsys.readouterr()
    assert "warning: not notified: the webhook at 127.0.0.1 answered 500, 5 times" in said.err
    assert "t0k3n" not in said.out + said.err


def test_an_mlflow_that_fails_is_told_in_the_files_too(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path / "ci")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:t0k3n@127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(KubealignError, match=r"^MLflow at http://\*\*\*@127.0.0.1:") as error:
        retrain.retrain(job)
    verdict, state, summary = written(tmp_path / "ci")
    assert verdict["state"] == "failed" and state["state"] == "failure"
    assert "t0k3n" not in str(error.value) + json.dumps(verdict) + summary


def test_bad_input_is_refused_before_anything_runs(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="data.*takes it from the checked-out commit"):
        make_job(clone, tmp_path, "data.revision=v1")
    appended("params.yaml", "\n# more\n")(clone.root)
    with pytest.raises(InputError, match="params.yaml.*; commit"):
        make_job(clone, tmp_path)
    git(clone.root, "checkout", "-q", "--", "params.yaml")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set; .*cluster.mlflow_uri"):
        make_job(clone, tmp_path)
    assert not kfp.requests


def test_the_outcome_of_a_version_is_shown_again(
    clone: Clone, kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(clone, tmp_path)
    record(job, "a-run")
    text = retrain.version_summary(clone.root, "1")
    assert "## Verdict: no evidence" in text and "`models:/kubealign/1` (challenger)" in text
    with pytest.raises(InputError, match="models:/kubealign/7: no run at"):
        retrain.version_summary(clone.root, "7")
    with pytest.raises(InputError, match="expected a number"):
        retrain.version_summary(clone.root, "' OR 1")


def test_the_options_of_the_command_stand_in_its_help() -> None:
    from pipelines.cli import app

    command: Any = typer.main.get_command(app)
    names = {name for parameter in command.commands["ci"].commands["retrain"].params for name in parameter.opts}
    assert {"--runner", "--rerun", "--retry-timeout", "--timeout", "--set", "--out"} <= names
