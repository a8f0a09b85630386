"""The quiet environment: no telemetry, no hub, no progress bars, no AWS configuration files; see quiet.env."""

from pathlib import Path

from components.common.provenance import PACKAGES

FILE = Path(__file__).with_name("quiet.env")
AWS_FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
"""Variables that name AWS's configuration files, which may name programs to run; here they name an empty file, and the
keys of S3 come from the environment. (botocore does not take /dev/null for a file.)
"""
QUIET = dict(
    line.split("=", 1) for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
) | dict.fromkeys(AWS_FILES, str(PACKAGES / "components" / "common" / "empty.cfg"))
"""Environment of every step, unless it is set already."""
