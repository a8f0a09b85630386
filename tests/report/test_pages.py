"""The report pages as Kubeflow shows them: in an iframe with sandbox="allow-scripts" and nothing else, in Chromium."""

import html
import http.server
import json
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from components.report.html import Table, environment
from tests.support.stages import Stages
from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration

MAX_BYTES = 1_000_000
STARTS_WITHIN_S = 60
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-features=IsolateSandboxedIframes",  # keeps the frame within reach of this one connection
    "--remote-allow-origins=*",
    "--remote-debugging-port=0",
]


class Browser:
    """A page of a headless Chromium over its DevTools protocol."""

    def __init__(self, address: str) -> None:
        request = urllib.request.Request(f"http://{address}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - our own browser
            self.socket = websocket.create_connection(json.load(answer)["webSocketDebuggerUrl"], timeout=30)
        self.events: list[dict[str, Any]] = []
        self.count = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found
            self.events.append(message)

    def frame_context(self, url: str, width: int) -> int:
        """Open `url` and give the JavaScript context of the frame in it, once that has loaded."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        return wait_until(self._loaded_frame, "the frame has loaded", STARTS_WITHIN_S)

    def _loaded_frame(self) -> int:
        """The JavaScript context of the page's frame once it has loaded, until then 0."""
        frames = self.call("Page.getFrameTree")["frameTree"].get("childFrames", [])
        created = [event for event in self.events if event.get("method") == "Runtime.executionContextCreated"]
        for context in reversed([event["params"]["context"] for event in created]):
            inside = frames and context["auxData"]["frameId"] == frames[0]["frame"]["id"]
            if inside and self.evaluate(context["id"], "document.readyState") == "complete":
                return int(context["id"])
        return 0

    def evaluate(self, context: int, expression: str) -> Any:
        found = self.call("Runtime.evaluate", contextId=context, expression=expression, returnByValue=True)
        return found["result"].get("value")

    def troubles(self) -> list[Any]:
        """Exceptions and errors on the console so far."""
        self.call("Runtime.evaluate", expression="0")  # what happened before it has arrived after it
        thrown = [event["params"] for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in self.events if event.get("method") == "Log.entryAdded"]
        return thrown + [entry for entry in logged if entry["level"] == "error" and "favicon" not in str(entry)]

    def requests(self) -> set[str]:
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return {event["request"]["url"].partition("?")[0] for event in sent}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have Chromium (Debian package chromium)")
        pytest.skip("no Chromium here, so no page was looked at; Debian package chromium")
    folder = tmp_path_factory.mktemp("chromium")
    words = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        wait_until(lambda: port.is_file() and port.read_text().splitlines(), "Chromium's port", STARTS_WITHIN_S)
        yield Browser(f"127.0.0.1:{port.read_text().splitlines()[0]}")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def kubeflow_page() -> Iterator[tuple[str, dict[str, str]]]:
    """A server whose page at /name shows pages[name] as Kubeflow's user interface does; gives address and pages."""
    pages: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            inner = html.escape(pages.get(self.path.strip("/"), ""), quote=True)
            frame = (
                f'<iframe sandbox="allow-scripts" srcdoc="{inner}" style="width:100%;height:800px;border:0"></iframe>'
            )
            body = f"<!doctype html><meta charset=utf-8><body style='margin:0'>{frame}".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", pages
        server.shutdown()


@pytest.fixture(scope="module")
def reports(stages: Stages) -> dict[str, Path]:
    """The pages that steps give to Kubeflow."""
    stages.align("paged")
    return {"evaluate": stages.folder / "paged" / "report.html", "validate": stages.folder / "v.html"}


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("name", ["evaluate", "validate"])
def test_a_report_works_in_kubeflows_iframe(
    name: str, width: int, browser: Browser, kubeflow_page: tuple[str, dict[str, str]], reports: dict[str, Path]
) -> None:
    address, pages = kubeflow_page
    pages[name] = reports[name].read_text(encoding="utf-8")
    assert len(pages[name].encode()) < MAX_BYTES
    context = browser.frame_context(f"{address}/{name}", width)
    assert browser.evaluate(context, "window.origin") == "null", "the frame is not sandboxed"
    assert len(browser.evaluate(context, "document.body.innerText")) > 200
    assert browser.evaluate(context, "document.querySelectorAll('table').length") >= 1
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert browser.evaluate(context, wide) is False, "the page scrolls sideways"
    assert browser.troubles() == []
    assert {url for url in browser.requests() if url.startswith("http")} <= {
        f"{address}/{name}",
        f"{address}/favicon.ico",
    }


def test_a_click_on_a_title_sorts_the_table_and_a_second_one_turns_it_round(
    browser: Browser, kubeflow_page: tuple[str, dict[str, str]]
) -> None:
    address, pages = kubeflow_page
    rows = [["b", "0.25 [0.1, 0.4]"], ["a", "-1.5 [-2, -1]"], ["c", "10.0 [9, 11]"]]
    template = environment().from_string(
        "{% extends 'page.html.jinja' %}{% from 'macros.html.jinja' import table_of %}"
        "{% block content %}{{ table_of(table) }}{% endblock %}"
    )
    pages["sorted"] = template.render(table=Table(["name", "value"], rows))
    context = browser.frame_context(f"{address}/sorted", 400)
    click = "document.querySelectorAll('th')[{}].click()"
    order = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent).join('')"
    found = []
    for title in (1, 1, 0, 0):
        browser.evaluate(context, click.format(title))
        found.append(browser.evaluate(context, order))
    assert found == ["cba", "abc", "cba", "abc"]
    assert browser.evaluate(context, "document.querySelector('th').getAttribute('aria-sort')") == "ascending"
    assert browser.troubles() == []


def test_the_checks_see_a_page_that_needs_more_than_the_sandbox_gives(
    browser: Browser, kubeflow_page: tuple[str, dict[str, str]]
) -> None:
    address, pages = kubeflow_page
    pages["bad"] = (
        "<body><script>localStorage.setItem('a', 1)</script><img src='http://127.0.0.1:9/pixel'>"
        "<div style='width:3000px'>wide</div>"
    )
    context = browser.frame_context(f"{address}/bad", 400)
    assert "SecurityError" in json.dumps(browser.troubles())
    assert "http://127.0.0.1:9/pixel" in browser.requests()
    assert browser.evaluate(context, "document.documentElement.scrollWidth > 400") is True
