"""Addresses that settings and data repositories name: which are accepted, decided by a real parser."""

import re
from urllib.parse import SplitResult, urlsplit

SSH_ADDRESS = re.compile(r"[\w][\w.-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[^:\s]+")
"""An address as scp writes it, such as git@host:team/data.git."""
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:]+")
USER = re.compile(r"\w[\w.-]*")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that http without TLS may name: what is sent there does not leave the machine."""


def is_url(address: str) -> bool:
    """Whether a repository is named by URL (or scp-like address) rather than by path."""
    return "://" in address or SSH_ADDRESS.fullmatch(address) is not None


def parse_url(url: str, schemes: tuple[str, ...], user: bool = False, anywhere: bool = False) -> SplitResult:
    """The parts of a URL that names a place and nothing else.

    Args:
        url: the URL.
        schemes: those accepted; `http` only for a loopback address.
        user: whether a user may stand before the host; a password never may.
        anywhere: whether `http` may name any host, as inside a cluster.

    Raises:
        ValueError: another scheme, a user, password, query or fragment in it, or no plain host.
    """
    if not url.isprintable() or re.search(r"[\s\\]", url):
        raise ValueError("white space, a backslash or a control character in a URL")
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    if scheme not in schemes or (scheme == "http" and host not in LOOPBACK and not anywhere):
        accepted = ", ".join("http to this machine itself" if name == "http" else name for name in schemes)
        raise ValueError(f"the scheme {scheme or '(none)'} is not accepted; expected {accepted}")
    if parts.password is not None or ("@" in parts.netloc and not user):
        raise ValueError("a user or token in a URL would reach logs; git's credential helpers keep it")
    if "?" in url or "#" in url:
        raise ValueError("a query or fragment in a URL; expected host and path alone")
    if not HOST.fullmatch(host) or not USER.fullmatch(parts.username or "git") or parts.port == 0:
        raise ValueError("no plain host name in the URL")
    return parts


def check_repository(repo: str) -> str:
    """A git repository's address, checked: https, ssh, http to this machine itself, or a path, also as file:///path.

    Raises:
        ValueError: as `parse_url`; or a path that git would take for a transport or an option.
    """
    if repo.startswith("file:///"):
        check_repository(repo.removeprefix("file://"))
        return repo
    if "://" in repo:
        parts = parse_url(repo, ("https", "ssh", "http"), user=repo.lower().startswith("ssh:"))
        if not parts.path.strip("/"):
            raise ValueError("no repository in the URL; expected a path after the host")
    elif not is_url(repo) and ("::" in repo or repo.startswith("-") or not repo.isprintable()):
        raise ValueError("neither a path nor a URL; expected a folder, or https://host/path")
    return repo
