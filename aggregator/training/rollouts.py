"""The rollouts of a run: on its executor, within the agent's own limits, seen by the observers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from msgspec.structs import replace

from aggregator.executors.local import LocalExecutor, fan_out, finish
from aggregator.executors.work import AgentWork, InstanceAgent, run_batch
from aggregator.observing.observer import Observer, notify
from aggregator.protocols import Agent, Executor
from aggregator.records import Rollout, RolloutTask, Values
from aggregator.training.checkpoints import digest

Arrive = Callable[[], Awaitable[Rollout]]
"""Waits for the rollout of a task."""

Result = TypeVar("Result")


class Rollouts:
    """Runs tasks of one agent: those of an agent that runs instances one by one on the executor, others in batches.

    An agent whose candidates must not run at the same time ("serial") gets them one after the other, and no more than
    its own `max_concurrency` of its rollouts run at once.
    """

    def __init__(
        self, agent: Agent, executor: Executor, local: LocalExecutor, observers: Sequence[Observer] = ()
    ) -> None:
        self._agent = agent
        self._executor = executor
        self._local = local
        self._watching = [observer for observer in observers if _sees_rollouts(observer)]
        self._slots = None if agent.max_concurrency is None else asyncio.Semaphore(agent.max_concurrency)
        self._turns = _Turns() if agent.isolation == "serial" else None
        self._works: dict[int, AgentWork] = {}  # by the guide's id, which the work keeps alive
        self.refused: Exception | None = None

    async def map(self, tasks: Sequence[RolloutTask], guide: Any) -> list[Rollout]:
        """Return the rollouts in the order of the tasks; an error that ends the run lets the others end first."""
        if isinstance(self._agent, InstanceAgent) and not (self._slots or self._turns or self._watching):
            return await self._executor.map(self._work(guide), tasks)
        return await self.each(tasks, guide, lambda _, arrive: arrive(), max(len(tasks), 1))

    async def each(
        self, tasks: Sequence[RolloutTask], guide: Any, one: Callable[[int, Arrive], Awaitable[Result]], limit: int
    ) -> list[Result]:
        """Return `one(i, arrive)` for each task in order, `limit` at once; `await arrive()` gives the task's rollout.

        An agent that takes batches gets all tasks with the same values at once, another one each task when it is
        waited for. Errors are raised as by `finish`.
        """
        if isinstance(self._agent, InstanceAgent):
            return await finish(lambda i: one(i, partial(self._one, tasks[i], guide)), range(len(tasks)), limit)
        arrivals: list[asyncio.Future[Rollout]] = [asyncio.get_running_loop().create_future() for _ in tasks]

        async def feed(group: list[int]) -> None:
            try:
                async with self._turn(tasks[group[0]].values):
                    batch = [tasks[i] for i in group]
                    await run_batch(self._agent, batch, guide, lambda i, run: arrivals[group[i]].set_result(run))
            except Exception as error:  # noqa: BLE001 - raised by whoever waits for the rollouts
                for i in group:
                    if not arrivals[i].done():
                        arrivals[i].set_exception(error)
                        arrivals[i].exception()  # no warning if nobody waits

        async def arrive(i: int) -> Rollout:
            return await self.see(await arrivals[i])

        groups = [list(group) for _, group in groupby(range(len(tasks)), key=lambda i: digest(tasks[i].values))]
        found: list[Result] = []

        async def part(name: str) -> None:
            if name == "feed":
                await fan_out(feed, groups, max(len(groups), 1))
            else:
                found.extend(await finish(lambda i: one(i, partial(arrive, i)), range(len(tasks)), limit))

        await fan_out(part, ["feed", "consume"], 2)
        return found

    async def _one(self, task: RolloutTask, guide: Any) -> Rollout:
        if self._turns is None and self._slots is None:
            (rollout,) = await self._executor.map(self._work(guide), [task])
        else:
            async with self._turn(task.values), self._slots or nullcontext():
                (rollout,) = await self._executor.map(self._work(guide), [task])
        return await self.see(rollout)

    async def see(self, rollout: Rollout) -> Rollout:
        """Show a rollout to the observers; the error of one that raises is `refused`, and ends the run."""
        if self._watching:
            try:
                await notify(self._watching, "rollout", without_handle(rollout))
            except Exception as error:
                self.refused = error
                raise
        return rollout

    def _work(self, guide: Any) -> AgentWork:
        if id(guide) not in self._works:
            self._works[id(guide)] = AgentWork(self._agent, guide, call=self._local.call)
        return self._works[id(guide)]

    @asynccontextmanager
    async def _turn(self, values: Values) -> AsyncIterator[None]:
        if self._turns is None:
            yield
            return
        async with self._turns.of(digest(values)):
            yield


class _Turns:
    """Lets in whatever has one key at a time: the next key waits until the last of the present one has left."""

    def __init__(self) -> None:
        self._key = ""
        self._inside = 0
        self._left = asyncio.Event()

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        while self._inside and self._key != key:
            self._left.clear()
            await self._left.wait()
        self._key = key
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._left.set()


def without_handle(rollout: Rollout) -> Rollout:
    """Return the rollout for those who watch: the handle belongs to the agent's adapter."""
    return rollout if rollout.handle is None else replace(rollout, handle=None)


def _sees_rollouts(observer: Observer) -> bool:
    method: Any = observer.rollout
    return getattr(method, "__func__", method) is not Observer.rollout
