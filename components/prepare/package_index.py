"""Files of a package index (PEP 503, PEP 691), found and downloaded without running anything of theirs.

The indexes are those that pip is configured with: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, or pip's
configuration files.
"""

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from components.common.limits import ANSWER_S

DEFAULT = "https://pypi.org/simple"
LOCAL = "file://"
JSON = "application/vnd.pypi.simple.v1+json"
MAX_PAGE_BYTES = 64 * 2**20
MAX_FILE_BYTES = 8 * 2**30
BLOCK_BYTES = 1 << 20


def places(project: str, file: str) -> list[Path | str]:
    """Where a project's file may be: in folders of this machine, if it is there, then at the URLs of indexes.

    The folders are find-links and file:// indexes; the indexes are in the order in which pip would ask them.
    """
    configured = _pip_settings()
    asked = (configured.get("index-url", DEFAULT), *configured.get("extra-index-url", "").split())
    urls = [url.rstrip("/") for url in asked if url]
    folders = [Path(link.removeprefix(LOCAL)) for link in configured.get("find-links", "").split()]
    folders += [Path(url.removeprefix(LOCAL)) / _normal(project) for url in urls if url.startswith(LOCAL)]
    found = [folder / file for folder in folders if (folder / file).is_file()]
    return [*found, *(url for url in urls if not url.startswith(LOCAL))]


def _normal(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower()


def _pip_settings() -> dict[str, str]:
    """pip's settings, from its files and the environment, which comes last and wins."""
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.strip().rpartition(".")
        if section in ("global", "download", ":env:"):
            found[name] = str(ast.literal_eval(value))
    for name in ("index-url", "extra-index-url", "find-links"):
        variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
        found |= {name: variable} if variable else {}
    return found


def find_file(index: str, project: str, file: str) -> str:
    """The URL of a project's file.

    Raises:
        OSError: the index does not answer.
        ValueError: it has no such file, or names it at an address of another kind than its own.
    """
    page = f"{index}/{_normal(project)}/"
    with _get(page, index, {"Accept": f"{JSON}, text/html;q=0.5"}) as answer:
        content = b""
        for block in answer.iter_content(BLOCK_BYTES):
            content += block
            if len(content) > MAX_PAGE_BYTES:
                raise ValueError(f"its page of {project} is longer than {MAX_PAGE_BYTES} bytes")
        if "json" in answer.headers.get("Content-Type", ""):
            links = {str(entry["filename"]): str(entry["url"]) for entry in json.loads(content)["files"]}
        else:
            links = _links(content.decode("utf-8", errors="replace"))
    if file not in links:
        raise ValueError(f"{project} has no file {file} there")
    url = urljoin(page, links[file]).partition("#")[0]
    _check(url, index)
    return url


def download(url: str, index: str, target: Path) -> None:
    """Download a file of an index.

    Raises:
        OSError: the server does not answer.
        ValueError: it is longer than any package.
    """
    with _get(url, index, {"Accept-Encoding": "identity"}) as answer, target.open("wb") as file:
        size = 0
        for block in answer.iter_content(BLOCK_BYTES):
            size += len(block)
            if size > MAX_FILE_BYTES:
                raise ValueError(f"longer than {MAX_FILE_BYTES} bytes")
            file.write(block)


def _get(url: str, index: str, headers: dict[str, str]) -> Any:
    import requests

    certificates = os.environ.get("PIP_CERT") or True
    answer = requests.get(url, headers=headers, stream=True, timeout=(ANSWER_S, ANSWER_S), verify=certificates)
    _check(answer.url, index)
    if answer.status_code != requests.codes.ok:
        raise ValueError(f"HTTP {answer.status_code}")
    return answer


def _check(url: str, index: str) -> None:
    """Check that an address is as safe as the index that was configured: https, or the same plain http server."""
    parts, home = urlsplit(url), urlsplit(index)
    if parts.scheme != "https" and (parts.scheme, parts.hostname, parts.port) != (
        home.scheme,
        home.hostname,
        home.port,
    ):
        raise ValueError(f"it leads to an address that is not https, at {parts.hostname or parts.scheme}")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "a" and target:
            name = unquote(urlsplit(target).path.rpartition("/")[2])
            self.found[name] = target


def _links(page: str) -> dict[str, str]:
    parser = _Links()
    parser.feed(page)
    return parser.found
