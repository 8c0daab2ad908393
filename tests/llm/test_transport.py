"""HTTP over aiohttp, against misbehaving servers on loopback."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from llm_fakes import answer, answering, raw, read_request, serving
from msgspec.structs import replace

from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError
from aggregator.llm.retry import was_sent
from aggregator.llm.transport import AiohttpTransport
from aggregator.records import HTTPReply, HTTPRequest


def request(url: str, body: bytes = b"{}") -> HTTPRequest:
    return HTTPRequest(url=f"{url}/chat/completions", body=body, headers={"content-type": "application/json"})


@pytest.mark.requirement("client 15: header names are plain text")
async def test_header_names_are_plain_lower_case_text() -> None:
    """Cassettes are written from them: a str subclass would be written as a Python object."""
    async with serving(answering([answer(headers={"X-RateLimit-Limit": "9"})])) as url, AiohttpTransport() as transport:
        reply = await transport.send(request(url))
    assert reply.headers["x-ratelimit-limit"] == "9"
    assert {type(name) for name in reply.headers} == {str}
    assert reply.milliseconds > 0


@pytest.mark.requirement("client 1: only encodings that can be decoded")
async def test_compressed_bodies_are_decompressed() -> None:
    """The reply's body is the decompressed one."""
    body = gzip.compress(b'{"a": 1}')
    zipped = HTTPReply(status=200, body=body, headers={"content-encoding": "gzip"})
    async with serving(answering([zipped])) as url, AiohttpTransport() as transport:
        assert (await transport.send(request(url))).body == b'{"a": 1}'


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (gzip.compress(b"{}") + b"more", {"content-encoding": "gzip"}),
        (b"not compressed", {"content-encoding": "gzip"}),
        (b"2\r\n{}\r\n", {"transfer-encoding": "chunked"}),
        (b"zz\r\n{}", {"transfer-encoding": "chunked"}),
    ],
    ids=["data after gzip", "no gzip", "stalled", "bad chunk"],
)
async def test_an_answer_that_could_not_be_read_left_its_connection_open(body: bytes, headers: dict[str, str]) -> None:
    """It was closed with a ResourceWarning, once the error was forgotten."""
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        lines = {"content-length": f"{len(body)}"} if "transfer-encoding" not in headers else {}
        head = "".join(f"{name}: {value}\r\n" for name, value in (lines | headers).items())
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body)
        await reader.read()
        closed.set()

    async with serving(handle) as url, AiohttpTransport() as transport:
        with pytest.raises(APIConnectionError) as caught:
            await transport.send(request(url), timeout=0.3)
        await asyncio.wait_for(closed.wait(), 5)
    assert caught.value is not None


@pytest.mark.requirement("client 1: no redirects")
async def test_redirects_are_not_followed() -> None:
    """A redirected POST would become a GET."""
    away = HTTPReply(status=307, body=b"", headers={"location": "http://127.0.0.1:1/"})
    async with serving(answering([away])) as url, AiohttpTransport() as transport:
        assert (await transport.send(request(url))).status == 307


async def test_cookies_are_not_sent() -> None:
    """No cookie of one call is sent with the next."""
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (got := await read_request(reader)) is not None:
            seen.append(got[1].get("cookie"))
            writer.write(raw(answer(headers={"set-cookie": "a=1; Path=/"})))

    async with serving(handle) as url, AiohttpTransport() as transport:
        await transport.send(request(url))
        await transport.send(request(url))
    assert seen == [None, None]


@pytest.mark.requirement("client 8: a class for each kind")
async def test_a_refused_connection_sent_nothing() -> None:
    """Nothing was sent, so nothing can cost."""
    async with serving(answering([])) as url:
        pass
    async with AiohttpTransport() as transport:
        with pytest.raises(APIConnectionError, match="no connection to 127.0.0.1") as caught:
            await transport.send(request(url))
    assert not was_sent(caught.value)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    await asyncio.Event().wait()


@pytest.mark.requirement("client 1: a deadline for each call", "client 8: a class for each kind")
async def test_the_deadline_ends_a_request() -> None:
    """A server that never answers raises APITimeoutError; it may have worked on the request."""
    async with serving(hang) as url, AiohttpTransport() as transport:
        with pytest.raises(APITimeoutError, match="Expected a whole answer from .* within 0.05 s, got none") as caught:
            await transport.send(request(url), timeout=0.05)
    assert was_sent(caught.value)


async def test_a_truncated_answer() -> None:
    """Half a body is an error."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(raw(answer())[:-20])

    async with serving(handle) as url, AiohttpTransport() as transport:
        with pytest.raises(APIConnectionError, match="Expected a whole answer .* got a closed connection"):
            await transport.send(request(url))


@pytest.mark.parametrize(
    "answered",
    [b"NOT HTTP AT ALL\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}"],
    ids=["no status line", "negative length"],
)
async def test_the_key_was_in_the_error_of_an_answer_that_is_not_http(answered: bytes) -> None:
    """The message describes what is wrong with the answer, and quotes nothing of the request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answered)

    async with serving(handle) as url, AiohttpTransport() as transport:
        asked = HTTPRequest(url=f"{url}/x", body=b"{}", headers={"authorization": "Bearer sk-the-key-itself"})
        with pytest.raises(APIConnectionError, match="Expected an HTTP response from ") as caught:
            await transport.send(asked)
    assert "sk-the-key-itself" not in str(caught.value)
    assert "\n" not in str(caught.value)


class DyingConnections:
    """Answers the first request of a connection and closes at the second without a byte."""

    def __init__(self, *, always: bool = False) -> None:
        self.requests = 0
        self.connections = 0
        self.always = always

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if not self.always and await read_request(reader) is not None:
            self.requests += 1
            writer.write(raw(answer()))
        if await read_request(reader) is not None:
            self.requests += 1


