"""vcrpy's `use_cassette` on our tape, as its users see it."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from vcr import VCR
from vcr.errors import CannotOverwriteExistingCassetteException

from aggregator.errors import CassetteMissError
from aggregator.testing.serving_vcr import served_context


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hits = 0

    def do_GET(self) -> None:
        type(self).hits += 1
        body = json.dumps({"n": self.hits, "path": self.path}).encode()
        self.send_response(200)
        if self.path == "/gzip":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Set-Cookie", "a=1; Path=/")
        self.send_header("Set-Cookie", "b=2; Path=/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loopback server that numbers its answers."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Handler, "hits", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def use(tmp_path: Path) -> Any:
    """`vcr.use_cassette` on a file of the test."""
    return lambda **options: served_context(VCR(), lambda *_: None, {"path": str(tmp_path / "a.yaml"), **options})


def test_a_miss_was_not_vcrpys_exception(url: str, use: Any) -> None:
    """Code that expects vcrpy's class catches it, and it is not raised again when the block ends."""
    with use():
        requests.get(url, timeout=9)
    with use(record_mode="none") as cassette:
        with pytest.raises(CannotOverwriteExistingCassetteException) as raised:
            requests.get(f"{url}/other", timeout=9)
        assert isinstance(raised.value, CassetteMissError)
    assert (cassette.play_count, cassette.all_played) == (0, False)


def test_new_recordings_were_not_visible(url: str, use: Any) -> None:
    """`requests`, `responses`, `len` and counts are right while recording, and after the file was read."""
    with use() as cassette:
        requests.get(f"{url}/a", timeout=9)
        assert [one.path for one in cassette.requests] == ["/a"]
        assert json.loads(cassette.responses[0]["body"]["string"])["n"] == 1
        assert (len(cassette), cassette.play_count, cassette.all_played) == (1, 0, False)
    assert cassette.responses[0]["body"]["string"].startswith('{"n": 1')
    with use(record_mode="new_episodes") as cassette:
        requests.get(f"{url}/a", timeout=9)
        assert (len(cassette), cassette.play_count, cassette.all_played) == (1, 1, True)
        requests.get(f"{url}/b", timeout=9)
        assert [one.path for one in cassette.requests] == ["/a", "/b"]
        assert (len(cassette), cassette.play_count, cassette.all_played) == (2, 1, False)


def test_matching_was_stricter_than_the_tests_own_match_on(url: str, use: Any) -> None:
    """`match_on` is applied literally: bodies only if it names them, the exact address if it names that."""
    with use():
        first = requests.post(f"{url}/a?x=1&y=2", json={"q": 1}, timeout=9).json()
    for options in ({}, {"match_on": ["method", "path"]}):
        with use(record_mode="none", **options):
            assert requests.post(f"{url}/a?x=1&y=2", json={"q": 2}, timeout=9).json() == first
    with use(record_mode="none", match_on=["path"]):
        assert requests.get(f"{url}/a", timeout=9).json() == first
    for match_on in (["body"], ["uri"]):
        with use(record_mode="none", match_on=match_on), pytest.raises(CannotOverwriteExistingCassetteException):
            requests.post(f"{url}/a?y=2&x=1", json={"q": 2}, timeout=9)


def test_cookies_and_compressed_bodies_replay_unchanged(url: str, use: Any) -> None:
    """Repeated headers stay separate; a body stays compressed unless it is to be decoded."""
    for _ in range(2):
        with use(), httpx.Client() as client:
            reply = client.get(f"{url}/gzip")
            assert (reply.headers["content-encoding"], reply.json()["n"]) == ("gzip", 1)
            assert sorted(client.cookies) == ["a", "b"]
    assert Handler.hits == 1


def test_decorated_functions_use_the_tape(url: str, use: Any) -> None:
    """Functions and coroutine functions, each call with the cassette open."""

    @use()  # type: ignore[untyped-decorator]
    def ask() -> Any:
        return requests.get(url, timeout=9).json()["n"]

    assert [ask(), ask()] == [1, 1]
    assert Handler.hits == 1


def test_in_process_transports_are_recorded_for_vcr_tests(use: Any) -> None:
    """They are recorded and played as by vcrpy, and nowhere else."""
    ran: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        ran.append(request.url.path)
        return httpx.Response(200, text="ok")

    for _ in range(2):
        with use(), httpx.Client(transport=httpx.MockTransport(answer)) as client:
            assert client.get("http://x.test/a").text == "ok"
    assert ran == ["/a"]


def test_a_name_as_long_as_the_file_system_allows(url: str, tmp_path: Path) -> None:
    """The lock and the journal next to such a file have shorter names."""
    path = tmp_path / ("a" * 250 + ".yaml")
    for _ in range(2):
        with served_context(VCR(), lambda *_: None, {"path": str(path), "record_mode": "new_episodes"}):
            assert requests.get(url, timeout=9).json()["n"] == 1
    assert list(tmp_path.iterdir()) == [path]
