"""A stub of the part of GitHub's REST API that `kubealign ci` uses; anything else gets 404.

Paths, responses and limits: docs.github.com/rest, version 2022-11-28: issues/comments, commits/statuses,
commits/commits (list pull requests associated with a commit).
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

REPOSITORY = "team/alignment"
TOKEN = "ghs-of-the-stub"  # noqa: S105 - of the stub


class GitHubStub:
    """Comments, statuses and pull requests of one repository; a context manager."""

    def __init__(self) -> None:
        self.comments: dict[int, dict[str, Any]] = {}
        self.statuses: list[tuple[str, dict[str, str]]] = []
        self.pull_requests: dict[str, int] = {}
        """The pull request that contains a commit, by the commit's hash."""
        self.faults: list[int] = []
        """Statuses with which the next write requests fail, before anything is done."""
        self.lost: int = 0
        """How many of the next writes are done but answered with 502."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.stub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {
            "GITHUB_API_URL": self.url,
            "GITHUB_REPOSITORY": REPOSITORY,
            "GITHUB_TOKEN": TOKEN,
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> "GitHubStub":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def of(self, pull_request: int) -> list[str]:
        """The comments of a pull request."""
        return [entry["body"] for entry in self.comments.values() if entry["issue"] == pull_request]

    def add(self, pull_request: int, body: str, foreign: bool = False) -> None:
        """Add an existing comment; a `foreign` one cannot be edited."""
        number = len(self.comments) + 1
        self.comments[number] = {"id": number, "issue": pull_request, "body": body, "foreign": foreign}

    def route(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:  # noqa: PLR0911 - a route each
        """The status and body of the response to a request."""
        rest = path.removeprefix(f"/repos/{REPOSITORY}/")
        if method == "GET" and (match := re.fullmatch(r"issues/(\d+)/comments", rest)):
            size, page = int(query.get("per_page", ["30"])[0]), int(query.get("page", ["1"])[0])
            ours = [entry for entry in self.comments.values() if entry["issue"] == int(match[1])]
            return 200, ours[(page - 1) * size : page * size]
        if method == "POST" and (match := re.fullmatch(r"issues/(\d+)/comments", rest)):
            if set(body) != {"body"} or len(body["body"]) > 65536:
                return 422, {"message": "Body is too long (maximum is 65536 characters)"}
            self.add(int(match[1]), body["body"])
            return 201, self.comments[len(self.comments)]
        if method == "PATCH" and (match := re.fullmatch(r"issues/comments/(\d+)", rest)):
            comment = self.comments[int(match[1])]
            if comment["foreign"]:
                return 403, {"message": "Unable to edit this comment"}
            comment["body"] = body["body"]
            return 200, comment
        if method == "GET" and (match := re.fullmatch(r"commits/([0-9a-f]{40})/pulls", rest)):
            return 200, [{"number": self.pull_requests[sha]} for sha in self.pull_requests if sha == match[1]]
        if method == "POST" and (match := re.fullmatch(r"statuses/([0-9a-f]{40})", rest)):
            if body.get("state") not in ("error", "failure", "pending", "success") or len(body["description"]) > 140:
                return 422, {"message": "Validation Failed"}
            self.statuses.append((match[1], body))
            return 201, body
        return 404, {"message": "Not Found"}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        stub: GitHubStub = self.server.stub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, answer = 401, {"message": "Bad credentials"}
        elif self.command != "GET" and stub.faults:
            status, answer = stub.faults.pop(0), {"message": "injected fault"}
        else:
            status, answer = stub.route(self.command, url.path, parse_qs(url.query), json.loads(data or b"null"))
            if self.command != "GET" and stub.lost:
                stub.lost -= 1
                status, answer = 502, {"message": "the answer is lost"}
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = _serve
