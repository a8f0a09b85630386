"""Polling for a condition."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, within_s: float = 60.0, every_s: float = 0.02) -> T:
    """Poll a condition until it is truthy; returns its value.

    Args:
        condition: called at every poll.
        what: the condition's description for the error.
        within_s: timeout, in seconds.
        every_s: pause between two polls, in seconds.

    Raises:
        AssertionError: the condition has not become true within the timeout.
    """
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s"
        time.sleep(every_s)
    return answer