@pytest.mark.requirement("client 2: sent once, the next attempt over a new connection", "Trace: reset_freq")
async def test_a_used_connection_that_died_was_replaced_silently() -> None:
    """The server may have read the request, so the transport sends it once and reports that it was lost."""
    server = DyingConnections()
    async with serving(server) as url, AiohttpTransport() as transport:
        assert (await transport.send(request(url))).status == 200
        with pytest.raises(APIConnectionError):
            await transport.send(request(url))
        assert (await transport.send(request(url))).status == 200
    assert (server.requests, server.connections) == (3, 2)


async def test_many_used_connections_that_died() -> None:
    """A request for a new connection does not use the pool, whose connections died."""
    server = DyingConnections()
    async with serving(server) as url, AiohttpTransport() as transport:
        for fresh in (False, True):
            async with asyncio.TaskGroup() as tasks:
                asked = replace(request(url), fresh=fresh)
                sent = [tasks.create_task(transport.send(asked)) for _ in range(20)]
            assert [task.result().status for task in sent] == [200] * 20


@pytest.mark.requirement("client 2: a new one is not")
async def test_a_new_connection_that_dies_is_not_replaced() -> None:
    """Only an idle connection may have died before the request; here the server may have started to work."""
    server = DyingConnections(always=True)
    async with serving(server) as url, AiohttpTransport() as transport:
        with pytest.raises(APIConnectionError):
            await transport.send(request(url))
    assert server.requests == 1


@pytest.mark.requirement("client 1: no limit of connections")
async def test_more_than_a_hundred_at_once() -> None:
    """aiohttp's limit of 100 connections is lifted: the limiter bounds concurrency, not the pool."""
    arrived = 0
    everybody = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        await read_request(reader)
        arrived += 1
        if arrived == 150:
            everybody.set()
        await everybody.wait()
        writer.write(raw(answer()))

    async with (
        serving(handle) as url,
        AiohttpTransport() as transport,
        asyncio.timeout(20),
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(150):
            tasks.create_task(transport.send(request(url)))
    assert arrived == 150


async def test_an_invalid_address() -> None:
    """A mistake in base_url is a ConfigError, not a lost connection to retry."""
    async with AiohttpTransport() as transport:
        with pytest.raises(ConfigError, match="base_url"):
            await transport.send(request("no-scheme"))


async def test_a_key_with_its_line_break_was_reported_as_an_attack() -> None:
    """A key read from a file may end in a line break: the ConfigError says so, without the key."""
    async with serving(answering([answer()])) as url, AiohttpTransport() as transport:
        asked = HTTPRequest(url=f"{url}/x", body=b"{}", headers={"authorization": "Bearer sk-the-key-itself\n"})
        with pytest.raises(ConfigError, match=r"header 'authorization' as printable text.*around the key") as caught:
            await transport.send(asked)
    assert "sk-the-key-itself" not in str(caught.value)


async def test_an_invalid_port_raised_a_value_error() -> None:
    """An address that cannot be parsed is reported as invalid."""
    async with AiohttpTransport() as transport:
        with pytest.raises(ConfigError, match="as base_url, got 'http://127.0.0.1:99999/chat/completions'"):
            await transport.send(request("http://127.0.0.1:99999"))


@pytest.mark.requirement(
    "client 1: one session per event loop",
    "client 1: idle connections are kept 4 s at most",
    "Trace: reset_freq",
)
async def test_idle_connections_are_dropped_before_servers_drop_them() -> None:
    """Servers close a connection after 5 s; one idle for longer than `keepalive_timeout` is not reused."""
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await read_request(reader) is not None:
            writer.write(raw(answer()))

    async with serving(handle) as url, AiohttpTransport(keepalive_timeout=0.02) as transport:
        await transport.send(request(url))
        await transport.send(request(url))
        await asyncio.sleep(0.05)
        await transport.send(request(url))
    assert connections == 2


FORGETFUL = """
import asyncio, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from aggregator import LLM

BODY = b'{"choices": [{"message": {"content": "hi"}}]}'

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)
    def log_message(self, *args):
        pass

class Server(ThreadingHTTPServer):
    daemon_threads = True

server = Server(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
llm = LLM("m", base_url=f"http://127.0.0.1:{server.server_port}/v1")

async def main():
    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(llm.complete("hello"))
    async for delta in llm.stream("hello"):
        break

HOW
server.server_close()
print("done")
"""


THREADS = """
threads = [threading.Thread(target=llm, args=("hello",)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.requirement("client 1: one session per event loop", "built 8: closed cleanly")
@pytest.mark.parametrize(
    "how",
    [
        "asyncio.run(main())",
        "llm(messages='hello')",
        "asyncio.run(main()); llm(messages='hello'); asyncio.run(main())",
        THREADS,
    ],
    ids=["own loop", "portal", "both", "threads"],
)
def test_a_script_that_closes_nothing_ends_without_warnings(how: str) -> None:
    """No session, socket or task is left open, whatever event loops a script has used."""
    script = textwrap.dedent(FORGETFUL).replace("HOW", how)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    slow = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]  # asyncio's debug mode
    assert (done.stdout, slow, done.returncode) == ("done\n", [], 0)


@pytest.mark.requirement("client 15: cancelling closes the socket")
async def test_leaving_a_stream_ends_its_request() -> None:
    """The server sees the connection of an abandoned stream close."""
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await reader.read()
        closed.set()

    async with serving(handle) as url, AiohttpTransport() as transport:
        async with transport.open(request(url), timeout=5) as opened:
            pieces: Any = opened.pieces()
            assert await anext(pieces) == b"hello"
            await pieces.aclose()
        async with asyncio.timeout(5):
            await closed.wait()
