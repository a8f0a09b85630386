"""A guard that lets only tests with a marker of `MARKERS` start servers and other external programs."""

MARKERS = ("integration", "containers", "ci", "cluster")

_allowed = True
"""Set before each test, in this process only."""


def allow(markers: set[str]) -> None:
    """Allow or forbid external programs to a test with these markers."""
    global _allowed  # noqa: PLW0603 - pytest runs one test at a time in a process
    _allowed = bool(markers & set(MARKERS))


def check(program: str) -> None:
    """Fail if the current test must not start a program.

    Raises:
        AssertionError: the test has none of the markers.
    """
    assert _allowed, f"{program} is started by a test that is not marked `integration`; plain tests need Python alone"
