"""Error messages for failures of MLflow and the disk, and the one `[error:…]` line of a failed stage."""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import TypedDict

from components.common.documents import read_document
from components.common.errors import InputError, KubealignError, single_line
from components.common.files import digest, write_json
from components.common.foreign import one_line
from components.common.identity import ensure_identity
from components.common.secrets import without_credentials
from components.tracking import events
from components.tracking.store import KFP_RUN_VARIABLE, home, in_pod, tracking_uri

REFUSED_FOR_S = 600.0
"""How long a refusal counts; `cluster.backoff_s` of 60 seconds makes the first two retries within three minutes."""

REFUSALS = {401: r"(?i)unauthori[sz]ed|unauthenticated|invalid_token|\b401\b", 403: r"(?i)forbidden|\b403\b"}
"""Words by which proxies say what the status is."""


@contextmanager
def report_errors(stage: str) -> Iterator[None]:
    """Run a stage's work: report its start and end, and turn a failure into one `[error:…]` line and an exit code.

    A KubealignError is shown as it is; any other error is preceded by its traceback. A refusal is remembered: when the
    cluster retries the step, it ends at once.
    """
    ensure_identity()
    events.started(stage)
    if (refused := _refused(stage)) is not None:
        events.error(stage, f"{refused['message']} (refused before; a retry cannot help)", refused["exit_code"])
        sys.exit(refused["exit_code"])
    try:
        yield
    except KubealignError as error:
        if error.refusal:
            _remember(stage, error)
        events.error(stage, str(error), error.exit_code)
        sys.exit(error.exit_code)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a library in Rust panics with what is no Exception
        for line in traceback.format_exc().splitlines():
            print(one_line(line, indented=True), flush=True)
        events.error(stage, explain_error(error))
        sys.exit(1)
    events.finished(stage)


class Refusal(TypedDict):
    """Why a step of a run on Kubeflow was refused; `at` is in seconds since 1970."""

    message: str
    exit_code: int
    at: float


def _refusal_file(stage: str) -> Path:
    return home() / "refusals" / f"{digest([os.environ.get(KFP_RUN_VARIABLE), stage])[:24]}.json"


def _refused(stage: str) -> Refusal | None:
    """The refusal of the same step of the same run a short time ago; whoever repaired something may try again later."""
    path = _refusal_file(stage)
    if not in_pod() or not path.is_file():
        return None
    try:
        refusal = read_document(path, Refusal)
    except InputError:
        return None
    return refusal if 0 <= time.time() - refusal["at"] < REFUSED_FOR_S else None


def _remember(stage: str, error: KubealignError) -> None:
    if in_pod():
        # What counts is the error itself, whether or not the disk takes it.
        with suppress(OSError):
            write_json(
                _refusal_file(stage),
                Refusal(message=without_credentials(str(error)), exit_code=error.exit_code, at=time.time()),
            )


def explain_error(error: BaseException) -> str:
    """One sentence for an unexpected failure, without credentials."""
    if is_mlflow_failure(error):
        return explain_mlflow_error(error)
    if isinstance(error, OSError):
        return explain_os_error(error)
    return without_credentials(f"{type(error).__name__}: {single_line(str(error))}")


def is_mlflow_failure(error: BaseException) -> bool:
    """Whether MLflow, or the connection to it, failed."""
    return type(error).__module__.startswith(("mlflow.", "sqlalchemy.", "requests.", "urllib3."))


def is_unreachable(error: BaseException) -> bool:
    """Whether MLflow does not answer, or answers that it cannot serve requests now."""
    if type(error).__module__.startswith(("requests.", "urllib3.")):
        return True
    text = str(error)
    return is_mlflow_failure(error) and (
        "Max retries exceeded" in text or "too many 5" in text or "failed with exception" in text
    )


def explain_mlflow_error(error: BaseException) -> str:
    """A sentence for the MLflow failures that people can fix."""
    server = without_credentials(tracking_uri())
    reason = _shortened(without_credentials(single_line(str(error))))
    status = _refusal_status(error)
    if status == 401:
        return (
            f"MLflow at {server} does not accept {_caller()} ({reason}); the password (MLFLOW_TRACKING_PASSWORD) or"
            " token is wrong, expired, or another server's"
        )
    if status == 403:
        return (
            f"MLflow at {server} does not let {_caller()} do this ({reason}); writing runs needs EDIT on the"
            " experiment, registering and promoting needs EDIT on the registered model; the owner or an administrator"
            " can grant it"
        )
    if re.search(r"(?i)certificate.verify.failed", reason):
        reason += (
            "; if an authority of your own signed it, name the file of its certificate in"
            " MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE (SSL_CERT_FILE is not read)"
        )
    return f"MLflow at {server}: {reason}"


def _shortened(reason: str) -> str:
    """A reason of bounded length, with the last of its causes, which says what is wrong."""
    outer, found, cause = reason.rpartition("(Caused by ")
    if not found:
        return reason[:300]
    # NewConnectionError("HTTPConnection(host='127.0.0.1', port=9): Failed to …: [Errno 111] Connection refused"))
    cause = re.sub(r"^(?:\w+\()+(?:\d+, )?[\"']?(?:<[^>]*>: |HTTPS?Connection\([^)]*\): )?", "", cause)
    cause = re.sub(r"[\"']\)+$", "", cause)
    return f"{outer.partition(' failed with exception')[0][:200]} failed: {cause[:250]}"


def _refusal_status(error: BaseException) -> int:
    """401 or 403 if the server, or a proxy before it, refused; else another status or 0."""
    text = str(error)
    if told := re.search(r"error code (\d{3})", text):
        return int(told[1])
    status = int(getattr(error, "get_http_status_code", lambda: 0)())
    if status == 500:  # how MLflow reads a refusal in JSON that is not its own
        return next((refused for refused, words in REFUSALS.items() if re.search(words, text)), status)
    return status


def _caller() -> str:
    """Who asks MLflow, by the variables that its client reads."""
    if (user := os.environ.get("MLFLOW_TRACKING_USERNAME")) and os.environ.get("MLFLOW_TRACKING_PASSWORD"):
        return user
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return "the token in MLFLOW_TRACKING_TOKEN"
    if user:
        return f"{user} (MLFLOW_TRACKING_PASSWORD is not set)"
    return "nobody (neither MLFLOW_TRACKING_USERNAME nor MLFLOW_TRACKING_TOKEN is set)"


def explain_os_error(error: OSError) -> str:
    """A sentence for the disk failures that people can fix, without credentials."""
    path = error.filename2 or error.filename or "the disk"
    if error.errno == errno.ENOSPC:
        text = f"{path}: no space left; free some (`kubealign clean` shows what runs left behind) and run again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = f"{path}: cannot be written or read ({error.strerror}); check its owner and mode and run again"
    else:
        text = f"{type(error).__name__}: {error}"
    return without_credentials(single_line(text))
