"""The quiet environment: no telemetry, no hub, no progress bars; see quiet.env."""

from pathlib import Path

FILE = Path(__file__).with_name("quiet.env")
QUIET = dict(
    line.split("=", 1) for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
)
"""Environment of every step, unless it is set already."""
