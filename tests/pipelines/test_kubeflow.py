"""Runs on Kubeflow, with KFP's real client against a strict stub of its server (tests/stubs/kfp_server.py)."""

import copy
import datetime
import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.common.errors import InputError, KubeflowApiError
from components.config.params import load_config, pipeline_arguments
from components.stages import STAGE_NAMES
from pipelines import cli, kubeflow
from pipelines.alignment import compile_pipeline
from pipelines.kubeflow import RunState, Server
from pipelines.quiet import QUIET
from tests.conftest import ROOT
from tests.stubs.kfp_server import (
    ABOUT_US,
    WORKFLOW,
    KfpServer,
    closed,
    cut_off,
    failed_pod,
    silent,
    status,
)

PARAMS = ROOT / "params.yaml"
SECRET = "s3cr3t-t0k3n"  # noqa: S105 - of the stub
RUN = r"/apis/v2beta1/runs/[^/:]+"


@dataclass
class Done:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    def one_error(self, code: int = 1) -> str:
        """The one line of an error that is meant for a person."""
        assert self.code == code, self.out + self.err
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


Cli = Callable[..., Done]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, fast_compiler: None) -> None:
    """No settings of the machine, and no waiting."""
    for name in list(os.environ):
        if name.startswith(("KFP_", "KF_PIPELINES_")):
            monkeypatch.delenv(name)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(kubeflow, "POLL_S", 0.01)
    monkeypatch.setattr(kubeflow, "git_commit", lambda: "c0ffee" + "0" * 34)
    monkeypatch.setattr(kubeflow, "SERVICE_ACCOUNT_TOKEN", Path("/nonexistent"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose data a pod can reach."""
    raw = yaml.safe_load(PARAMS.read_text())
    raw["data"] |= {"repo": "https://git.example.com/alignment.git", "revision": "v1.2"}
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """The stub, named by KFP_ENDPOINT."""
    with KfpServer() as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        yield server


@pytest.fixture
def kubealign(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process."""

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kubealign", *words, "--project", str(project)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0, said.out, said.err)

    return call


@pytest.fixture
def process(project: Path) -> Cli:
    """The command line in a process of its own, as a person starts it."""

    def call(*words: str, **more: str) -> Done:
        command = [sys.executable, "-P", "-m", "pipelines.cli", *words, "--project", str(project)]
        environment = os.environ | {"KUBEALIGN_GIT_COMMIT": "c0ffee" + "0" * 34} | more
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return call


def server(project: Path, *sets: str) -> Server:
    return Server(load_config(project / "params.yaml", list(sets)).cluster)


def follow(found: Server, run_id: str, timeout_s: float = 60) -> tuple[RunState, list[str]]:
    """How a run ends, and the states that were told on the way."""
    told: list[str] = []
    return found.wait(run_id, lambda state: told.append(state.state), timeout_s), told


# ---- submit


def test_submit_uploads_one_version_and_starts_one_run(kfp: KfpServer, process: Cli) -> None:
    done = process("submit")
    assert done.code == 0 and done.err == "", done.err
    (run_id,) = kfp.runs
    (version,) = kfp.versions.values()
    assert re.fullmatch(r"c0ffee000000-[0-9a-f]{8}", version["name"])
    assert [row["name"] for row in kfp.pipelines.values()] == ["alignment"]
    assert f"run {run_id} of version {version['name']}" in done.out
    assert f"{kfp.url}/#/runs/details/{run_id}" in done.out


def test_the_same_commit_is_uploaded_once_and_started_twice(kfp: KfpServer, kubealign: Cli) -> None:
    assert kubealign("submit").code == kubealign("submit").code == 0
    assert len(kfp.asked("POST", ".*/upload.*")) == 1 and len(kfp.pipelines) == len(kfp.experiments) == 1
    first, second = kfp.runs.values()
    assert first.body.pipeline_version_reference == second.body.pipeline_version_reference
    assert first.body.runtime_config == second.body.runtime_config


def test_other_cluster_settings_are_another_version_of_the_same_commit(kfp: KfpServer, kubealign: Cli) -> None:
    kubealign("submit")
    kubealign("submit", "--set", "cluster.retries=0")
    assert len(kfp.versions) == 2 and len(kfp.pipelines) == 1


def test_a_pipeline_that_someone_uploaded_by_hand_gets_the_version(
    kfp: KfpServer, kubealign: Cli, project: Path, tmp_path: Path
) -> None:
    package = tmp_path / "p.yaml"
    compile_pipeline(load_config(project / "params.yaml"), package, "kubeflow")
    server(project).client.upload_pipeline(str(package), "alignment")
    assert kubealign("submit").code == 0
    names = [row["name"] for row in kfp.versions.values()]
    assert len(kfp.pipelines) == 1 and names[0] == "alignment" and names[1].startswith("c0ffee")


def test_what_is_uploaded_is_one_flat_graph_with_a_kubernetes_configuration_of_every_step(
    kfp: KfpServer, kubealign: Cli
) -> None:
    kubealign("submit")
    (package,) = kfp.packages.values()
    assert set(package.spec.root.dag.tasks) == set(STAGE_NAMES)
    assert all(component.executor_label for component in package.spec.components.values())
    assert set(package.executors) == {f"exec-{stage}" for stage in STAGE_NAMES}
    assert package.executors["exec-dpo"].pvc_mount[0].mount_path == "/kubealign"


def test_a_run_gets_every_parameter_with_its_type(kfp: KfpServer, kubealign: Cli, project: Path) -> None:
    kubealign("submit", "--set", "dpo.beta=0.25", "--set", "sft.epochs=2", "--set", "register.promote=false")
    (run,) = kfp.runs.values()
    (package,) = kfp.packages.values()
    given = run.body.runtime_config.parameters
    assert given.keys() == package.spec.root.input_definitions.parameters.keys()
    assert given["dpo_beta"] == 0.25 and isinstance(given["sft_epochs"], float) and given["promote"] is False
    assert given["data_revision"] == "v1.2" and json.loads(given["gate_section"])["min_pairs"] == 50
    assert run.body.service_account == "pipeline-runner"


def test_the_stub_refuses_parameters_as_the_server_does(kfp: KfpServer, project: Path) -> None:
    config, found = load_config(project / "params.yaml"), server(project)
    kubeflow.submit(config, found)
    (version,) = kfp.versions.values()
    ids = version["pipeline_id"], version["pipeline_version_id"]
    arguments = pipeline_arguments(config)
    for wrong, message in (
        ({"dpo_bta": 1.0}, "not required by pipeline: dpo_bta"),
        ({"dpo_beta": "0.1"}, "input parameter dpo_beta requires type NUMBER_DOUBLE"),
        ({"promote": 1}, "input parameter promote requires type BOOLEAN"),
    ):
        with pytest.raises(KubeflowApiError, match=f"answered 400: .*{message}"):
            found.start("a run", ids, arguments | wrong)
    assert len(kfp.runs) == 1


def test_the_namespace_goes_with_every_request_that_needs_one(
    project: Path, kubealign: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KfpServer(multi_user=True) as kfp:
        kfp.namespaces = ["team-a"]
        kfp.next_run.states, kfp.next_run.failed, kfp.next_run.log = ["FAILED"], "sft", "the end\n"
        monkeypatch.setenv("KFP_ENDPOINT", kfp.url)
        assert "the end" in kubealign("submit", "--wait", "--set", "cluster.namespace=team-a").err
        for rows in (kfp.pipelines, kfp.experiments):
            assert [row["namespace"] for row in rows.values()] == ["team-a"]
        assert {one.query["podnamespace"] for one in kfp.asked("GET", "/k8s/pod/logs")} == {"team-a"}
        assert "answered 400: Namespace cannot be empty" in kubealign("submit").one_error()
        denied = kubealign("submit", "--set", "cluster.namespace=team-b").one_error()
        assert "answered 403" in denied and "(cluster.namespace)" in denied


# ---- schedule


def test_schedule_makes_a_recurring_run_with_a_cron_of_six_fields(kfp: KfpServer, kubealign: Cli) -> None:
    done = kubealign("schedule", "--cron", "0 0 3 * * 1")
    (recurring_id,) = kfp.recurring
    body = kfp.recurring[recurring_id]
    assert done.code == 0 and f"schedule kubealign: recurring run {recurring_id} of version c0ffee" in done.out
    assert body.trigger.cron_schedule.cron == "0 0 3 * * 1" and body.mode == "ENABLE"
    assert body.no_catchup is True and body.max_concurrency == "1" and not kfp.runs


def test_a_schedule_is_replaced_by_name_listed_and_removed(kfp: KfpServer, kubealign: Cli) -> None:
    assert "no schedule" in kubealign("schedules").out
    for cron in ("0 0 3 * * 1", "0 0 4 * * 1"):
        assert kubealign("schedule", "--cron", cron, "--name", "每周").code == 0
    for name in ("nightly", "monthly"):
        assert kubealign("schedule", "--cron", "0 0 5 * * *", "--name", name).code == 0
    assert [body.display_name for body in kfp.recurring.values()] == ["每周", "nightly", "monthly"]
    listed = kubealign("schedules").out
    assert "0 0 4 * * 1" in listed and "0 0 3 * * 1" not in listed and all(key in listed for key in kfp.recurring)
    unknown = kubealign("unschedule", "weekly").one_error(2)
    assert "'weekly'" in unknown and "monthly, nightly, 每周" in unknown and len(kfp.recurring) == 3
    assert "removed nightly" in kubealign("unschedule", "nightly").out
    assert [body.display_name for body in kfp.recurring.values()] == ["每周", "monthly"]


def test_recurring_runs_of_other_pipelines_are_neither_listed_nor_touched(kfp: KfpServer, kubealign: Cli) -> None:
    kubealign("schedule", "--cron", "0 0 3 * * 1", "--name", "weekly")
    (ours,) = kfp.recurring
    theirs = copy.deepcopy(kfp.recurring[ours])
    theirs.pipeline_version_reference.pipeline_id = "another"
    kfp.recurring["theirs"] = theirs
    kubealign("schedule", "--cron", "0 0 4 * * 1", "--name", "weekly")
    assert "theirs" in kfp.recurring and ours not in kfp.recurring and "theirs" not in kubealign("schedules").out
    kubealign("unschedule", "weekly")
    assert [*kfp.recurring] == ["theirs"]


def test_a_replacement_that_was_cut_off_leaves_a_schedule_and_is_completed(kfp: KfpServer, kubealign: Cli) -> None:
    kubealign("schedule", "--cron", "0 0 3 * * 1")
    kfp.fail("DELETE", ".*/recurringruns/.*", status(503), times=1)
    assert "503" in kubealign("schedule", "--cron", "0 0 4 * * 1").one_error()
    assert len(kfp.recurring) == 2
    assert kubealign("schedule", "--cron", "0 0 4 * * 1").out.count("replaces") == 2
    (left,) = kfp.recurring.values()
    assert left.trigger.cron_schedule.cron == "0 0 4 * * 1"


def test_five_fields_of_cron_are_refused_before_anything_is_sent(kfp: KfpServer, kubealign: Cli) -> None:
    assert "expected six fields, seconds first" in kubealign("schedule", "--cron", "0 3 * * 1").one_error(2)
    assert not kfp.requests


# ---- tokens and certificates


def test_a_wrong_token_is_one_line_that_names_the_setting_and_no_token(kfp: KfpServer, process: Cli) -> None:
    kfp.token = SECRET
    done = process("submit", KFP_TOKEN="wr0ng-t0k3n")  # noqa: S106
    assert "answered 401" in done.one_error() and "set KFP_TOKEN_FILE or KFP_TOKEN" in done.err
    assert "wr0ng-t0k3n" not in done.out + done.err
    assert [one.path for one in kfp.requests] == ["/apis/v2beta1/pipelines"], "it asks once"


def test_the_token_is_in_every_request_and_in_nothing_that_is_shown(
    kfp: KfpServer, process: Cli, tmp_path: Path
) -> None:
    kfp.token = SECRET
    kfp.next_run.states, kfp.next_run.failed = ["FAILED"], "sft"
    (tmp_path / "token").write_text(f"{SECRET}\n")
    done = process("submit", "--wait", KFP_TOKEN_FILE=str(tmp_path / "token"))
    assert done.code == 1 and "step sft failed" in done.err
    assert {one.authorization for one in kfp.requests} == {f"Bearer {SECRET}"}
    assert kfp.asked("GET", "/k8s/pod/logs") and SECRET not in done.out + done.err


def test_a_token_that_changes_while_a_run_is_followed_is_read_anew(
    kfp: KfpServer, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    kfp.token = "first"  # noqa: S105
    monkeypatch.setenv("KFP_TOKEN_FILE", str(file))
    run_id = kfp.add_run("PENDING", "RUNNING", "SUCCEEDED")

    def rotate(state: RunState) -> None:
        if state.state == "RUNNING":
            kfp.token = "second"  # noqa: S105
            file.write_text("second")

    assert server(project).wait(run_id, rotate, 60).state == "SUCCEEDED"
    assert {one.authorization for one in kfp.requests} == {"Bearer first", "Bearer second"}


@pytest.mark.parametrize("token", [f"{SECRET}\nx", f"{SECRET} ü", " "])
def test_a_token_that_no_header_can_carry_is_refused_without_showing_it(
    kfp: KfpServer, kubealign: Cli, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("KFP_TOKEN", token)
    done = kubealign("status", "x")
    assert "KFP_TOKEN: expected a token in one line of ASCII" in done.one_error() and SECRET not in done.err
    assert not kfp.requests


def test_a_line_break_behind_the_token_is_no_part_of_it(
    kfp: KfpServer, kubealign: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.token = SECRET
    monkeypatch.setenv("KFP_TOKEN", f"{SECRET}\n")
    assert kubealign("status", kfp.add_run("RUNNING")).code == 0


def test_a_token_file_or_certificate_that_is_not_there_is_named(
    kfp: KfpServer, kubealign: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KFP_TOKEN_FILE", "KFP_CA_FILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "/no/such")
            assert kubealign("status", "x").one_error(2) == f"error: {name}=/no/such: no such file\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stub")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.pem").write_bytes(made.public_bytes(pem))
    (folder / "both.pem").write_bytes(secret + made.public_bytes(pem))
    return folder


def test_a_certificate_is_verified_against_the_authority_that_is_named(
    certificate: Path, kubealign: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KfpServer(certificate=certificate / "both.pem") as kfp:
        run_id = kfp.add_run("FAILED", failed="fetch", log="over TLS\n")
        monkeypatch.setenv("KFP_ENDPOINT", kfp.url)
        for words in (["status", run_id], ["wait", run_id, "--timeout", "0"]):
            assert "CERTIFICATE_VERIFY_FAILED" in kubealign(*words).one_error() and not kfp.requests
        monkeypatch.setenv("KFP_CA_FILE", str(certificate / "ca.pem"))
        assert "over TLS" in kubealign("wait", run_id).err


# ---- endpoint


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("", r"KFP_ENDPOINT=\(not set\): expected the address of Kubeflow Pipelines"),
        ("kubeflow.example.com", "KFP_ENDPOINT=kubeflow.example.com: expected the address"),
        ("https://me:s3cr3t@kubeflow", r"KFP_ENDPOINT=https://\*\*\*@kubeflow: a user or token in a URL"),
    ],
)
def test_an_endpoint_that_is_none_is_a_wrong_setting(
    project: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, message: str
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", endpoint)
    with pytest.raises(InputError, match=message) as error:
        server(project)
    assert "s3cr3t" not in str(error.value)


def test_without_an_endpoint_the_exit_code_is_2(process: Cli) -> None:
    assert "KFP_ENDPOINT=(not set)" in process("submit").one_error(2)


def test_a_server_that_is_not_there_is_one_line(kubealign: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer: " in kubealign("submit").one_error()


# ---- refusals and broken answers


@pytest.mark.parametrize(
    ("method", "path", "act", "message"),
    [
        ("POST", "/apis/v2beta1/pipelines", status(409, '{"message": "name exists"}'), "answered 409: name exists"),
        ("POST", ".*/upload_version", status(409, '{"error_message": "exists"}'), "answered 409: exists"),
        ("GET", "/apis/v2beta1/pipelines", status(500), "answered 500: injected fault"),
        ("POST", "/apis/v2beta1/runs", status(502, "<html>Bad Gateway</html>"), "answered 502: <html>Bad Gateway"),
        ("GET", "/apis/v2beta1/experiments", cut_off, "does not answer: "),
        ("POST", "/apis/v2beta1/runs", cut_off, "does not answer: "),
        ("POST", ".*/upload_version", closed, "does not answer: "),
        ("GET", "/apis/v2beta1/pipelines", status(200, "<html>log in"), "expected JSON, found '<html>log in'"),
        ("POST", "/apis/v2beta1/runs", status(200, "[]"), r"expected JSON, found '\[\]'"),
    ],
)
def test_a_refusal_or_a_broken_answer_is_one_line_without_a_traceback(
    kfp: KfpServer, kubealign: Cli, method: str, path: str, act: Any, message: str
) -> None:
    kfp.fail(method, path, act)
    assert re.search(message, kubealign("submit").one_error())


def test_a_run_that_is_not_there_is_named(kfp: KfpServer, kubealign: Cli) -> None:
    assert "answered 404: Run nothing not found; check the id" in kubealign("wait", "nothing").one_error()


# ---- wait


def test_wait_succeeds_only_when_the_run_has_succeeded(kfp: KfpServer, process: Cli) -> None:
    run_id = kfp.add_run("SUCCEEDED")
    done = process("wait", run_id)
    assert done.code == 0 and done.err == ""
    assert [line.partition(":")[0] for line in done.out.splitlines()] == [*STAGE_NAMES, "succeeded"]


def test_wait_tells_every_state_of_a_run_once(kfp: KfpServer, project: Path) -> None:
    run_id = kfp.add_run("PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    ended, told = follow(server(project), run_id)
    assert ended.state == "SUCCEEDED" and told[0] == "PENDING" and told[-1] == "SUCCEEDED"
    assert told == sorted(told, key=["PENDING", "RUNNING", "SUCCEEDED"].index) and told.count("PENDING") == 1


def test_a_failed_run_shows_its_step_and_the_end_of_the_last_attempts_log(kfp: KfpServer, kubealign: Cli) -> None:
    log = "".join(f"line {number}\n" for number in range(50)) + "[error:1] sft out of memory\n"
    done = kubealign("wait", kfp.add_run("RUNNING", "FAILED", failed="sft", log=log))
    lines = done.err.splitlines()
    assert done.code == 1 and "ended as FAILED" in lines[0] and lines[1] == "error: step sft failed"
    assert lines[-1] == "  [error:1] sft out of memory" and len(lines) == 2 + kubeflow.LOG_LINES
    assert [one.query["podname"] for one in kfp.asked("GET", "/k8s/pod/logs")] == [failed_pod()]


@pytest.mark.parametrize("act", [status(500), cut_off, closed], ids=["500", "cut_off", "closed"])
def test_a_log_that_cannot_be_had_leaves_a_command_that_finds_it(kfp: KfpServer, kubealign: Cli, act: Any) -> None:
    kfp.fail("GET", "/k8s/pod/logs", act)
    run_id = kfp.add_run("FAILED", failed="dpo")
    done = kubealign("wait", run_id)
    labels = f"pipeline/runid={run_id},app.kubernetes.io/component=dpo"
    assert done.code == 1 and f"kubectl logs -n kubeflow -l {labels} -c main" in done.err.splitlines()[-1]


@pytest.mark.parametrize("state", ["CANCELED", "SKIPPED"])
def test_a_run_that_was_ended_otherwise_is_no_success(kfp: KfpServer, kubealign: Cli, state: str) -> None:
    done = kubealign("wait", kfp.add_run("RUNNING", state))
    assert done.code == 1 and f"ended as {state}" in done.err


@pytest.mark.parametrize(
    "act",
    [status(503), status(429), cut_off, closed, status(200, "<html>")],
    ids=["503", "429", "cut_off", "closed", "html"],
)
def test_wait_outlives_a_server_that_fails_for_a_while(kfp: KfpServer, project: Path, act: Any) -> None:
    kfp.fail("GET", RUN, act, times=9)
    run_id = kfp.add_run("RUNNING", "SUCCEEDED")
    assert follow(server(project), run_id)[0].state == "SUCCEEDED"
    assert len(kfp.asked("GET", RUN)) > 9


def test_wait_gives_up_on_a_server_that_has_failed_for_long(
    kfp: KfpServer, kubealign: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubeflow, "RETRY_TIMEOUT_S", 0.05)
    kfp.fail("GET", RUN, status(503))
    assert "answered 503" in kubealign("wait", kfp.add_run("RUNNING")).one_error()


@pytest.mark.parametrize("answer", ABOUT_US)
@pytest.mark.parametrize("command", [("wait",), ("submit", "--wait")], ids=["wait", "submit"])
def test_an_answer_about_us_leaves_the_run_and_its_link(
    kfp: KfpServer, kubealign: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, command: tuple[str, ...]
) -> None:
    """A token is read again, and the server asked again; then the command ends, and says that the run did not."""
    monkeypatch.setattr(kubeflow, "RETRY_TIMEOUT_S", 1.5)
    kfp.next_run.states = ["RUNNING"]
    given = (kfp.add_run("RUNNING"),) if command == ("wait",) else ()
    kfp.fail("GET", RUN, ABOUT_US[answer])
    error = kubealign(*command, *given).one_error()
    run_id = [*kfp.runs][-1]
    assert f"says nothing about run {run_id}" in error and f"{kfp.url}/#/runs/details/{run_id}" in error
    assert f"`kubealign wait {run_id}`" in error and len(kfp.asked("GET", RUN)) > 1
    kfp.faults.clear()
    kfp.runs[run_id].states = ["SUCCEEDED"]
    assert kubealign("wait", *given).code == 0, "the handle of what was submitted is kept"


def test_a_server_that_falls_silent_is_asked_again(
    kfp: KfpServer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubeflow, "ANSWER_S", 0.1)
    kfp.fail("GET", RUN, silent, times=5)
    assert follow(server(project), kfp.add_run("SUCCEEDED"))[0].state == "SUCCEEDED"


def test_wait_stops_when_its_time_is_up_and_says_how_to_go_on(kfp: KfpServer, kubealign: Cli) -> None:
    run_id = kfp.add_run("RUNNING")
    stopped = kubealign("wait", run_id, "--timeout", "0").err.splitlines()[-1]
    assert (
        stopped == f"error: run {run_id} is RUNNING after 0 s: still running; follow it with `kubealign wait {run_id}`"
    )


# ---- status and cancel


def test_status_shows_the_steps_that_have_begun_in_their_order(kfp: KfpServer, kubealign: Cli) -> None:
    out = kubealign("status", kfp.add_run("RUNNING")).out
    rows = re.findall(r"(\w[\w-]*) *│ (\w+)", out)
    assert rows == [("resolve", "SUCCEEDED"), ("fetch", "SUCCEEDED"), ("validate", "SUCCEEDED"), ("sft", "RUNNING")]
    assert "driver" not in out and "executor" not in out and WORKFLOW not in out


def test_cancel_ends_the_last_run_that_was_submitted_from_here(kfp: KfpServer, kubealign: Cli) -> None:
    kfp.next_run.states = ["RUNNING"]
    kubealign("submit")
    (run_id,) = kfp.runs
    assert f"{run_id}: cancellation requested" in kubealign("cancel").out
    ended = kubealign("wait")
    assert ended.code == 1 and f"run {run_id} ended as CANCELED" in ended.err


def test_a_run_that_has_ended_cannot_be_cancelled(kfp: KfpServer, kubealign: Cli) -> None:
    assert "answered 400: Failed to terminate" in kubealign("cancel", kfp.add_run("SUCCEEDED")).one_error()


def test_without_a_run_there_is_nothing_to_wait_for(kfp: KfpServer, kubealign: Cli) -> None:
    assert "no run was submitted from here; give a run id" in kubealign("wait").one_error(2)
