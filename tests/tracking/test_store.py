"""Addresses of MLflow, and errors of a stage, in one line."""

import os
from pathlib import Path

import pytest

from components.common.secrets import without_credentials
from components.tracking import store
from components.tracking.errors import report_errors


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
