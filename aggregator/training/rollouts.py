"""The rollouts of a run: on its executor, within the agent's own limits, repeated, seen by the observers.

`follow` ends a run whose latest rollouts all fail at the same line of user code: a bug is not a training signal.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from aggregator.cassettes.lineage import lineage_at
from aggregator.errors import TrainingError, TrainingWarning
from aggregator.executors.local import LocalExecutor, fan_out, finish
from aggregator.executors.work import AgentWork, InstanceAgent, failures_left, run_batch, show_failure, timed_out
from aggregator.llm.ledger import collecting
from aggregator.observing.observer import Observer, notify
from aggregator.protocols import Agent, Executor
from aggregator.records import Proposal, Rollout, RolloutTask, TrainingResult, Values
from aggregator.training.checkpoints import Streak
from aggregator.training.evaluation import join_repeats
from aggregator.training.identity import digest
from aggregator.training.step import Step
from aggregator.training.stops import Mark, TimedOut
from aggregator.training.updates import Propose, without_handle

Arrive = Callable[[], Awaitable[Rollout]]
"""Waits for a task's rollout."""

Result = TypeVar("Result")


# ---- repeats


class Repeats:
    """The number of rollouts per instance of a run, and whether the rollouts of one instance ever differ.

    The first rollout's calls are recorded in the lineage that they have without repeats, the others' below it, at
    `repeat=1`, `repeat=2`, ...
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._identical = 0
        self._differing = 0
        self._lost = 0
        self._warned = False

    def expand(self, tasks: Sequence[RolloutTask]) -> list[RolloutTask]:
        """Return the tasks, each followed by its repeats."""
        return [
            replace(task, repeat=i, lineage=(*task.lineage, f"repeat={i}")) if i else task
            for task in tasks
            for i in range(self.count)
        ]

    def join(self, runs: Sequence[Rollout]) -> list[Rollout]:
        """Return one rollout for each instance's repeats, which are adjacent."""
        groups = [runs[i : i + self.count] for i in range(0, len(runs), self.count)]
        for group in groups if self.count > 1 else ():
            judged = [(repr(run.output), run.score) for run in group if run.score is not None]
            self._lost += sum(run.failure is not None and run.failure.infrastructure for run in group)
            self._differing += len(set(judged)) > 1
            self._identical += len(judged) > 1 and len(set(judged)) == 1
        return [join_repeats(group) for group in groups]

    def warn(self, fewest: int = 1) -> None:
        """Warn once if the repeats of this number of instances, and of no others, were identical."""
        if self._identical >= fewest and not self._differing and not self._warned:
            self._warned = True
            warnings.warn(
                f"the {self.count} repeats of all {self._identical} instances so far are identical, because of a seed, "
                "a temperature of 0 or a cache: they cost calls and show no noise; give repeats=1, or a temperature",
                TrainingWarning,
                stacklevel=2,
            )

    def finish(self) -> None:
        """Give the remaining warnings at the end of a run."""
        self.warn()
        if self._lost:
            warnings.warn(
                f"{self._lost} repeats were lost with their calls; the means are those of the others",
                TrainingWarning,
                stacklevel=2,
            )


def warn_at_end(result: TrainingResult, repeats: Repeats, outside: int) -> None:
    """Warn of remaining bugs, of identical repeats, and of an agent whose calls all came from outside the run."""
    for left in failures_left(result.failures) if result.failures else ():
        warnings.warn(left, TrainingWarning, stacklevel=3)
    repeats.finish()
    if outside and "agent" not in result.usage:
        warnings.warn(
            f"{outside} calls of models came from threads started before the run, and none from its rollouts. If they "
            "are the agent's, they saw neither the values on trial nor budget, journal, transcript: start the thread "
            "in the agent, use a ThreadPoolExecutor, or pass the work on as contextvars.copy_context().run",
            TrainingWarning,
            stacklevel=3,
        )


# ---- rollouts of a run


