"""Class LEAK: a secret of the environment or of a URL is masked wherever it would be written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.common import secrets
from components.common.errors import InputError
from components.common.secrets import MASK, MaskedStream, without_credentials, without_query
from components.report.html import environment
from components.report.markdown import code, markdown
from components.sources.data import check_address
from components.tracking import events, store
from components.tracking.errors import report_errors
from components.tracking.run import stage_run
from pipelines.ci.notify import GitHub
from pipelines.local.display import Display
from pipelines.local.runner import ChildState, _follow
from pipelines.terminal import document, terminal
from tests.conftest import ROOT
from tests.support.component_kit import empty_mlflow, own_home

__all__ = ["empty_mlflow", "own_home"]

URLS = {
    "slash": ("http://bob:S3/cretPw@127.0.0.1:9", "S3/cretPw"),
    "at": ("http://bob:S3@cretPw@127.0.0.1:9/x", "cretPw"),
    "question mark": ("postgresql://bob:S3?cretPw@db/x", "cretPw"),
    "hash": ("https://bob:#cretPw@host", "cretPw"),
    "token alone": ("https://ghp_cretPw@github.com/team/data.git", "cretPw"),
    "parameter": ("http://127.0.0.1:9?token=S3cretPw", "S3cretPw"),
    "second parameter": ("https://host/x?a=1&X-Amz-Signature=S3cretPw&b=2", "S3cretPw"),
}
NAMES = ("MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_APIKEY", "my_secret")
VALUE = "hunter2/+&é"


@pytest.mark.parametrize(("url", "secret"), URLS.values(), ids=URLS.keys())
def test_what_a_url_tells_in_confidence_is_masked(url: str, secret: str) -> None:
    for text in (f"no answer from {url}: try again", f"first {url}\nthen '{url}' failed"):
        masked = without_credentials(text)
        assert secret not in masked
        assert "://" in masked
        assert masked.startswith(text[:5])
        assert masked.endswith(text[-4:])


def test_what_is_no_secret_stays() -> None:
    for text in (
        "sqlite:////a@b/c.db",
        "models:/kubealign@champion",
        "https://github.com/team/data at main: the content of data",
        "https://kubeflow.example/_/pipeline/?ns=team#/runs/details/1",
        "mail a@b.example about https://host/x",
    ):
        assert without_credentials(text) == text


def test_the_query_of_a_refused_url_is_cut() -> None:
    assert without_query("https://host/x?any=S3cretPw#more") == f"https://host/x?{MASK}"
    with pytest.raises(InputError) as refused:
        check_address("https://bob:S3/cret@host/x?any=S3cretPw")
    assert "cret" not in str(refused.value)
    with pytest.raises(InputError) as refused:
        check_address("https://host/x?any=S3cretPw")
    assert "cret" not in str(refused.value)
    assert "https://host/x" in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_of_the_environment_is_masked_in_every_way_it_is_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, VALUE)
    written = [VALUE, "hunter2/%2B%26%C3%A9", "hunter2%2F%2B%26%C3%A9", json.dumps(VALUE), json.dumps({"a": VALUE})]
    makers: list[Any] = [without_credentials, document, terminal, markdown, code]
    makers.append(lambda text: environment().from_string("{{ view }}").render(view=text))
    for text in written:
        for maker in makers:
            assert "hunter2" not in str(maker(f"the server said {text}!"))


def test_a_secret_of_many_lines_is_masked_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\n-----END PRIVATE KEY-----\n"
    monkeypatch.setenv("KUBEALIGN_SIGNING_KEY", pem)
    assert "MIGHAgEA" not in without_credentials("read MIGHAgEAMBMG from it")
    assert "MIGHAgEA" not in str(terminal(pem))


def test_a_password_in_an_address_is_masked_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib3 splits an address before it complains about it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:S3/cretPw@127.0.0.1:9?any=0th3rSecret")
    text = "HTTPConnectionPool(host='bob', port=9): Max retries with url: S3/cretPw ?any=0th3rSecret/api"
    masked = without_credentials(text)
    assert "S3/cretPw" not in masked
    assert "0th3rSecret" not in masked


def test_public_keys_paths_and_short_values_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "KUBEALIGN_PUBLIC_KEYS": "MFkwEwYHKoZIzj0",
        "KFP_TOKEN_FILE": "/run/secrets/token",
        "TOKENIZERS_PARALLELISM": "disabled-here",
        "SOME_KEY": "false",
        "MLFLOW_TRACKING_USERNAME": "trainer-of-team",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    text = " ".join(values.values())
    assert without_credentials(text) == text


def test_without_the_guards_they_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    url, secret = URLS["slash"]
    assert secret not in str(terminal(url))
    monkeypatch.setattr(secrets, "_pattern", lambda values: None)
    assert VALUE in str(terminal(VALUE))
    monkeypatch.setattr(secrets, "USER_INFO", secrets.re.compile(r"(?<=://)[^/@\s]*@"))
    assert secret in str(terminal(url)), "as it was: up to the first `@` or `/`"


# ---- where they would be written


def test_events_and_the_printed_lines_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "events.jsonl"
    file.touch()
    monkeypatch.setenv(events.EVENTS_VARIABLE, str(file))
    monkeypatch.setenv("HF_TOKEN", VALUE)
    with pytest.raises(SystemExit), report_errors("fetch"):
        raise RuntimeError(f"no answer to {VALUE} from {URLS['slash'][0]}\x1b]0;PWNED\x07")
    for written in (capsys.readouterr().out, file.read_text(encoding="utf-8")):
        assert "no answer" in written
        assert "hunter2" not in written
        assert "S3/cretPw" not in written
        assert written.replace("\n", "").isprintable()


PRINTS = """
import os, sys
sys.stdout.write("a\\xff".encode("latin-1").decode("latin-1") + os.environ["HF_TOKEN"] + " end\\n")
for half in (os.environ["HF_TOKEN"][:5], os.environ["HF_TOKEN"][5:], "\\rbar 1%\\rbar 2%", "\\n"):
    sys.stdout.write(half); sys.stdout.flush()
