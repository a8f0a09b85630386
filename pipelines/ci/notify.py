"""Notifications of a verdict: a signed webhook, a pull-request comment that is kept up to date, a commit status.

The webhook follows the Standard Webhooks specification (standardwebhooks.com, version 1.0), so any of its libraries can
verify it. GitHub's API is configured by the variables of a GitHub Actions job: GITHUB_TOKEN, GITHUB_REPOSITORY,
GITHUB_API_URL.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from components.common.errors import ApiError, InputError, KubealignError, RequestRejectedError
from components.common.secrets import without_credentials
from pipelines.terminal import document

URL, SECRET = "KUBEALIGN_WEBHOOK_URL", "KUBEALIGN_WEBHOOK_SECRET"
TRIES = 5
FIRST_DELAY_S = 1.0
"""Backoff factor: the second try follows at once, the third after twice this, every further one after twice as long."""
ANSWER_S = 10.0
"""Connect timeout, and read timeout between two bytes."""
RETRYABLE = (408, 425, 429, *range(500, 600))
"""HTTP statuses after which a retry may succeed."""
MAX_RETRY_AFTER_S = 60
"""The longest wait that a server's Retry-After can ask for."""
MAX_COMMENT = 65_000
"""GitHub accepts up to 65536 characters."""
MARKER = re.compile(r"<!-- kubealign:[\w-]+ -->")


def ask(method: str, url: str, body: bytes | None, headers: dict[str, str], shown: str, tries: int = TRIES) -> bytes:
    """Make an HTTP request, with retries while the server fails or does not answer; returns the response body.

    A redirect is an error: signed content and tokens go only to the configured address.

    Args:
        method: HTTP method.
        url: the address, which may hold a secret.
        body: the request body.
        headers: the request headers.
        shown: the server's name for error messages.
        tries: maximum number of attempts; 1 for a request that must not be repeated.

    Raises:
        RequestRejectedError: the server rejected the request.
        ApiError: every attempt failed; a later one may succeed.
    """
    retries = Retry(
        total=tries - 1,
        allowed_methods=None,  # any
        status_forcelist=RETRYABLE,
        backoff_factor=FIRST_DELAY_S,
        retry_after_max=MAX_RETRY_AFTER_S,
        raise_on_status=False,
    )
    with requests.Session() as session, _silent_urllib3():
        session.mount("https://", HTTPAdapter(max_retries=retries))
        session.mount("http://", HTTPAdapter(max_retries=retries))
        session.auth = _unchanged
        try:
            answer = session.request(method, url, data=body, headers=headers, timeout=ANSWER_S, allow_redirects=False)
        except requests.RequestException as error:
            # The message contains the address; the reason's type name is enough.
            reason = getattr(error.args[0], "reason", error) if error.args else error
            problem = f"does not answer ({type(reason).__name__})"
        else:
            if 200 <= answer.status_code < 300:
                return answer.content
            problem = f"answered {answer.status_code}"
            if answer.status_code not in RETRYABLE:
                message = " ".join(answer.content[:2000].decode(errors="replace").split())[:200]
                raise RequestRejectedError(f"{shown} {problem}: {message}", answer.status_code)
    raise ApiError(f"{shown} {problem}" + (f", {tries} times" if tries > 1 else ""), retryable=True)


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """No-op authentication; without one, requests would replace the token by a user from ~/.netrc."""
    return request


@contextmanager
def _silent_urllib3() -> Iterator[None]:
    """Silence urllib3, which logs the path of every request that it retries; a webhook's path is a secret."""
    logger = logging.getLogger("urllib3")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, repr=False)
class Webhook:
    """The receiver of verdicts and failures. Its address, which is often a secret, and its key are never shown."""

    url: str
    key: bytes

    def send(self, kind: str, data: Mapping[str, object]) -> None:
        """Deliver an event.

        Args:
            kind: event type, such as `retrain.verdict`.
            data: the event's payload, as JSON values.

        Raises:
            KubealignError: it could not be delivered.
        """
        now = datetime.now(UTC)
        event = {"type": kind, "timestamp": now.isoformat(timespec="seconds"), "data": data}
        body = without_credentials(json.dumps(event, ensure_ascii=False)).encode()
        delivery, seconds = f"msg_{uuid.uuid4().hex}", str(int(now.timestamp()))
        headers = {
            "content-type": "application/json",
            "user-agent": "kubealign",
            "webhook-id": delivery,
            "webhook-timestamp": seconds,
            "webhook-signature": signature(self.key, delivery, seconds, body),
        }
        ask("POST", self.url, body, headers, f"the webhook at {urllib.parse.urlsplit(self.url).hostname}")


