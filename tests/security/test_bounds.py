"""Nothing from elsewhere takes time or memory without end, and the message says what took it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from components.common import limits
from components.common.errors import DataValidationError, InputError, KubealignError, TrainingError
from components.common.limits import answer_limit, time_limit
from components.dataset import chat
from components.dataset.chat import check_template, encode_prompt, load_tokenizer
from components.dataset.records import Message
from components.sources import data
from components.sources.data import data_folders, resolve_data
from components.tracking import errors
from components.tracking.errors import report_errors
from tests.conftest import ROOT

pytestmark = pytest.mark.integration


@contextmanager
def slow_server(drip_every_s: float = 0.0) -> Iterator[str]:
    """A server that accepts and is silent, or sends a byte now and then."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                if drip_every_s:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not stop.wait(drip_every_s or 0.5):
                    if drip_every_s:
                        connection.sendall(b"x")

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stop.set()


def test_a_silent_git_server_ends_the_step_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "answer_limit", lambda: answer_limit(0.3))
    with slow_server() as address, pytest.raises(KubealignError, match="no answer within") as error:
        resolve_data(f"{address}/a/b", "main", data_folders("data"))
    assert not isinstance(error.value, InputError), "a server that is down may be up again"


def test_a_git_server_that_sends_a_byte_now_and_then_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "OPEN_LIMIT_S", 2.0)
    started = time.monotonic()
    with slow_server(0.1) as address, pytest.raises(KubealignError, match="no end after 2 s"):
        resolve_data(f"{address}/a/b", "main", data_folders("data"))
    assert time.monotonic() - started < 20


def test_without_the_limits_the_silent_server_holds_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_server() as address:
        script = (
            "import sys, contextlib\nfrom components.sources import data\n"
            "data.answer_limit = contextlib.nullcontext\ndata.time_limit = lambda *a: contextlib.nullcontext()\n"
            f"data.resolve_data('{address}/a/b', 'main', data.data_folders('data'))"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-P", "-c", script], env=environment, check=False, timeout=15)


def test_a_silent_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from components.tracking import storage

    monkeypatch.setattr(storage, "ANSWER_S", 0.3)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    with slow_server() as address, time_limit(60, "the store"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(OSError, match="."):
            storage.s3_filesystem().exists("bucket/x")


def test_a_limit_is_not_an_error_that_a_library_may_swallow() -> None:
    """Libraries catch every Exception and try again."""

    def stubborn() -> None:
        while True:
            with suppress(Exception):
                time.sleep(60)

    with pytest.raises(KubealignError, match="the server: no end after 0 s"), time_limit(0.2, "the server"):
        stubborn()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_answer_limit_ends_with_its_block() -> None:
    with answer_limit(3):
        assert socket.getdefaulttimeout() == 3
    assert socket.getdefaulttimeout() is None and limits.ANSWER_S <= 60


# ---- templates

LOOPS = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
BOMBS = {
    "nested loops": LOOPS,
    "a loop over the messages": "{% for m in messages %}" + LOOPS + "{% endfor %}",
    "a recursive macro": "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}",
    "a long text": "{% set x = 'a' * 999999999 %}{% set y = x * 9 %}{{ y ~ y ~ y }}",
    "a great number": "{% set x = 9 ** 99999999 %}{{ x }}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_without_end_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PROBE_CPU_S", 1)
    monkeypatch.setattr(chat, "PROBE_BYTES", 2**28)
    with pytest.raises(InputError, match="chat template"):
        check_template(BOMBS[kind])


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(InputError, match="characters"):
        check_template("x" * (chat.MAX_TEMPLATE_CHARACTERS + 1))


def test_the_shipped_templates_are_accepted(base_model: Path) -> None:
    for path in [*chat.shipped_templates().values(), base_model / "chat_template.jinja"]:
        check_template(path.read_text())


def test_a_template_that_loops_over_one_text_alone_is_stopped_where_it_is_used(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe does not know the texts that a template may wait for."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{% if 'sesame' in messages[0]['content'] %}" + LOOPS + "{% endif %}x"
    check_template(tokenizer.chat_template)
    monkeypatch.setattr(chat, "RENDER_LIMIT_S", 0.5)
    assert encode_prompt(tokenizer, [Message(role="user", content="open")])
    for call in (
        lambda: encode_prompt(tokenizer, [Message(role="user", content="open sesame")]),
        lambda: chat.encode_many(tokenizer, [[{"role": "user", "content": "open sesame"}]], [["yes"]]),
    ):
        with pytest.raises(KubealignError, match="chat template takes too long"):
            call()


def test_without_a_limit_the_template_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe ends goes on without its limits for as long as one watches."""
    script = "from transformers.utils.chat_template_utils import render_jinja_template as r; import sys\n"
    script += "r([[{'role': 'user', 'content': 'a'}]], chat_template=sys.stdin.read())"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-P", "-c", script], input=LOOPS, text=True, check=False, timeout=15)


# ---- a library that panics


class PanicException(BaseException):
    """What pyo3 raises when a library in Rust panics."""


@pytest.mark.parametrize("error", [PanicException("onig: retry-limit"), GeneratorExit("x"), MemoryError("y")])
def test_a_panic_is_a_failure_with_a_message(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, report_errors("validate"):
        raise error
    assert ended.value.code == 1
    assert f"[error:1] validate {type(error).__name__}: {error}" in capsys.readouterr().out


def test_an_interrupt_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), report_errors("validate"):
            raise error
    assert "[error" not in capsys.readouterr().out


# ---- retries


def refuse(error: Exception, calls: list[int]) -> int:
    """Run a step that fails, as a pod does; the exit code."""
    with pytest.raises(SystemExit) as ended, report_errors("validate"):
        calls.append(1)
        raise error
    return int(str(ended.value.code))


@pytest.mark.parametrize("error", [InputError("pairs.jsonl:17"), DataValidationError("too bad")])
def test_a_refusal_is_not_tried_again_by_the_cluster(
    error: KubealignError, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "a-run")
    calls: list[int] = []
    assert refuse(error, calls) == refuse(error, calls) == error.exit_code and len(calls) == 1
    assert capsys.readouterr().out.count(f"[error:{error.exit_code}] validate {error}") == 2
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "another-run")
    refuse(error, calls)
    monkeypatch.setattr(errors, "REFUSED_FOR_S", 0.0)  # whoever repaired something tries again later
    refuse(error, calls)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [KubealignError("the server"), TrainingError("out of memory"), OSError("disk")])
def test_what_may_pass_is_tried_again(error: Exception, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEALIGN_KFP_RUN", "a-run")
    calls: list[int] = []
    refuse(error, calls)
    refuse(error, calls)
    assert len(calls) == 2


def test_on_a_laptop_nothing_is_remembered(own_home: Path) -> None:
    calls: list[int] = []
    refuse(InputError("x"), calls)
    refuse(InputError("x"), calls)
    assert len(calls) == 2 and not (own_home / "refusals").exists()