os.write(1, b"\\xff\\xfe raw bytes\\n" + b"x" * 300_000 + os.environ["HF_TOKEN"].encode())
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_the_log_of_a_run_holds_what_steps_print_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Libraries print on their own; what a step prints reaches log.txt through no function of ours."""
    monkeypatch.setenv("HF_TOKEN", VALUE)
    if not guarded:
        monkeypatch.setattr(MaskedStream, "feed", lambda self, piece: piece)
    reader = events.EventReader(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").touch()
    child = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE)
    _follow(child, tmp_path / "log.txt", reader, ChildState(), Display(Console(file=(tmp_path / "screen").open("w"))))
    assert child.wait() == 0
    log = (tmp_path / "log.txt").read_bytes()
    assert (VALUE.encode() in log) is not guarded
    assert b"\xff\xfe raw bytes\n" in log
    assert b"\rbar 1%\rbar 2%\n" in log
    assert log.count(b"x") == 300_000


def test_every_cut_of_a_stream_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    text = f"one {VALUE} two\nthree {VALUE}".encode()
    for cut in range(len(text) + 1):
        stream = MaskedStream()
        pieces = [stream.feed(piece) for piece in (text[:cut], text[cut:]) if piece]
        assert b"".join([*pieces, stream.feed(b"")]) == b"one *** two\nthree ***"


@pytest.mark.integration
def test_parameters_of_a_run_in_mlflow(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    with stage_run("fetch", {"base": URLS["at"][0], "said": f"<{VALUE}>", "pairs": 7}) as run:
        pass
    params = store.client().get_run(run.run_id).data.params
    assert params == {"base": f"http://{MASK}@127.0.0.1:9/x", "said": f"<{MASK}>", "pairs": "7"}


def test_a_comment_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GITHUB_REPOSITORY": "team/data", "GITHUB_TOKEN": "ghp_0123456789", "HF_TOKEN": VALUE}.items():
        monkeypatch.setenv(name, value)
    sent: list[str] = []

    def ask(self: GitHub, method: str, path: str, body: dict[str, str] | None = None, tries: int = 1) -> list[int]:
        sent.extend((body or {}).values())
        return []

    monkeypatch.setattr(GitHub, "_ask", ask)
    GitHub().comment(f"<!-- kubealign:data -->\nghp_0123456789 {VALUE} {URLS['slash'][0]}\n", 1)
    assert sent == [f"<!-- kubealign:data -->\n{MASK} {MASK} http://{MASK}@127.0.0.1:9\n"]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["slash", "at", "parameter"])
def test_the_command_says_nothing_of_the_servers_password(kind: str, tmp_path: Path) -> None:
    url, secret = URLS[kind]
    url = url.replace("127.0.0.1:9/x", "127.0.0.1:9")
    environ = os.environ | {"MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    environ |= {"KUBEALIGN_HOME": str(tmp_path), "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    command = [sys.executable, "-P", "-m", "pipelines.cli", "history", "--project", str(ROOT)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "MLflow at http://" in done.stderr
    assert secret not in done.stdout + done.stderr


def test_the_frame_of_a_key_is_no_secret_and_its_lines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `kubealign keys --secret` would print a key that nothing reads, wherever another one is set."""
    frame = ("-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----")
    monkeypatch.setenv("KUBEALIGN_SIGNING_KEY", f"{frame[0]}\nMIGHAgEAMBMG\nByqGSM49AgEG\n{frame[1]}\n")
    text = f"{frame[0]}\nsomebody's other line\n{frame[1]}\n"
    assert without_credentials(text) == text
    assert without_credentials("x MIGHAgEAMBMG y ByqGSM49AgEG z") == "x *** y *** z"
