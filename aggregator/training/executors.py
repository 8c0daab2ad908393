"""Run work over a batch: concurrently or one after the other, results always in sample order."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class AsyncExecutor:
    """Runs at most `max_concurrency` items at once; synchronous functions run in a thread pool of that size.

    `max_concurrency=1` is one item after the other. Use it as an async context manager, which closes its threads.
    """

    def __init__(self, max_concurrency: int = 64) -> None:
        self.max_concurrency = max_concurrency
        self._threads: ThreadPoolExecutor | None = None

    async def map(self, work: Callable[[Item], Awaitable[Result]], batch: Sequence[Item]) -> list[Result]:
        """Return `[await work(item) for item in batch]`, computed concurrently."""
        results: list[Any] = [None] * len(batch)
        turns = iter(enumerate(batch))

        async def take_turns() -> None:
            for i, item in turns:
                results[i] = await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.max_concurrency, len(batch))):
                    group.create_task(take_turns())
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return results

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a synchronous function in a thread, with the caller's context variables."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="aggregator-worker")
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: context.run(function, *args))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=error is None, cancel_futures=True)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one error of a group, an interrupt before others."""
    flat = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return next((error for error in flat if not isinstance(error, Exception)), flat[0])
