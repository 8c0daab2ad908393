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
from typing import Any, TypeVar

from aggregator.errors import ConfigError

Result = TypeVar("Result")


class _Portal:
    """One daemon thread with one event loop, made on first use and again after a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closers: list[Callable[[], Awaitable[None]]] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="aggregator-portal", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(_finish(self.closers))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    def close(self) -> None:
        if self.thread.is_alive() and self.pid == os.getpid():
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


_lock = threading.Lock()
_portal: _Portal | None = None


def _current() -> _Portal:
    global _portal  # noqa: PLW0603 - one background loop per process is the point
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = _Portal()
            atexit.register(_portal.close)
        return _portal


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
    tasks: list[asyncio.Task[Result]] = []

    def start() -> None:
        task = portal.loop.create_task(function(*args, **kwargs))
        tasks.append(task)
        task.add_done_callback(lambda finished: _transfer(finished, outcome))

    portal.loop.call_soon_threadsafe(start)
    try:
        return outcome.result()
    except (KeyboardInterrupt, SystemExit):
        portal.loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
        wait([outcome])
        raise


def _transfer(task: asyncio.Task[Result], outcome: Future[Result]) -> None:
    """Hand a finished task's result to the waiting thread."""
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def on_close(closer: Callable[[], Awaitable[None]]) -> None:
    """Register what the library's loop awaits before the interpreter ends."""
    _current().closers.append(closer)
