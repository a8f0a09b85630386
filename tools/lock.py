"""Resolve the dependencies of all extras of pyproject.toml into requirements.lock: `make lock`.

    python tools/lock.py TORCH_WHEEL [words for uv, such as --upgrade]

Runs uv, for every Python and platform that the project supports. Each package gets the hashes of its files in the index
and a line with the extras that need it, which tools/install_locked.py reads. The hash of TORCH_WHEEL is let in as well:
builds for CPUs come from elsewhere.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from install_locked import LOCK, PROJECT, locked

COMPILE = ["-m", "uv", "pip", "compile", "-q", "--universal", "--python-version", "3.11", "--no-header"]
HEADER = """\
# Made by `make lock`. The packages of an extra are installed by tools/install_locked.py.
"""


def compiled(*words: str) -> str:
    """What uv makes of pyproject.toml."""
    with tempfile.NamedTemporaryFile(suffix=".txt") as out:
        Path(out.name).write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run([sys.executable, *COMPILE, *words, str(PROJECT), "-o", out.name], check=True)
        return Path(out.name).read_text(encoding="utf-8")


def main() -> None:
    """Write requirements.lock."""
    wheel, *words = sys.argv[1:]
    version = re.split(r"[-+]", Path(wheel).name)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as fixed:
        fixed.write(f"torch=={version}\n")
        fixed.flush()
        text = compiled("--all-extras", "--generate-hashes", "-c", fixed.name, *words)
    text = re.sub(r"^ +#( via)? +-c .*\n", lambda match: "    # via\n" if match[1] else "", text, flags=re.MULTILINE)
    digest = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    if digest not in text:
        text = text.replace(f"torch=={version} \\\n", f"torch=={version} \\\n    --hash=sha256:{digest} \\\n")
    LOCK.write_text(HEADER + text, encoding="utf-8")
    by_extra = {
        extra: set(locked(compiled("--extra", extra, "--no-annotate")))
        for extra in tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    }
    lines = [HEADER]
    for name, block in locked(text).items():
        extras = [extra for extra, names in by_extra.items() if name in names]
        lines += [block, f"    # for {' '.join(extras)}\n"]
    LOCK.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
