"""Kill the leading process of a run and every process in this one's group at an event: before a rename, a removal, …

Copied as `sitecustomize.py` to where the processes of a run find it: Python imports it when they start. KILL_AT holds
the name of an audit event of Python (https://docs.python.org/3/library/audit_events.html) and a pattern for one of its
arguments, such as `os.rename */dpo-*/step-000003`. The event is reported before what it names is done.
"""

import os
import signal
import sys
from fnmatch import fnmatch
from typing import Any

LEADER = "KILL_LEADER"


def _kill_at(event: str, pattern: str) -> None:
    leader = int(os.environ.setdefault(LEADER, str(os.getpid())))

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and any(fnmatch(str(argument), pattern) for argument in arguments):
            os.kill(leader, signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


if point := os.environ.get("KILL_AT"):
    _kill_at(*point.split(" ", 1))
