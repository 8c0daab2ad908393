"""A loopback server for the tests of cassettes. Each test file has a handler of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """`hits` counts the requests; `drops` is the number of connections to close without an answer."""

    daemon_threads = True
    request_queue_size = 128
    hits = 0
    drops = 0

    def handle_error(self, *_: Any) -> None:
        """Do not report a connection that was dropped on purpose."""

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.server_port}"


class LoopbackHandler(BaseHTTPRequestHandler):
    """Reads bodies and writes replies."""

    protocol_version = "HTTP/1.1"
    server: LoopbackServer

    def read_body(self) -> bytes:
        """Read the request's body, in chunks or by its length."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def reply(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Write an answer, as JSON by default; without its body for HEAD."""
        self.send_response(status)
        for name, value in (headers or {"content-type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serve(handler: type[LoopbackHandler]) -> Iterator[LoopbackServer]:
    """Run a server in a thread."""
    with LoopbackServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
