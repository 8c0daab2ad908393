"""Concurrency, order and threads."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from aggregator.executors.local import LocalExecutor, fan_out, finish


@pytest.mark.requirement("Trace: asynchronous trainer")
async def test_results_are_in_sample_order() -> None:
    """The last item finishes first, and the results keep the batch's order."""
    finished: list[int] = []

    async def work(i: int) -> int:
        for _ in range(10 - i):
            await asyncio.sleep(0)
        finished.append(i)
        return i * i

    assert await fan_out(work, list(range(10)), 64) == [i * i for i in range(10)]
    assert finished != sorted(finished)


@pytest.mark.parametrize("limit", [1, 3, 64])
async def test_at_most_max_concurrency_run_at_once(limit: int) -> None:
    """max_concurrency bounds the items in flight; 1 is sequential."""
    running, most = 0, 0

    async def work(i: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await fan_out(work, list(range(10)), limit)
    assert most == min(limit, 10)


async def test_items_in_flight_are_finished_before_an_error_is_raised() -> None:
    """No further item starts, none is cancelled, and the error is the earliest item's, not the first one's."""
    begun: list[int] = []
    finished: list[int] = []

    async def work(i: int) -> None:
        begun.append(i)
        for _ in range(9 - i):
            await asyncio.sleep(0)
        if i in {1, 3}:
            raise ValueError(f"item {i}")
        finished.append(i)

    with pytest.raises(ValueError, match="item 1"):
        await finish(work, list(range(8)), 5)
    assert sorted(begun) == [0, 1, 2, 3, 4, 5]  # 5 started after 4, which was done before 3 raised
    assert sorted(finished) == [0, 2, 4, 5]
    assert await finish(asyncio.sleep, [0, 0], 5) == [None, None]


async def test_sync_functions_run_concurrently_with_the_callers_context() -> None:
    """Sixteen synchronous calls wait for each other: they need sixteen threads, and see the caller's variables."""
    variable = contextvars.ContextVar[int]("variable", default=-1)
    barrier = threading.Barrier(16, timeout=20)

    def work() -> int:
        barrier.wait()
        return variable.get()

    async with LocalExecutor(16) as executor:

        async def one(i: int) -> int:
            variable.set(i)
            return await executor.call(work)

        assert await fan_out(one, list(range(16)), 16) == list(range(16))


async def test_an_error_is_raised_outside_a_group() -> None:
    """The first error is raised itself; the others are cancelled."""
    cancelled: list[int] = []

    async def work(i: int) -> None:
        if i == 1:
            raise ValueError("one")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(i)
            raise

    with pytest.raises(ValueError, match="one"):
        await fan_out(work, [0, 1, 2], 64)
    assert sorted(cancelled) == [0, 2]


async def test_a_stop_iteration_of_a_synchronous_function_was_waited_for_for_ever() -> None:
    """No asyncio future holds one; it is a RuntimeError, as in a coroutine."""
    async with LocalExecutor(1) as executor:
        with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
            await asyncio.wait_for(executor.call(next, iter(())), 5)
    assert isinstance(caught.value.__cause__, StopIteration)
