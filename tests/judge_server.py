"""A chat-completions server on loopback that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-not-for-other-ears-0123456789"
Behaviour = Callable[["Request"], None]


@dataclass
class Request:
    """One request as it came; `number` counts from 0 over the server's life."""

    handler: BaseHTTPRequestHandler
    number: int
    text: str  # of the message
    seen: int  # times this text had been asked before

    def send(self, body: bytes | str, status: int = 200, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(data)))
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def say(self, answer: Any) -> None:
        """A chat completion with this content."""
        self.send(json.dumps({"choices": [{"message": {"content": answer}}]}))

    def fail(self, status: int, message: str = "no", **headers: str) -> None:
        self.send(json.dumps({"error": {"message": message}}), status, **headers)


@dataclass
class Server:
    """base: for OPENAI_BASE_URL. bodies, headers: of the requests so far, as they came."""

    base: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.headers)


@contextmanager
def serving(behave: Behaviour) -> Iterator[Server]:
    """The server, in a thread of its own; every request in another."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(data)
            text = body["messages"][0]["content"]
            with lock:
                number = server.calls
                seen = sum(b["messages"][0]["content"] == text for b in server.bodies)
                server.bodies.append({"path": self.path, **body})
                server.headers.append(dict(self.headers))
            behave(Request(self, number, text, seen))

        def do_GET(self) -> None:  # what a followed redirect would become
            with lock:
                server.headers.append(dict(self.headers))

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            """Clients that hang up are what the tests are about."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def part(text: str, letter: str) -> str:
    """The completion that a dialogue question shows as `letter`."""
    after = text.split(f"\n\nResponse {letter}:\n")[1]
    return after.split("\n\nResponse B:\n")[0].split("\n\nFIRST provide")[0]


def prefers_longer(request: Request) -> None:
    """A judge without a bias for a place."""
    a, b = len(part(request.text, "A")), len(part(request.text, "B"))
    request.say(f"Comparison: one is longer.\nMore helpful: {'A' if a > b else 'B'}")
