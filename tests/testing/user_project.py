"""A user's project tree, and its model: what the plugin's tests run in."""

from __future__ import annotations

import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401 - loaded before pytester's runs, which forget what they were first to load
import httpx  # noqa: F401
import hypothesis.internal.observability  # noqa: F401
import pytest

import aggregator.cassettes.patches
import aggregator.testing.serving_vcr
import aggregator.testing.taping  # noqa: F401

PROJECT = Path(__file__).parent / "project"


class Model(ThreadingHTTPServer):
    """Numbers its answers."""

    daemon_threads = True
    hits = 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        model: Any = self.server
        model.hits += 1
        body = f"answer {model.hits}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def only(pytester: pytest.Pytester, body: str) -> None:
    """Replace the project's tests by one module."""
    shutil.rmtree(pytester.path / "tests" / "unit", ignore_errors=True)
    path = pytester.path / "tests" / "test_one.py"
    path.write_text("import httpx, os, pytest, socket\nfrom router import route, aroute\n" + body)


def cassettes(pytester: pytest.Pytester) -> list[str]:
    return sorted(str(path.relative_to(pytester.path)) for path in pytester.path.rglob("*.yaml"))
