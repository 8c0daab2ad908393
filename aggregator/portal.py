"""The one place where synchronous callers meet the event loop.

`call` runs a coroutine function on one background loop and waits for it: it works in scripts, under a running loop
(notebooks, servers) and from worker threads. Context variables travel along; Ctrl-C cancels the work and waits for it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from contextvars import ContextVar
from typing import Any, TypeVar

from aggregator.errors import ConfigError

Result = TypeVar("Result")

PATIENCE = 10.0
"""Seconds that an interrupted caller waits for what it interrupted: code may swallow its cancellation."""


class _Portal:
    """One daemon thread with one event loop, made on first use and again after a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closers: list[Callable[[], Awaitable[None]]] = []
        self.stopping = False
        self.loop = _loop_factory()
        self.thread = threading.Thread(target=self._serve, name="aggregator-portal", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self.stopping:
            try:
                self.loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                continue  # asyncio throws these here too, beside handing them to whoever waits for the task
        self.loop.run_until_complete(_finish(self.closers))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def close(self) -> None:
        if self.thread.is_alive() and self.pid == os.getpid():
            self.stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=5)


async def _finish(closers: list[Callable[[], Awaitable[None]]]) -> None:
    """Cancel what still runs and close what was registered."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=4)
    for closer in closers:
        await closer()


_loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
_lock = threading.Lock()
_portal: _Portal | None = None


def _current() -> _Portal:
    global _portal  # noqa: PLW0603 - one background loop per process is the point
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = _Portal()
            atexit.register(_portal.close)
        return _portal


class Scope:
    """The calls that a thread makes for one piece of work: once it is cancelled, so are they, and later ones refused.

    A thread cannot be stopped, but what it would go on to ask of models can.
    """

    def __init__(self) -> None:
        self.is_cancelled = False
        self.tasks: set[asyncio.Task[Any]] = set()  # touched on the library's loop only

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function whose calls belong to this scope."""
        token = _scope.set(self)
        try:
            return function(*args)
        finally:
            _scope.reset(token)

    def cancel(self) -> None:
        """Cancel what is under way, from any thread."""
        self.is_cancelled = True
        if _portal is not None:
            _portal.loop.call_soon_threadsafe(lambda: [task.cancel() for task in self.tasks])


_scope: ContextVar[Scope | None] = ContextVar("aggregator_scope", default=None)


def call(function: Callable[..., Coroutine[Any, Any, Result]], /, *args: Any, **kwargs: Any) -> Result:
    """Run `function(*args, **kwargs)` on the library's loop and return its result.

    Raises ConfigError when called on that loop itself, where waiting would never end.
    """
    portal = _current()
    if threading.current_thread() is portal.thread:
        raise ConfigError(
            f"expected `await` inside an async function, got a synchronous call of {function.__qualname__} on the "
            "library's own event loop, where it would wait for itself; use the awaitable form, "
            "as in `await llm.complete(...)` or `await trainer.atrain(...)`"
        )
    outcome: Future[Result] = Future()
    scope = _scope.get() or Scope()

    def start() -> None:
        if scope.is_cancelled:
            outcome.set_exception(CancelledError())
            return
        try:
            task = portal.loop.create_task(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it, as an argument that is not known
            outcome.set_exception(error)
            return
        scope.tasks.add(task)
        task.add_done_callback(scope.tasks.discard)
        task.add_done_callback(lambda finished: _transfer(finished, outcome))

    try:  # from here on: an interrupt may come before the wait has begun
        portal.loop.call_soon_threadsafe(start)
        return outcome.result()
    except (KeyboardInterrupt, SystemExit):
        if not outcome.done():  # else it came from the work itself
            scope.cancel()
            wait([outcome], timeout=PATIENCE)
        raise


def _transfer(task: asyncio.Task[Result], outcome: Future[Result]) -> None:
    """Hand a finished task's result to the waiting thread."""
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def is_here() -> bool:
    """Tell whether this is the background loop's own thread."""
    return _portal is not None and threading.current_thread() is _portal.thread


def on_close(closer: Callable[[], Awaitable[None]]) -> None:
    """Register what the library's loop awaits before the interpreter ends."""
    _current().closers.append(closer)


def use_uvloop() -> None:
    """Run the library's loop on uvloop (the extra `uvloop`); raises ConfigError once the loop has been made."""
    global _loop_factory  # noqa: PLW0603 - of the one background loop
    from uvloop import new_event_loop

    with _lock:
        if _portal is not None and _portal.pid == os.getpid():
            raise ConfigError("expected use_uvloop() before the first synchronous call, got it after one")
        _loop_factory = new_event_loop
