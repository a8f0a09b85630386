"""Error messages for failures of MLflow and the disk, and the one `[error:…]` line of a failed stage."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from components.common.errors import KubealignError, single_line
from components.tracking import events
from components.tracking.store import tracking_uri, without_credentials


@contextmanager
def report_errors(stage: str) -> Iterator[None]:
    """Run a stage's work: report its start and end, and turn a failure into one `[error:…]` line and an exit code.

    A KubealignError is shown as it is; any other error is preceded by its traceback.
    """
    events.started(stage)
    try:
        yield
    except KubealignError as error:
        events.error(stage, str(error), error.exit_code)
        sys.exit(error.exit_code)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a library in Rust panics with what is no Exception
        print(without_credentials(traceback.format_exc()), flush=True)
        events.error(stage, explain_error(error))
        sys.exit(1)
    events.finished(stage)


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
    reason = without_credentials(single_line(str(error)))[:300]
    status = getattr(error, "get_http_status_code", lambda: 0)()
    if status in (401, 403):
        user = os.environ.get("MLFLOW_TRACKING_USERNAME") or "nobody (MLFLOW_TRACKING_USERNAME is not set)"
        return (
            f"MLflow at {server} does not let {user} do this ({reason}); writing runs needs EDIT on the experiment,"
            " registering and promoting needs EDIT on the registered model; the owner or an administrator can grant it"
        )
    return f"MLflow at {server}: {reason}"


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