def signature(key: bytes, delivery: str, seconds: str, body: bytes) -> str:
    """The signature of a delivery: HMAC-SHA256 over its id, timestamp and body (Standard Webhooks 1.0).

    The package `standardwebhooks` has the same two lines, but accepts secrets of any length and times without a zone.
    """
    digest = hmac.new(key, f"{delivery}.{seconds}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def webhook() -> Webhook | None:
    """The webhook configured in the environment, if any.

    Raises:
        InputError: the address or the secret is unusable.
    """
    url, secret = os.environ.get(URL, ""), os.environ.get(SECRET, "")
    if not url and not secret:
        return None
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise InputError(f"{URL}: expected an https:// address (or http:// on this machine)")
    if "@" in parts.netloc:
        raise InputError(f"{URL}: a user or password in a URL would reach logs; the signature proves who sends")
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise InputError(
            f"{SECRET}: expected `whsec_` followed by 24 to 64 random bytes in base64, such as from"
            ' `echo "whsec_$(openssl rand -base64 32)"`'
        )
    return Webhook(url, key)


class GitHub:
    """A repository on GitHub, accessed with the job's token."""

    def __init__(self) -> None:
        self.api = os.environ.get("GITHUB_API_URL", "https://api.github.com").rstrip("/")
        self.repository, self._token = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get("GITHUB_TOKEN", "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository) or not self._token:
            raise InputError("set GITHUB_REPOSITORY (owner/name) and GITHUB_TOKEN, as in a GitHub Actions job")

    def comment(self, text: str, pull_request: int, update_only: bool = False) -> str:
        """Post a comment on a pull request, or update the one that begins with the same marker.

        Returns:
            the action taken: `created`, `updated`, or `none needed` when `update_only` found no comment to update.

        Raises:
            InputError: the text does not begin with a marker.
            KubealignError: GitHub rejected the request or failed.
        """
        marker = MARKER.match(text)
        if not marker:
            raise InputError("the comment's first line is not a marker such as <!-- kubealign:data -->")
        text = document(text)
        if len(text) > MAX_COMMENT:
            text = f"{text[:MAX_COMMENT]}\n\n(truncated to GitHub's comment limit)"
        for attempt in range(TRIES):
            existing = self._comments_with_marker(pull_request, marker[0])
            if any(self._update(comment, text) for comment in existing):
                return "updated"
            if update_only:
                return "none needed"
            try:
                self._ask("POST", f"issues/{pull_request}/comments", {"body": text}, tries=1)
            except KubealignError as error:
                # It may have been created all the same: look for it before the next attempt.
                if not error.retryable or attempt + 1 == TRIES:
                    raise
                time.sleep(FIRST_DELAY_S * 2**attempt)
            else:
                return "created"
        raise AssertionError

    def _comments_with_marker(self, pull_request: int, marker: str) -> list[int]:
        """Ids of the comments that begin with the marker."""
        ids: list[int] = []
        page, has_more = 1, True
        while has_more:
            comments = self._ask("GET", f"issues/{pull_request}/comments?per_page=100&page={page}")
            ids += [int(entry["id"]) for entry in comments if str(entry.get("body", "")).startswith(marker)]
            page, has_more = page + 1, len(comments) == 100
        return ids

    def _update(self, comment: int, text: str) -> bool:
        """Replace a comment's text; returns False if it is somebody else's comment that begins with our marker."""
        try:
            self._ask("PATCH", f"issues/comments/{comment}", {"body": text})
        except RequestRejectedError as error:
            if error.status == 403:
                return False
            raise
        return True

    def pull_requests(self, commit: str) -> list[int]:
        """Numbers of the pull requests that contain a commit."""
        return [int(entry["number"]) for entry in self._ask("GET", f"commits/{commit}/pulls")]

    def status(self, commit: str, status: dict[str, str]) -> None:
        """Set a commit's status: `state`, `description`, `context` and optionally `target_url`."""
        self._ask("POST", f"statuses/{commit}", status)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, tries: int = TRIES) -> Any:
        headers = {
            "authorization": f"Bearer {self._token}",
            "accept": "application/vnd.github+json",
            "content-type": "application/json",
            "user-agent": "kubealign",
            "x-github-api-version": "2022-11-28",
        }
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        answer = ask(method, f"{self.api}/repos/{self.repository}/{path}", data, headers, "GitHub", tries)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ApiError(f"GitHub's answer is not JSON; check GITHUB_API_URL ({error})", True) from error