class Rollouts:
    """Runs tasks of one agent: those of an agent that runs instances one by one on the executor, others in batches.

    A "serial" agent, whose candidates must not run concurrently, gets them one after the other. At most the agent's own
    `max_concurrency` of its rollouts run at once.
    """

    def __init__(
        self,
        agent: Agent,
        executor: Executor,
        local: LocalExecutor,
        observers: Sequence[Observer] = (),
        timeout: float | None = None,
    ) -> None:
        self._agent = agent
        self._executor = executor
        self._local = local
        self._timeout = timeout
        seen: Any = Observer.rollout
        self._watching = [one for one in observers if getattr(one.rollout, "__func__", one.rollout) is not seen]
        self._slots = None if agent.max_concurrency is None else asyncio.Semaphore(agent.max_concurrency)
        self._turns = _Turns() if agent.isolation == "serial" else None
        self._works: dict[int, AgentWork] = {}  # by the guide's id, which the work keeps alive
        self.refused: Exception | None = None

    async def map(self, tasks: Sequence[RolloutTask], guide: Any) -> list[Rollout]:
        """Return the rollouts in the order of the tasks; an error that ends the run is raised after the others."""
        is_plain = not (self._slots or self._turns or self._watching or self._timeout)
        if isinstance(self._agent, InstanceAgent) and is_plain:
            return await self._executor.map(self._work(guide), tasks)
        return await self.each(tasks, guide, lambda _, arrive: arrive(), max(len(tasks), 1))

    async def each(
        self,
        tasks: Sequence[RolloutTask],
        guide: Any,
        one: Callable[[int, Arrive], Awaitable[Result]],
        limit: int,
        repeats: Repeats | None = None,
    ) -> list[Result]:
        """Return `one(i, arrive)` for each task in order, `limit` at once; `await arrive()` gives the task's rollout.

        With `repeats` this is the one rollout made of the task's repeats.

        A batch agent gets all tasks with the same values at once, any other agent each task when it is awaited. Errors
        are raised as by `finish`.
        """
        repeats = repeats or Repeats()
        if isinstance(self._agent, InstanceAgent):
            arrive_at = partial(self._one, guide=guide)
            if repeats.count > 1:
                arrive_at = partial(self._join, guide=guide, limit=limit, repeats=repeats)
            at_once = max(limit // repeats.count, 1)
            return await finish(lambda i: one(i, partial(arrive_at, tasks[i])), range(len(tasks)), at_once)
        wanted, tasks = len(tasks), repeats.expand(tasks)
        arrivals: list[asyncio.Future[Rollout]] = [asyncio.get_running_loop().create_future() for _ in tasks]

        async def feed(group: list[int]) -> None:
            try:
                async with self._turn(tasks[group[0]].values):
                    batch = [tasks[i] for i in group]
                    await run_batch(self._agent, batch, guide, lambda i, run: arrivals[group[i]].set_result(run))
            except Exception as error:  # noqa: BLE001 - raised where the rollouts are awaited
                for i in group:
                    if not arrivals[i].done():
                        arrivals[i].set_exception(error)
                        arrivals[i].exception()  # no warning if no caller waits

        async def arrive(i: int) -> Rollout:
            mine = arrivals[i * repeats.count : (i + 1) * repeats.count]
            return repeats.join([await self.see(await arrival) for arrival in mine])[0]

        groups = [list(group) for _, group in groupby(range(len(tasks)), key=lambda i: digest(tasks[i].values))]
        found: list[Result] = []

        async def part(name: str) -> None:
            if name == "feed":
                await fan_out(feed, groups, max(len(groups), 1))
            else:
                found.extend(await finish(lambda i: one(i, partial(arrive, i)), range(wanted), limit))

        await fan_out(part, ["feed", "consume"], 2)
        return found

    async def _join(self, task: RolloutTask, *, guide: Any, limit: int, repeats: Repeats) -> Rollout:
        runs = await finish(lambda own: self._one(own, guide), repeats.expand([task]), min(limit, repeats.count))
        return repeats.join(runs)[0]

    async def _one(self, task: RolloutTask, guide: Any) -> Rollout:
        if self._turns is None and self._slots is None:
            rollout = await self._run(task, guide)
        else:
            async with self._turn(task.values), self._slots or nullcontext():
                rollout = await self._run(task, guide)
        return await self.see(rollout) if self._watching else rollout

    async def _run(self, task: RolloutTask, guide: Any) -> Rollout:
        """Run a task, within its timeout or as recorded, and record the result."""
        work = self._works.get(id(guide)) or self._work(guide)
        if self._timeout is None:
            return (await self._executor.map(work, [task]))[0]
        with lineage_at("/".join(task.lineage), task.role):
            mark = Mark("instance")
            if mark.recorded is None:
                timed = replace(task, timeout=self._timeout) if mark.is_live else task
                with collecting() as ledger:
                    (rollout,) = await self._executor.map(work, [timed])
                ledger.detach()
                await mark.keep(TimedOut.of(rollout, timed_out(rollout), self._timeout, ledger.entries()))
                return rollout
            known = msgspec.json.decode(mark.recorded, type=TimedOut)
            if not known.stage:
                return (await self._executor.map(work, [task]))[0]
            known.count()
            timed = replace(task, timeout=known.seconds, timed_out=known.stage)
            (rollout,) = await self._executor.map(work, [timed])
            return replace(rollout, transcript=known.transcript, scores={**rollout.scores, **known.scores})

    async def see(self, rollout: Rollout) -> Rollout:
        """Show a rollout to the observers; an exception of one is `refused`, and ends the run."""
        if self._watching:
            try:
                await notify(self._watching, "rollout", without_handle(rollout))
            except Exception as error:
                self.refused = error
                raise
        return rollout

    def _work(self, guide: Any) -> AgentWork:
        work = self._works.get(id(guide)) or AgentWork(self._agent, guide, call=self._local.call)
        return self._works.setdefault(id(guide), work)

    @asynccontextmanager
    async def _turn(self, values: Values) -> AsyncIterator[None]:
        if self._turns is None:
            yield
            return
        async with self._turns.of(digest(values)):
            yield


class _Turns:
    """Admits tasks with one key at a time: the next key waits until the last task of the current one has ended."""

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


LONGEST = 4
"""This number of consecutive instances that fail at one line of the user's code ends a run."""


_CAUSES = (
    (("ParameterNode",), "a parameter is used instead of its value: write `.data`, as in self.prompt.data"),
    (("coroutine",), "a coroutine is used instead of its result: write `await`"),
    (("async_generator", "async generator"), "an async generator is used as a value: collect it with `async for`"),
    (("generator",), "a generator is used as a value: return what it yields, as in list(...)"),
    (
        ("different event loop", "different loop", "Event loop is closed"),
        "threads of a synchronous agent share an async client: make the agent `async def`, and await the client",
    ),
    (("return what it yields",), "an iterator is returned: return what it yields, as in list(...)"),
    (("an awaitable",), "work in progress is returned instead of its result: wait for it"),
    (("the method",), "a method is returned instead of its result: call it"),
    (("Completion",), "a Completion is used instead of its text: write `.text`, as in self.llm(...).text"),
    (
        ("positional argument", "unexpected keyword argument", "required keyword-only argument"),
        "a call does not fit the function: an agent is called as forward(self, x), a guide as guide(x, output, info)",
    ),
)


# ---- streaks of errors


def follow(streak: Streak, rollouts: Sequence[Rollout], values: Values, min_score: float | None = None) -> Streak:
    """Return the streak after more instances with these values.

    Lost calls are left out. An instance made of repeats has failed if all of them have, so that its score is that of a
    failure, `min_score` or None. Raises TrainingError, with the traceback and the likely cause, if `LONGEST`
    consecutive instances failed with the same exception type at the same line of the user's code.
    """
    for rollout in rollouts:
        record = rollout.failure
        if record is not None and record.infrastructure:
            continue
        if record is None or rollout.score not in {None, min_score}:
            streak = Streak(succeeded=streak.succeeded or rollout.score is not None)
            continue
        key = (record.stage, record.error, record.where, digest(values))
        same = bool(record.where) and key == streak.key
        streak = replace(streak, key=key if record.where else (), length=streak.length + 1 if same else 1)
        if same and streak.length >= LONGEST:
            raise TrainingError(
                f"Expected the {record.stage} to work on some instance, but {streak.length} rollouts in a row failed "
                f"with the same error, the latest on sample {rollout.sample_id}.\n{show_failure(record)}\n"
                f"Likely cause: {cause_of(record.error, record.message, record.stage)}"
            )
    return streak


def is_bug(rollout: Rollout) -> bool:
    """Return True if the user's code failed on an instance, which the values may not have caused."""
    return rollout.failure is not None and bool(rollout.failure.where)


def spare_bugs(propose: Propose) -> Propose:
    """Return how to propose until an instance has succeeded: not for those on which user code failed."""

    async def spare(rollouts: Sequence[Rollout], step: Step) -> Proposal:
        usable = [rollout for rollout in rollouts if not is_bug(rollout)]
        return await propose(usable, step) if usable else Proposal()

    return spare


def cause_of(error: str, message: str, stage: str) -> str:
    """Return the likely cause of an error.

    >>> cause_of("TypeError", "unsupported operand type(s) for +: 'ParameterNode' and 'str'", "agent")
    'a parameter is used instead of its value: write `.data`, as in self.prompt.data'
    """
    for words, cause in _CAUSES:
        if any(word in message for word in words):
            return cause
    return "the guide itself raises" if stage == "guide" else "the agent's own code raises, whatever its input"
