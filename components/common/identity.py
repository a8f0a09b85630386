"""A user's name and home folder for the libraries that ask for them, where the user is only a number.

Containers run as any number: Kubernetes sets no USER, most engines write no line into /etc/passwd, and OpenShift draws
the number. Libraries of git, DVC and getpass raise then; each asks the environment first.
"""

import atexit
import getpass
import os
import shutil
import tempfile
from pathlib import Path

NAME_VARIABLES = ("LOGNAME", "USER")
WRITTEN_TO = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
"""Variables that name the folders which libraries write to, below the home folder by default."""


def ensure_identity() -> None:
    """Name the user in the environment if nothing does, and a folder in place of a home that cannot be used.

    A home that can be read but not written stays, as git's settings and keys may be in it; only what libraries write
    goes elsewhere.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ.update(dict.fromkeys(NAME_VARIABLES, f"uid-{os.getuid()}"))
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one would be the root folder
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path's raises without a name
    if home.is_absolute() and os.access(home, os.R_OK | os.X_OK):
        missing: tuple[str, ...] = () if os.access(home, os.W_OK) else WRITTEN_TO
    else:
        missing = ("HOME",)
    unset = [name for name in missing if name == "HOME" or not os.environ.get(name)]
    if unset:
        folder = tempfile.mkdtemp(prefix="kubealign-home-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update(dict.fromkeys(unset, folder))
