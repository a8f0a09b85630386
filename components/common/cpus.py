"""How many CPUs this process may use: those it may run on, and no more than its control group's quota.

In a pod with a limit all cores of the machine are visible, and threads beyond the limit are stopped most of the time.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Whole CPUs for this process, at least one; a quota of 1.4 leaves one, as threads that wait for each other are
    only as fast as the one that is stopped.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """The CPU quotas of this process's control group and of those around it, in CPUs."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUPS / controllers if controllers else CGROUPS
        own = top / path.lstrip("/")
        # Inside a container the path is that of the host, and the files are at the top.
        for folder in {top, *(parent for parent in (own, *own.parents) if parent.is_relative_to(top))}:
            yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """A group's quota, as version 2 or version 1 writes it, if it has one."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)
