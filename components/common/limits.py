"""Limits on how long something from elsewhere may take: a server that is silent, or one that sends a byte a minute."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from components.common.errors import KubealignError

ANSWER_S = 60.0
"""Longest wait for a connection, and between two pieces of an answer."""
AGAIN_S = 1.0
"""How soon the limit strikes again, if a library took it for an error of its own and went on."""


class _TimeIsUp(BaseException):
    """Not an Exception, which libraries catch to try again."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Run a block for at most so long.

    Args:
        seconds: the limit on the whole block.
        what: what is waited for, and what to do; the beginning of the message.

    Raises:
        KubealignError: the block did not end in time. In a thread that is not the main one nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    except _TimeIsUp as error:
        raise KubealignError(f"{what}: no end after {seconds:.0f} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def answer_limit(seconds: float = ANSWER_S) -> Iterator[None]:
    """Let no new connection of Python's own or of libgit2 wait longer for an answer; by default they wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        import pygit2
    except ImportError:
        pass
    else:
        pygit2.settings.server_connect_timeout = pygit2.settings.server_timeout = int(seconds * 1000)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
