"""What others are told: a webhook against a real receiver, comments and statuses against a strict stub of GitHub."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.common.errors import InputError, KubealignError, RequestRejectedError
from pipelines.ci import notify
from pipelines.ci.notify import GitHub, signature, webhook
from pipelines.cli import app
from tests.stubs.github import GitHubStub
from tests.stubs.receiver import SECRET, Receiver

MARKED = "<!-- kubealign:data -->\n## Data\n"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(notify, "ANSWER_S", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHubStub]:
    with GitHubStub() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


# ---- webhook


def test_the_signature_is_that_of_the_specification() -> None:
    """The example that the specification's libraries test with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_an_event_arrives_once_after_a_failure_and_a_silence_with_the_same_id(receiver: Receiver) -> None:
    receiver.answers = [503, 0, 429]
    hook = webhook()
    assert hook
    hook.send("retrain.verdict", {"verdict": "没有证据"})
    (event,) = receiver.events
    assert event["type"] == "retrain.verdict" and event["data"] == {"verdict": "没有证据"}
    assert len(receiver.headers) == 4 and len({found["webhook-id"] for found in receiver.headers}) == 1


def test_a_refusal_is_not_tried_again_and_a_redirect_is_not_followed(receiver: Receiver) -> None:
    hook = webhook()
    assert hook
    for status in (400, 302):
        receiver.answers = [status]
        before = len(receiver.headers)
        with pytest.raises(RequestRejectedError, match=f"^the webhook at 127.0.0.1 answered {status}"):
            hook.send("x", {})
        assert len(receiver.headers) == before + 1 and not receiver.events


def test_another_key_is_not_accepted(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.SECRET, f"whsec_{base64.b64encode(b'k' * 32).decode()}")
    hook = webhook()
    assert hook
    with pytest.raises(RequestRejectedError, match="answered 401"):
        hook.send("x", {})


def test_a_server_says_how_long_to_wait_up_to_a_minute(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    hook = webhook()
    assert hook
    for receiver.retry_after in ("7", "86400"):
        receiver.answers = [429]
        hook.send("x", {})
    assert waits == [7, 60] and len(receiver.events) == 2


def test_neither_address_nor_key_is_ever_shown(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    receiver.answers = [0, *[500] * (notify.TRIES - 1)]
    hook = webhook()
    assert hook
    with pytest.raises(KubealignError) as error:
        hook.send("x", {})
    shown = f"{error.value} {error.value.__cause__} {hook!r} {caplog.text}"
    assert "answered 500, 5 times" in shown and "t0k3n" not in shown and SECRET[6:] not in shown


@pytest.mark.parametrize(
    ("url", "secret", "message"),
    [
        ("http://hooks.example.com/t0k3n", SECRET, "expected an https:// address"),
        ("https://me:t0k3n@hooks.example.com/x", SECRET, "a user or password in a URL would reach logs"),
        ("", SECRET, "KUBEALIGN_WEBHOOK_URL: expected an https:// address"),
        ("https://hooks.example.com/t0k3n", "", "expected `whsec_` .*24 to 64 random bytes"),
        ("https://hooks.example.com/t0k3n", "whsec_c2hvcnQ=", "expected `whsec_` .*24 to 64 random bytes"),
        ("https://hooks.example.com/t0k3n", "whsec_!!!!", "expected `whsec_` .*24 to 64 random bytes"),
    ],
)
def test_a_webhook_that_cannot_be_used_is_refused(
    url: str, secret: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.URL, url)
    monkeypatch.setenv(notify.SECRET, secret)
    with pytest.raises(InputError, match=message) as error:
        webhook()
    assert "t0k3n" not in str(error.value)


def test_without_an_address_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (notify.URL, notify.SECRET):
        monkeypatch.delenv(name, raising=False)
    assert webhook() is None


# ---- GitHub


def test_a_comment_is_made_once_and_then_updated_wherever_it_stands(github: GitHubStub) -> None:
    for number in range(150):
        github.add(3, f"talk {number}")
    assert GitHub().comment(MARKED + "one", 3) == "created"
    assert GitHub().comment(MARKED + "two", 3) == "updated"
    assert [text for text in github.of(3) if text.startswith("<!--")] == [MARKED + "two"]
    assert GitHub().comment(MARKED.replace("data", "verdict") + "three", 3) == "created"


def test_a_comment_may_be_updated_only(github: GitHubStub) -> None:
    assert GitHub().comment(MARKED, 3, update_only=True) == "none needed" and not github.of(3)
    github.add(3, MARKED)
    assert GitHub().comment(MARKED + "new", 3, update_only=True) == "updated" and github.of(3) == [MARKED + "new"]


def test_a_comment_whose_answer_was_lost_is_not_repeated(github: GitHubStub) -> None:
    github.lost = 1
    GitHub().comment(MARKED, 3)
    assert github.of(3) == [MARKED]


def test_a_foreign_comment_with_our_marker_is_left_alone(github: GitHubStub) -> None:
    github.add(3, MARKED + "not ours", foreign=True)
    assert GitHub().comment(MARKED + "ours", 3) == "created"
    assert github.of(3) == [MARKED + "not ours", MARKED + "ours"]


def test_a_long_comment_is_cut_and_says_so(github: GitHubStub) -> None:
    GitHub().comment(MARKED + "长" * 70_000, 3)
    (text,) = github.of(3)
    assert len(text) < 65_536 and "truncated" in text[-50:]


def test_a_server_that_fails_for_a_while_is_asked_again(github: GitHubStub) -> None:
    github.faults = [500, 502]
    GitHub().status("c" * 40, {"state": "success", "description": "better", "context": "kubealign/retrain"})
    assert len(github.statuses) == 1


def test_a_wrong_token_is_one_line_without_it(github: GitHubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "ghs-wr0ng")
    with pytest.raises(RequestRejectedError, match="^GitHub answered 401: .*Bad credentials") as error:
        GitHub().comment(MARKED, 3)
    assert "ghs-wr0ng" not in str(error.value)
    monkeypatch.delenv("GITHUB_TOKEN")
    with pytest.raises(InputError, match="GITHUB_REPOSITORY .* and GITHUB_TOKEN"):
        GitHub()


def test_a_user_in_netrc_does_not_take_the_token_s_place(
    github: GitHubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert GitHub().comment(MARKED, 3) == "created"


def test_a_commit_s_pull_requests_get_the_comment(github: GitHubStub, tmp_path: Path) -> None:
    github.pull_requests = {"a" * 40: 7, "b" * 40: 8}
    file = tmp_path / "x.md"
    file.write_text(MARKED)
    done = CliRunner().invoke(app, ["ci", "comment", str(file), "--commit", "b" * 40])
    assert done.exit_code == 0 and "pull request 8: comment created" in done.stdout
    assert github.of(8) == [MARKED] and not github.of(7)


def test_the_status_command_sends_what_retrain_wrote(github: GitHubStub, tmp_path: Path) -> None:
    status = {"state": "failure", "description": "worse: not promoted", "context": "kubealign/retrain"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    done = CliRunner().invoke(app, ["ci", "status", "--commit", "a" * 40, "--out", str(tmp_path)])
    assert done.exit_code == 0 and github.statuses == [("a" * 40, status)]


def test_a_text_without_a_marker_is_no_comment(github: GitHubStub) -> None:
    with pytest.raises(InputError, match=re.escape("marker such as <!-- kubealign:data -->")):
        GitHub().comment("hello", 3)
