"""The protocol between a process and its workers: messages in frames on a socket, and objects as pickles.

A conversation serves one task: the worker gets a `Run`, may ask its owner (`Ask`, answered by `Answer`s), and ends with
`Done` or `Failed`. The very first frame is not a message: it holds what `multiprocessing` passes to a spawned process.

The user's objects are pickled inside the messages. Models stay in the owner's process, with their keys: a pickle holds
their number, and a worker gets an object that asks the owner. The agent and its parameters are sent once; other pickles
refer to them. Functions that a decorator replaced in their module are found through `__wrapped__`.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FunctionType
from typing import Any

import msgspec
from msgspec import Meta, Struct

from aggregator.errors import ConfigError
from aggregator.records import Role, Usage
from aggregator.sandbox.limits import Place

# ---- messages


class Load(Struct, frozen=True, tag=True):
    """An object that later messages refer to by its number: an agent or a guide, pickled."""

    number: int
    data: bytes


class Run(Struct, frozen=True, tag=True):
    """Run one task: `work` and `task` are pickled, the other fields are the caller's context.

    `sandbox` is the place of trained code, if `sandboxed` is open around the run.
    """

    work: bytes
    task: bytes
    lineage: str
    role: Role
    sandbox: Place | None


class Cancel(Struct, frozen=True, tag=True):
    """Cancel the running task."""


class Answer(Struct, frozen=True, tag=True):
    """A part of the answer to an `Ask`: a delta of a stream, the completion or the error, each pickled."""

    number: int
    data: bytes
    is_error: bool = False


class Check(Struct, frozen=True, tag=True):
    """Check the text of an answer with the caller's `validate`."""

    number: int
    text: str


class Started(Struct, frozen=True, tag=True):
    """The worker has loaded the work and starts the task."""


class Ask(Struct, frozen=True, tag=True):
    """A call to a model that the owner answers, pickled. `made` are the settings of a client that the worker made."""

    number: int
    call: bytes
    stream: bool = False
    checks: bool = False
    made: bytes | None = None


class Stop(Struct, frozen=True, tag=True):
    """The answer to this `Ask` is no longer needed."""

    number: int


class Checked(Struct, frozen=True, tag=True):
    """The result of a `Check`: the error that `validate` raised, pickled, or None."""

    number: int
    error: bytes | None


class Done(Struct, frozen=True, tag=True):
    """The pickled rollout, and the usage of calls that the owner did not answer, with the role of each."""

    rollout: bytes
    usage: list[tuple[str, Usage]]


class Failed(Struct, frozen=True, tag=True):
    """The task ended with an error that ends the run, pickled, with the same kind of usage."""

    error: bytes
    usage: list[tuple[str, Usage]]


ToWorker = Load | Run | Cancel | Answer | Check
FromWorker = Started | Ask | Stop | Checked | Done | Failed

HEAD = 8
"""The number of bytes for the length of a frame."""

_encode = msgspec.msgpack.Encoder().encode


# ---- the connection


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
        """Let `write` return once it has written the queue."""
        self._unsent.put_nowait(None)

    async def write(self) -> None:
        """Write the queue until `finish`."""
        loop = asyncio.get_running_loop()
        while (frame := await self._unsent.get()) is not None:
            with suppress(OSError):  # the other end is closed, which `receive` reports
                await loop.sock_sendall(self._socket, frame)
            self._unsent.task_done()

    async def flush(self) -> None:
        """Return once everything sent so far is written."""
        await self._unsent.join()

    async def receive(self) -> Any:
        """Return the next message, or None once the other end is closed."""
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


Reference = tuple[Any, ...]


# ---- pickling agents, guides and errors


