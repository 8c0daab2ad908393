"""A worker process: loads agent and guide once, runs one task at a time, and passes model calls to its owner."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import nullcontext, suppress
from multiprocessing import process, spawn
from typing import Any

from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.lineage import current_lineage, current_role, lineage_at
from aggregator.errors import ConfigError
from aggregator.executors import link
from aggregator.executors.link import Link, Reference, dump_error, dumps, load_error, loads, parameters_of
from aggregator.llm.calls import ChatCall
from aggregator.llm.client import LLM
from aggregator.llm.ledger import collecting
from aggregator.llm.messages import normalise
from aggregator.llm.owner import Call, Validate, make_stand_in, pass_calls_to
from aggregator.records import Completion, Usage
from aggregator.sandbox.limits import sandboxed

LAST_SECONDS = 5.0
"""Seconds for a worker's exit hooks after the other end has closed the socket."""

_GUARD = (
    "Expected no call of a model before the worker process is set up; put what starts the training under "
    '`if __name__ == "__main__":`, since a worker imports the main module'
)
_LATE = "Expected calls of models only while a task runs in this worker process, got one after it had ended"


def main(descriptor: int) -> None:
    """Serve the process at the other end of the socket until it closes it."""
    end = socket.socket(fileno=descriptor)
    worker = Worker()
    pass_calls_to(worker)
    length = int.from_bytes(end.recv(link.HEAD, socket.MSG_WAITALL), "big")
    _prepare(pickle.loads(end.recv(length, socket.MSG_WAITALL)))  # noqa: S301 - our parent wrote it
    threading.Thread(target=_end_with_parent, args=[end, os.getppid()], daemon=True).start()
    portal.call(worker.serve, end)


def _prepare(data: dict[str, Any]) -> None:
    """Import the main module as `multiprocessing` does for a spawned process: pickles may refer to it."""
    here = process.current_process()
    vars(here)["_inheriting"] = True  # a worker that starts workers itself has no guard in its main module
    try:
        spawn.prepare(data)
    finally:
        del vars(here)["_inheriting"]


