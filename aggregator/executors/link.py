"""What passes between a process and its workers: messages in frames on a socket.

A conversation serves one task: the worker gets a `Run`, may ask its owner (`Ask`, answered by `Answer`s), and ends with
`Done` or `Failed`. The first frame of all is no message: it holds what `multiprocessing` passes to a spawned process.
The user's objects are inside of messages as pickles, see `pickling.py`.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.records import Role, Usage
from aggregator.sandbox.limits import Place


class Load(Struct, frozen=True, tag=True):
    """An object that later messages refer to by its number: an agent or a guide, pickled."""

    number: int
    data: bytes


class Run(Struct, frozen=True, tag=True):
    """Run one task: `work` and `task` are pickled, the rest is the caller's context.

    `sandbox` is the place of trained code, if `sandboxed` is open around the run.
    """

    work: bytes
    task: bytes
    lineage: str
    role: Role
    sandbox: Place | None


class Cancel(Struct, frozen=True, tag=True):
    """Cancel the task that runs."""


class Answer(Struct, frozen=True, tag=True):
    """A part of the answer to an `Ask`: a delta of a stream, the completion or the error, each pickled."""

    number: int
    data: bytes
    is_error: bool = False


class Check(Struct, frozen=True, tag=True):
    """Check the text of an answer with the `validate` that the asking code gave."""

    number: int
    text: str


class Started(Struct, frozen=True, tag=True):
    """The worker has loaded the work and begins the task."""


class Ask(Struct, frozen=True, tag=True):
    """A call to a model that the owner answers, pickled. `made` are the settings of a client that the worker made."""

    number: int
    call: bytes
    stream: bool = False
    checks: bool = False
    made: bytes | None = None


class Stop(Struct, frozen=True, tag=True):
    """The answer to this `Ask` is not needed any more."""

    number: int


class Checked(Struct, frozen=True, tag=True):
    """The result of a `Check`: the error that `validate` raised, pickled, or None."""

    number: int
    error: bytes | None


class Done(Struct, frozen=True, tag=True):
    """The rollout, pickled, and the usage of calls that the owner did not answer, with the role of each."""

    rollout: bytes
    usage: list[tuple[str, Usage]]


class Failed(Struct, frozen=True, tag=True):
    """The task ended with an error that ends the run, pickled, and with such usage."""

    error: bytes
    usage: list[tuple[str, Usage]]


ToWorker = Load | Run | Cancel | Answer | Check
FromWorker = Started | Ask | Stop | Checked | Done | Failed

HEAD = 8
"""How many bytes hold the length of a frame."""

_encode = msgspec.msgpack.Encoder().encode


class Link:
    """One end of a socket. Messages are sent in the order of `send`; one task at a time receives."""

    def __init__(self, end: socket.socket, kinds: Any) -> None:
        end.settimeout(0)
        self._socket = end
        self._decoder = msgspec.msgpack.Decoder(kinds)
        self._unsent: asyncio.Queue[bytes | None] = asyncio.Queue()

    def send(self, message: ToWorker | FromWorker | bytes) -> None:
        """Queue a message, or the body of a frame, for `write`."""
        body = message if isinstance(message, bytes) else _encode(message)
        self._unsent.put_nowait(len(body).to_bytes(HEAD, "big") + body)

    def finish(self) -> None:
        """Let `write` return once it has written what was queued."""
        self._unsent.put_nowait(None)

    async def write(self) -> None:
        """Write what is queued, until `finish`."""
        loop = asyncio.get_running_loop()
        while (frame := await self._unsent.get()) is not None:
            with suppress(OSError):  # the other end is closed, which `receive` reports
                await loop.sock_sendall(self._socket, frame)
            self._unsent.task_done()

    async def flush(self) -> None:
        """Return once what was sent so far is written."""
        await self._unsent.join()

    async def receive(self) -> Any:
        """Return the next message, None once the other end is closed."""
        head = await self._exactly(HEAD)
        body = None if head is None else await self._exactly(int.from_bytes(head, "big"))
        return None if body is None else self._decoder.decode(body)

    async def _exactly(self, count: int) -> bytearray | None:
        loop, received = asyncio.get_running_loop(), bytearray()
        while len(received) < count:
            try:
                piece = await loop.sock_recv(self._socket, min(count - len(received), 1 << 20))
            except OSError:
                return None
            if not piece:
                return None
            received += piece
        return received
