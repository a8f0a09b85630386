"""Waiting for something to become true."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, within_s: float = 60.0, every_s: float = 0.02) -> T:
    """Ask again and again until the answer is true; gives it.

    Args:
        condition: what to ask.
        what: names it in the error.
        within_s: how long at most, in seconds.
        every_s: pause between two questions, in seconds.

    Raises:
        AssertionError: it has not become true in time.
    """
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:.0f} s"
        time.sleep(every_s)
    return answer
