"""How much memory this program took."""

import re
import resource
import sys
from pathlib import Path


def peak_memory_mib() -> float:
    """Peak resident memory of this program so far, MiB.

    Linux keeps it for each program; getrusage's begins at the size of the process that started this one.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