class Pickler(pickle.Pickler):
    """Pickles an object; `refer` returns the reference that replaces a part of it, or None."""

    def __init__(self, file: io.BytesIO, refer: Callable[[Any], Reference | None]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._refer = refer

    def persistent_id(self, obj: Any) -> Reference | None:
        """Replace an object that the other side has by a reference."""
        return self._refer(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Pickle a decorated function by its position, and the bounds of a type; everything else as usual."""
        if type(obj) is Meta:
            return _meta, ({name: getattr(obj, name) for name in _BOUNDS if getattr(obj, name) is not None},)
        if type(obj) is FunctionType and (depth := _depth_of(obj)):
            return _undecorated, (_named(obj), depth)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, resolve: Callable[[Reference], Any]) -> None:
        super().__init__(file)
        self._resolve = resolve

    def persistent_load(self, pid: Any) -> Any:
        return self._resolve(pid)


def dumps(value: Any, refer: Callable[[Any], Reference | None], what: str, remedy: str) -> bytes:
    """Return a value as bytes; raises ConfigError for one that cannot be pickled, and names it as `what`."""
    file = io.BytesIO()
    try:
        Pickler(file, refer).dump(value)
    except Exception as error:
        path = _culprit(value, refer)
        kind, where = type(value).__name__, f" - at {type(value).__name__}{path}" if path else ""
        raise ConfigError(
            f"Expected {what} that pickles, got {kind}: {type(error).__name__}: {error}; {remedy}{where}"
        ) from error
    return file.getvalue()


def _culprit(value: Any, refer: Callable[[Any], Reference | None], depth: int = 6) -> str:
    """Return the path of the innermost part of a value that cannot be pickled, "" for the value itself."""
    parts: list[tuple[str, Any]]
    if isinstance(value, dict):
        parts = [(f"[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"[{i}]", part) for i, part in enumerate(value)]
    else:
        parts = [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]
    for name, part in parts if depth else ():
        try:
            Pickler(io.BytesIO(), refer).dump(part)
        except Exception:  # noqa: BLE001 - what pickling raises, it is raised with its path
            return name + _culprit(part, refer, depth - 1)
    return ""


def loads(data: bytes, resolve: Callable[[Reference], Any]) -> Any:
    """Return the value in a pickle; raises any exception of unpickling."""
    return _Unpickler(io.BytesIO(data), resolve).load()


def dump_error(error: BaseException, *, note: str = "") -> bytes:
    """Return an error as bytes. One that cannot be pickled is replaced by one of its nearest base class.

    With `note` the traceback is added to it as a note that begins with this text.
    """
    if note:
        trace = "".join(traceback.format_exception(error)).rstrip()
        error.add_note(f"{note}:\n{trace}")
    for made in _substitutes(error):
        try:
            data = pickle.dumps(made)
            if type(pickle.loads(data)) is type(made):  # noqa: S301 - our own bytes
                return data
        except Exception:  # noqa: BLE001, S112 - the next one is simpler
            continue
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def load_error(data: bytes) -> BaseException:
    """Return the error in a pickle of `dump_error`; one whose class is missing here becomes a RuntimeError."""
    try:
        error = pickle.loads(data)  # noqa: S301 - a worker runs trusted code
    except Exception as failed:  # noqa: BLE001 - a class of the user's may do anything
        return RuntimeError(f"Expected an error of a worker that unpickles, got {type(failed).__name__}: {failed}")
    return error if isinstance(error, BaseException) else RuntimeError(f"Expected an error, got {error!r}")


def _substitutes(error: BaseException) -> Iterable[BaseException]:
    yield error
    message = f"{type(error).__qualname__}: {error}"
    notes = getattr(error, "__notes__", [])
    facts = {
        key: value for key, value in vars(error).items() if value is None or type(value) in (str, int, float, bool)
    }
    for kind in type(error).__mro__[1:]:
        if not issubclass(kind, BaseException) or kind is BaseException:
            continue
        try:
            made = kind(message)
        except Exception:  # noqa: BLE001, S112 - a class that wants other arguments
            continue
        made.__dict__.update({key: value for key, value in facts.items() if key in vars(made) and key != "message"})
        for note in notes:
            made.add_note(note)
        yield made


_BOUNDS = [name for name in dir(Meta) if not name.startswith("_")]


def _meta(bounds: dict[str, Any]) -> Meta:
    """Rebuild the bounds of a type, because msgspec's cannot be pickled."""
    return Meta(**bounds)


def _named(function: FunctionType) -> Any:
    """Return the object that a function's module has under its name."""
    found: Any = sys.modules.get(function.__module__ or "")
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def _depth_of(function: FunctionType) -> int:
    """Return the number of decorators above a function in its module; 0 if it is not found there."""
    found, depth = _named(function), 0
    while found is not None and found is not function:
        found, depth = getattr(found, "__wrapped__", None), depth + 1
    return depth if found is function else 0


def _undecorated(found: Any, depth: int) -> Any:
    """Return the function below this number of decorators."""
    for _ in range(depth):
        found = found.__wrapped__
    return found


def parameters_of(agent: Any) -> dict[str, Any]:
    """Return name -> parameter of an agent, empty for an agent without parameters."""
    offer = getattr(agent, "parameters", None)
    return {parameter.name: parameter for parameter in offer()} if callable(offer) else {}
