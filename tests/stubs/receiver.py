"""A real webhook receiver on this machine, which verifies signatures according to the specification."""

import base64
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

KEY = b"a key of the tests, 32 bytes lon"
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"


class Receiver:
    """Records every event with a valid signature; a context manager."""

    def __init__(self, path: str = "/hook/t0k3n") -> None:
        self.events: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        """Headers of every request, including those answered with an error."""
        self.answers: list[int] = []
        """Statuses of the next responses, then 204; 0 means no response at all."""
        self.retry_after = ""
        """Value of the Retry-After header of every error response."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._http.receiver = self  # type: ignore[attr-defined]
        self.over = threading.Event()
        self.environment = {
            "KUBEALIGN_WEBHOOK_URL": f"http://127.0.0.1:{self._http.server_port}{path}",
            "KUBEALIGN_WEBHOOK_SECRET": SECRET,
        }

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        """Receive a delivery."""
        receiver: Receiver = self.server.receiver  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
        status = receiver.answers.pop(0) if receiver.answers else 204
        if status == 0:
            receiver.over.wait(30)
            return
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        if self.headers["webhook-signature"] != f"v1,{expected}":
            status = 401
        elif status < 300:
            receiver.events.append(json.loads(body))
        self.send_response(status)
        if status in (301, 302, 307):
            self.send_header("Location", "/elsewhere")
        if status >= 400 and receiver.retry_after:
            self.send_header("Retry-After", receiver.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()
