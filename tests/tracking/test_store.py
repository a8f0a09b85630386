"""Addresses of MLflow, and errors of a stage, in one line."""

import os
import ssl
from pathlib import Path

import pytest

from components.common.secrets import without_credentials
from components.tracking import store
from components.tracking.errors import explain_mlflow_error, report_errors
from tests.support.services import QuietHandler, free_port, make_certificate, serving


def test_credentials_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_credentials("postgresql://u:pw@host/db") == "postgresql://***@host/db"
    assert without_credentials("sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    assert store.tracking_uri() == f"sqlite:///{Path.cwd() / 'x.db'}"


def test_a_full_disk_and_a_locked_folder_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    for number, words in ((errno.ENOSPC, "no space left; free some"), (errno.EACCES, "cannot be written or read")):
        with pytest.raises(SystemExit), report_errors("sft"):
            raise OSError(number, os.strerror(number), "/from/here", None, "/some/file")
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("[error:1] sft /some/file: ") and words in last


@pytest.mark.parametrize(
    ("answer", "status", "known"),
    [
        (b"<html>log in", 401, "does not accept"),
        (b'{"error": "invalid_token"}', 401, "does not accept"),
        (b'{"error_code": "UNAUTHENTICATED", "message": "no"}', 401, "does not accept"),
        (b'{"detail": "Forbidden"}', 403, "EDIT on the experiment"),
        (b"RBAC: access denied", 403, "EDIT on the experiment"),
    ],
)
def test_a_refusal_by_mlflow_or_a_proxy_names_who_was_refused(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, status: int, known: str
) -> None:
    class Refusing(QuietHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = answer

    callers: dict[str, dict[str, str]] = {
        "nobody (neither": {},
        "the token in MLFLOW_TRACKING_TOKEN": {"TOKEN": "s3cr3t"},
        "anna": {"USERNAME": "anna", "PASSWORD": "s3cr3t", "TOKEN": "s3cr3t"},
        "anna (MLFLOW_TRACKING_PASSWORD is not set)": {"USERNAME": "anna"},
    }
    with serving(Refusing) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        for caller, given in callers.items():
            with monkeypatch.context() as patch:
                for name in ("USERNAME", "PASSWORD", "TOKEN"):
                    patch.setenv(f"MLFLOW_TRACKING_{name}", given.get(name, ""))
                with pytest.raises(Exception, match=r".") as error:
                    store.client().get_experiment("1")
                said = explain_mlflow_error(error.value)
                assert caller in said and known in said and "s3cr3t" not in said


def test_a_connection_that_fails_is_told_with_its_last_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However long the address is that stands before it."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make_certificate(key, certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with serving(QuietHandler, context) as encrypted:
        for address, cause in {
            f"http://127.0.0.1:{free_port()}": "Connection refused",
            "http://no-such-name.invalid": "Failed to resolve 'no-such-name.invalid'",
            encrypted: "certificate verify failed: self-signed certificate",
        }.items():
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            with pytest.raises(Exception, match=r".") as error:
                store.client().get_experiment_by_name("x" * 400)
            said = explain_mlflow_error(error.value)
            assert cause in said and address in said and "Caused by" not in said and len(said) < 700, said
            advised = "MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE (SSL_CERT_FILE is not read)" in said
            assert advised == (address == encrypted), said