def _end_with_parent(end: socket.socket, parent: int) -> None:
    """End this process and its children soon after the other end was closed, whatever the agent does.

    A process that the parent forked may still hold the other end, so the parent itself is checked too.
    """
    closed = select.poll()
    closed.register(end, 0)
    while not closed.poll(1000) and os.getppid() == parent:
        continue
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    threading.Event().wait(LAST_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # the worker leads its process group


class Worker:
    """The worker's side of the protocol. It runs on the library's event loop; other loops and threads call it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._data: dict[int, bytes] = {}
        self._objects: dict[int, Any] = {}
        self._models: dict[int, Any] = {}
        self._pending: dict[int, tuple[asyncio.Queue[link.Answer], Validate | None]] = {}
        self._asked = 0

    async def serve(self, end: socket.socket) -> None:
        """Handle messages until the other end is closed."""
        self._loop = asyncio.get_running_loop()
        self._link = Link(end, link.ToWorker)
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(self._link.write())
            while (message := await self._link.receive()) is not None:
                match message:
                    case link.Load():
                        self._data[message.number] = message.data
                    case link.Run():
                        self._task = group.create_task(self._run(message))
                    case link.Cancel() if self._task is not None:
                        self._task.cancel()
                    case link.Answer() if message.number in self._pending:
                        self._pending[message.number][0].put_nowait(message)
                    case link.Check():
                        self._link.send(link.Checked(message.number, self._check(message)))
            writing.cancel()
            if self._task is not None:
                self._task.cancel()

    async def _run(self, message: link.Run) -> None:
        """Run one task and send its result."""
        try:
            work, task = loads(message.work, self._resolve), loads(message.task, self._resolve)
        except Exception as error:  # noqa: BLE001 - it is raised where the run is
            kind = type(error).__name__
            self._fail(
                ConfigError(
                    f"Expected an agent, a guide and samples that a worker process can load, got {kind}: {error}; "
                    "define their classes in a module that can be imported, or use the local executor"
                ),
                [],
            )
            return
        self._link.send(link.Started())
        await self._link.flush()  # the agent may end this process
        with portal.carrying(), lineage_at(message.lineage, message.role), collecting() as ledger:
            try:
                with nullcontext() if message.sandbox is None else sandboxed(message.sandbox):
                    rollout = replace(await work(task), handle=None)  # the adapter's own, usable in this process only
                what = f"a rollout of instance {rollout.sample_id}"
                data = dumps(rollout, self._refer, what, "return plain data from the agent, or use the local executor")
            except BaseException as error:  # noqa: BLE001 - it is raised where the run is
                self._fail(error, ledger.entries())
            else:
                self._link.send(link.Done(data, ledger.entries()))

    def _fail(self, error: BaseException, usage: list[tuple[str, Usage]]) -> None:
        self._link.send(link.Failed(dump_error(error, note="raised in a worker process"), usage))

    def _check(self, message: link.Check) -> bytes | None:
        validate = self._pending[message.number][1] if message.number in self._pending else None
        try:
            if validate is not None:
                validate(message.text)
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is
            return dump_error(error)
        return None

    # Objects that both sides know by number

    def _resolve(self, reference: Reference) -> Any:
        """Return the object of a reference."""
        match reference:
            case ("llm", number, kind, state):
                if number not in self._models:
                    self._models[number] = make_stand_in(kind, state, number)
                return self._models[number]
            case ("model", number, name):
                if number not in self._models:
                    self._models[number] = OwnedModel(self, number, name)
                return self._models[number]
            case ("object", number):
                if number not in self._objects:
                    self._objects[number] = loads(self._data[number], self._resolve)
                return self._objects[number]
            case ("parameter", number, name):
                return parameters_of(self._resolve(("object", number)))[name]
        raise ConfigError(f"Expected a reference to a model, an object or a parameter, got {reference!r}")

    def _refer(self, value: Any) -> Reference | None:
        """Return the reference of an object that the owner has; None for an object to pickle."""
        if isinstance(value, LLM | OwnedModel):
            return None if value.owner_number is None else ("model", value.owner_number)
        return next((("object", number) for number, known in self._objects.items() if known is value), None)

    # Calls of models

    async def answer(self, llm: LLM, call: ChatCall, validate: Validate | None) -> Completion:
        """Have the owner answer a call; raises its exception."""
        return await self._first(self._ask(llm.owner_number, llm, validate, chat=call))

    async def deltas(self, llm: LLM, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
        """Have the owner answer a streamed call; the whole answer comes last."""
        pieces = self._ask(llm.owner_number, llm, None, chat=call, stream=True)
        try:
            while (piece := await self._here(anext(pieces, None))) is not None:
                yield piece
        finally:
            await self._here(pieces.aclose())

    async def complete(self, number: int, messages: Any, options: Mapping[str, Any]) -> Completion:
        """Have the owner call a model that is not an `LLM`."""
        given = {name: value for name, value in options.items() if name != "validate"}
        return await self._first(self._ask(number, None, None, messages=messages, options=given))

    async def _first(self, pieces: AsyncGenerator[Any, None]) -> Completion:
        try:
            completion: Completion = await self._here(anext(pieces))
        finally:
            await self._here(pieces.aclose())
        return completion

    def _ask(
        self, number: int | None, llm: LLM | None, validate: Validate | None, *, stream: bool = False, **question: Any
    ) -> AsyncGenerator[Any, None]:
        """Return the parts of an answer. The call's ticket is taken now, in the caller's context."""
        if self._task is None or self._task.done():
            raise ConfigError(_GUARD if self._loop is None else _LATE)
        known = -1 if number is None else number
        call = Call(model=known, lineage=current_lineage(), role=current_role(), **question)
        made = pickle.dumps(llm) if number is None else None
        data = dumps(call, self._refer, "a call of a model", "give plain data to the model")
        return self._pieces(data, validate, stream=stream, made=made)

    async def _pieces(
        self, call: bytes, validate: Validate | None, *, stream: bool, made: bytes | None
    ) -> AsyncGenerator[Any, None]:
        self._asked = number = self._asked + 1
        answers: asyncio.Queue[link.Answer] = asyncio.Queue()
        self._pending[number] = answers, validate
        self._link.send(link.Ask(number, call, stream=stream, checks=validate is not None, made=made))
        is_over = False
        try:
            while not is_over:
                answer = await answers.get()
                is_over = answer.is_error
                if is_over:
                    raise load_error(answer.data)
                piece = pickle.loads(answer.data)  # noqa: S301 - our owner wrote it
                is_over = isinstance(piece, Completion)
                yield piece
        finally:
            del self._pending[number]
            if not is_over:
                self._link.send(link.Stop(number))

    async def _here(self, awaitable: Any) -> Any:
        """Await something on the worker's event loop, from any loop."""
        assert self._loop is not None
        if asyncio.get_running_loop() is self._loop:
            return await awaitable

        async def wait() -> Any:
            return await awaitable

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(wait(), self._loop))


class OwnedModel:
    """Replaces a model that is not an `LLM`: the owner calls it."""

    def __init__(self, worker: Worker, number: int, name: str) -> None:
        self._worker, self.owner_number, self.model = worker, number, name

    def __repr__(self) -> str:
        return f"as_model({self.model})"

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnedModel:
        return self

    def __call__(self, messages: Any = None, **options: Any) -> Completion:
        """Call from synchronous code."""
        return portal.call(self.complete, messages, **options)

    async def complete(self, messages: Any, **options: Any) -> Completion:
        """Make one call; raises the model's exception."""
        normal = normalise(messages)
        transcript = current_transcript()
        shown = transcript.llm_call(normal) if transcript is not None and current_role() == "agent" else None
        try:
            completion = await self._worker.complete(self.owner_number, normal, options)
        except BaseException as error:
            if shown is not None:
                shown.fail(error)
            raise
        if shown is not None:
            shown.finish(completion)
        return completion
