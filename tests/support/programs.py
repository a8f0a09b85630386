"""Which tests may start servers and programs beside Python: those with a marker of `MARKERS`."""

MARKERS = ("integration", "containers", "ci", "cluster")

_allowed = True
"""Set before each test; programs that tests start know nothing of it."""


def allow(markers: set[str]) -> None:
    """Let a test with these markers start programs, or not."""
    global _allowed  # noqa: PLW0603 - pytest runs one test at a time in a process
    _allowed = bool(markers & set(MARKERS))


def check(program: str) -> None:
    """Fail where a test without a marker would start a program.

    Raises:
        AssertionError: it would.
    """
    assert _allowed, f"{program} is started by a test that is not marked `integration`; plain tests need Python alone"
