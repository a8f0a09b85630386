"""The peak memory of this process."""

import re
import resource
import sys
from pathlib import Path


def peak_memory_mib() -> float:
    """Peak resident memory of this process so far, in MiB.

    /proc counts from the start of this program; getrusage's value starts at the size of the parent process.
    """
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) / 1024
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
