"""Run work in this process: concurrently on the event loop, synchronous functions in threads, results in input order.

`fan_out` and `finish` bound any work; `LocalExecutor` runs rollouts and lends its threads to synchronous code.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from aggregator.checks import check_positive, contain_stop
from aggregator.errors import is_own
from aggregator.portal import Scope
from aggregator.protocols import RolloutWork
from aggregator.records import Rollout, RolloutTask

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CONCURRENCY = 64
"""The default number of concurrent items."""


async def fan_out(work: Callable[[Item], Awaitable[Result]], batch: Sequence[Item], limit: int) -> list[Result]:
    """Return `[await work(item) for item in batch]`, at most `limit` at once.

    The first error cancels the others and is raised without a group.
    """
    return await finish(work, batch, limit, cancels=True)


async def finish(
    work: Callable[[Item], Awaitable[Result]], batch: Sequence[Item], limit: int, *, cancels: bool = False
) -> list[Result]:
    """Do as `fan_out`, but after an error wait for work in flight, then raise the earliest item's error.

    An error stops further items from being started. Interrupts are not waited for. With `cancels` this is `fan_out`.
    """
    results: list[Any] = [None] * len(batch)
    turns = iter(enumerate(batch))
    raised: dict[int, Exception] = {}

    async def take_turns() -> None:
        for i, item in turns:
            if raised:
                return
            try:
                results[i] = await work(item)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and is_own(error):  # a TaskGroup would hide it
                    raise RuntimeError(
                        "Expected work to return or raise, got one that cancelled itself; raise an exception instead"
                    ) from error
                if cancels or not isinstance(error, Exception):
                    raise
                raised[i] = error

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(batch))):
                group.create_task(take_turns())
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    if raised:
        raise raised[min(raised)]
    return results


class LocalExecutor:
    """Runs at most `max_concurrency` rollouts at once, over all calls of `map`; synchronous code runs in threads.

    `max_concurrency=1` is sequential. As an async context manager it ends its threads on exit.
    """

    is_remote = False

    def __init__(self, max_concurrency: int = MAX_CONCURRENCY) -> None:
        check_positive("max_concurrency", max_concurrency)
        self.max_concurrency = max_concurrency
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}  # a semaphore belongs to its event loop
        self._threads: dict[int, _Threads] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"LocalExecutor({self.max_concurrency})"

    async def map(self, work: RolloutWork, tasks: Sequence[RolloutTask]) -> list[Rollout]:
        """Return the rollouts in the order of the tasks; raises as `finish` does."""
        loop = asyncio.get_running_loop()
        slots = self._slots.get(loop) or self._slots.setdefault(loop, asyncio.Semaphore(self.max_concurrency))
        if len(tasks) == 1:  # as for each instance of a step
            await slots.acquire()
            try:
                return [await work(tasks[0])]
            finally:
                slots.release()

        async def run(task: RolloutTask) -> Rollout:
            async with slots:
                return await work(task)

        return await finish(run, tasks, self.max_concurrency)

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a synchronous function in a thread, with the caller's context variables.

        If the caller is cancelled the thread continues, because it cannot be stopped; its calls to models are refused
        and another thread replaces it.
        """
        context, scope = copy_context(), Scope()
        depth = context.run(_deeper)
        with self._lock:  # threads of its own for each depth: who waits for another one never holds that one's thread
            if depth not in self._threads:
                self._threads[depth] = _Threads(self.max_concurrency)
            threads = self._threads[depth]
        future = threads.submit(partial(context.run, scope.run, function, *args))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            scope.cancel()
            threads.give_up(future)
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for threads in self._threads.values():
            threads.end(wait=error is None)
        self._threads = {}


_depth: ContextVar[int] = ContextVar("aggregator_thread_depth", default=0)


AsyncExecutor = LocalExecutor
"""Its older name."""


def _deeper() -> int:
    """Count one more thread that waits for another."""
    depth = _depth.get()
    _depth.set(depth + 1)
    return depth


class _Threads:
    """A pool of daemon threads: a hanging agent does not prevent the interpreter from exiting."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._busy: dict[Future[Any], threading.Thread] = {}
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` in a thread; start a new one if none is idle and the limit allows."""
        future: Future[Result] = Future()
        self._work.put((future, work))
        with self._lock:
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._limit:
                self._start()
        return future

    def _start(self) -> None:
        thread = threading.Thread(target=self._serve, name="aggregator-worker", daemon=True)
        self._threads.append(thread)
        thread.start()

    def give_up(self, future: Future[Any]) -> None:
        """Replace the thread that runs this work: it no longer counts, and ends with the work."""
        with self._lock:
            thread = self._busy.pop(future, None)
            if thread is not None:
                self._threads.remove(thread)
                if not self._work.empty():
                    self._start()

    def _serve(self) -> None:
        thread = threading.current_thread()
        while (item := self._work.get()) is not None:
            future, work = item
            self._busy[future] = thread
            _fulfil(future, work)
            with self._lock:
                if self._busy.pop(future, None) is None:
                    return  # abandoned
            del item, future, work  # otherwise the last result would live as long as the thread
            self._idle.release()
        self._work.put(None)  # for the next thread

    def end(self, *, wait: bool) -> None:
        """End the threads once they are idle, and optionally wait for that."""
        self._work.put(None)
        for thread in self._threads if wait else ():
            thread.join()


def _fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    """Run one item that was not cancelled while it waited."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except StopIteration as error:
        future.set_exception(contain_stop(error))
    except BaseException as error:  # noqa: BLE001 - the caller gets it
        future.set_exception(error)
    else:
        future.set_result(result)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error of a group, preferring an interrupt."""
    flat = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return next((error for error in flat if not isinstance(error, Exception)), flat[0])
