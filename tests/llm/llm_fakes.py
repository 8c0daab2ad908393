"""Fakes for the client's tests: a transport, a server on loopback, virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from aggregator.records import HTTPReply
from aggregator.testing import FakeTransport as ScriptedTransport
from aggregator.testing import error_reply as failure
from aggregator.testing import text_reply as answer

__all__ = [
    "BASE_URL",
    "QUESTION",
    "Handler",
    "ScriptedTransport",
    "VirtualLoop",
    "VirtualTime",
    "answer",
    "answering",
    "failure",
    "raw",
    "read_request",
    "serving",
]

BASE_URL = "http://127.0.0.1:9/v1"
QUESTION = [{"role": "user", "content": "Say hello."}]


class VirtualTime:
    """A clock that moves only when code sleeps; records each sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer:

    hours of waiting take milliseconds, and timers fire in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 0.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._virtual = max(self._virtual, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler, *, port: int = 0) -> AsyncIterator[str]:
    """Run a TCP server on loopback and yield its base URL. Connections still open at the end are closed."""
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (asyncio.CancelledError, ConnectionError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    """Read one HTTP request and return its first line, headers and body, or None if the client has closed."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return first, headers, body


def chunk(data: bytes) -> bytes:
    """Return one chunk of a body with `transfer-encoding: chunked`."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def raw(reply: HTTPReply) -> bytes:
    """Build the bytes of an HTTP response."""
    headers = {"content-type": "application/json", **reply.headers, "content-length": str(len(reply.body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {reply.status} OK\r\n{lines}\r\n".encode() + reply.body


def answering(replies: Iterable[HTTPReply]) -> Handler:
    """Return a handler that sends one response per request, in order, across all connections."""
    left = iter(replies)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader) is not None:
            writer.write(raw(next(left)))
            await writer.drain()

    return handle
