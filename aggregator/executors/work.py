"""One rollout: an agent on one input with given values, judged by a guide; exceptions of user code become records.

`AgentWork` is what an executor runs. It needs nothing from its surroundings, so it works the same in this process, in a
worker and in a test.

A failure of user code is recorded with the line, a traceback without paths and, where it is known, the likely cause. An
error in trained code is not the user's bug: it describes the candidate's values and is passed to the optimizer.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sysconfig
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import GeneratorType, MappingProxyType
from typing import Any, Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.agents.parameters import ParameterNode, by_name, lay_over
from aggregator.agents.transcripts import transcript
from aggregator.cassettes.lineage import current_lineage, current_role, lineage, lineage_at
from aggregator.errors import (
    AggregatorError,
    ConfigError,
    GuideError,
    InstanceTimeoutError,
    ends_run,
    is_infrastructure,
    is_own,
)
from aggregator.executors.local import MAX_CONCURRENCY, LocalExecutor, finish
from aggregator.guides.calling import Call, as_guide, call_guide, is_instant, judge_instantly
from aggregator.llm.ledger import collecting
from aggregator.llm.observed import apart
from aggregator.protocols import Agent
from aggregator.records import Completion, Failure, Rollout, RolloutTask, Stage
from aggregator.text import as_text, shorten, show_error

MESSAGE_LIMIT = 4_000
"""The number of characters of an error's message in a record."""


# ---- one rollout


class Ran(Struct, frozen=True, kw_only=True):
    """The result of one run of an agent: an output, or the exception of its code.

    `handle` is for the agent's own optimizer, for example a node of a graph.
    """

    output: Any = None
    handle: Any = None
    error: BaseException | None = None


class InstanceAgent:
    """The base class of agents that run one instance at a time: a subclass has `parameters` and `run`."""

    isolation: Literal["overlay", "copy", "serial"] = "overlay"
    max_concurrency: int | None = None

    def __repr__(self) -> str:
        names = ", ".join(parameter.name for parameter in self.parameters())
        return f"<{type(self).__name__} with parameters {names}>"

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the parameters."""
        raise NotImplementedError

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent on the task's input; `call` runs a synchronous function in a thread.

        May raise any exception.
        """
        raise NotImplementedError

    async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        """Run the tasks and yield (index, rollout) as each ends."""
        ended: asyncio.Queue[tuple[int, Rollout] | None] = asyncio.Queue()
        raised: list[Exception] = []
        limit = self.max_concurrency or MAX_CONCURRENCY
        async with LocalExecutor(limit) as executor, asyncio.TaskGroup() as group:
            work = AgentWork(self, guide, call=executor.call)

            async def one(turn: tuple[int, RolloutTask]) -> None:
                ended.put_nowait((turn[0], await work(turn[1])))

            async def run_all() -> None:
                try:
                    await finish(one, list(enumerate(tasks)), limit)
                except Exception as error:  # noqa: BLE001 - raised below, by itself and not in a group
                    raised.append(error)
                finally:
                    ended.put_nowait(None)

            group.create_task(run_all())
            while (found := await ended.get()) is not None:
                yield found
        if raised:
            raise raised[0]


class AgentWork:
    """Runs a rollout task on an agent and judges the output: what an executor maps over tasks.

    The agent's assignments to its trainable parameters end with its rollout.

    `agent` is what `as_agent` returns. `call` runs synchronous code; None uses its own threads. Pickling keeps agent
    and guide only. Raises errors that end a run; any other error is the rollout's `failure`.
    """

    def __init__(self, agent: Agent, guide: Any, *, call: Call | None = None) -> None:
        self.agent = agent
        self.guide = guide
        self._judge = None if guide is None else as_guide(guide)
        self._is_instant = is_instant(self._judge)
        self.call: Call = call or LocalExecutor().call
        parameters: Sequence[Any] = agent.parameters()
        self._parameters: dict[str, ParameterNode[Any]] = {one.name: one for one in parameters if one.trainable}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.agent, self.guide)

    async def __call__(self, task: RolloutTask) -> Rollout:
        """Run one task."""
        agent = self.agent
        if not isinstance(agent, InstanceAgent):
            found: list[Rollout] = []
            await run_batch(agent, [task], self.guide, lambda _, rollout: found.append(rollout))
            return found[0]
        path = "/".join(task.lineage)
        if current_lineage() != path or current_role() != task.role:
            with lineage_at(path, task.role):
                return await self(task)
        started, given = time.perf_counter(), task.values
        values = {one: given[name] for name, one in self._parameters.items() if name in given}
        if len(values) < len(self._parameters):
            values |= {one: one.data for one in self._parameters.values() if one not in values}
        with lay_over(values):
            with transcript() if task.capture else nullcontext() as seen, collecting() as ledger:
                try:
                    with apart():
                        if task.is_timed:
                            ran = await within(task, "agent", lambda: agent.run(task, self.call))
                        else:
                            ran = await agent.run(task, self.call)
                    check_output(ran.output)
                except BaseException as error:  # the boundary: any exception of an agent becomes a record
                    if not is_own(error):
                        raise
                    ran = Ran(error=error)
            text = "" if seen is None else seen.render()
            measures = ledger.measures()
            return await judge_run(
                task,
                ran,
                self._judge,
                self.call,
                transcript=text,
                started=started,
                measures=measures,
                instant=self._is_instant,
            )


GRACE = 1.0
"""Seconds that a coroutine has to end after its timeout; then it is abandoned."""

Result = TypeVar("Result")
_left: set[asyncio.Task[Any]] = set()  # abandoned and not ended yet: the event loop references its tasks weakly


async def within(task: RolloutTask, stage: Stage, run: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Await `run()` for at most the task's timeout; then cancel it and refuse its further calls.

    Raises InstanceTimeoutError then, and at once for a stage that is recorded as timed out.
    """
    if task.timed_out != stage:
        if task.timeout is None or task.timed_out:
            return await run()
        scope = portal.Scope()

        async def held() -> Result:
            scope.hold()
            return await run()

        with portal.on_branch(here.uncounted() if (here := portal.current_branch()) is not None else None):
            running = asyncio.get_running_loop().create_task(held())  # not in a TaskGroup, which would wait for it
        _left.add(running)
        running.add_done_callback(_forget)
        try:
            await asyncio.wait({running}, timeout=task.timeout)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running})
            raise
        if running.done():
            return running.result()
        scope.cancel()
        running.cancel()
        await asyncio.wait({running}, timeout=GRACE)
    raise InstanceTimeoutError(_late(stage, task))


async def time_out(task: RolloutTask) -> Rollout:
    """Return the rollout of a task whose agent exceeded its timeout."""
    error = InstanceTimeoutError(_late("agent", task))
    return await judge_run(task, Ran(error=error), None, transcript="")


def _late(stage: Stage, task: RolloutTask) -> str:
    return f"Expected the {stage} to end within instance_timeout={task.timeout:g} s, got no answer"


def timed_out(rollout: Rollout | None) -> str:
    """Return the stage of a rollout that exceeded its timeout, or ""."""
    record = None if rollout is None else rollout.failure
    return record.stage if record is not None and record.error == InstanceTimeoutError.__name__ else ""


def _forget(task: asyncio.Task[Any]) -> None:
    """Drop a task that has ended; its error after the timeout is ignored."""
    _left.discard(task)
    if not task.cancelled():
        task.exception()


async def judge_run(
    task: RolloutTask,
    ran: Ran,
    guide: Any,
    call: Call | None = None,
    *,
    transcript: str,
    started: float | None = None,
    measures: Mapping[str, float] = MappingProxyType({}),
    instant: bool = False,
) -> Rollout:
    """Return the rollout of an agent's run, with the guide's score, or without one if the guide is None.

    `guide` is what `as_guide` returns; its calls are recorded below the current lineage. `started` is the run's start,
    by `perf_counter`, `measures` the measures of its calls. An `instant` guide calls no model, so it has no lineage.
    Raises errors that end a run.
    """
    sample, score, feedback = task.sample, None, ""
    record: Failure | None = None
    named: Mapping[str, float] = {}
    if ran.error is not None:
        record = record_failure("agent", ran.error, sample.id)
        if not record.infrastructure:
            score, feedback = task.min_score, f"The agent failed on this input with {record.error}: {record.message}"
    elif guide is not None:
        given = (guide, sample.x, ran.output, sample.info)
        try:
            if instant and not task.is_timed:
                found = judge_instantly(*given)
            else:
                with lineage("guide", role="guide"), apart():
                    found = await within(task, "guide", lambda: call_guide(*given, call=call))
            score, named, feedback = found.primary, found.named, found.feedback
        except BaseException as error:  # noqa: BLE001 - the boundary: recorded, or raised again
            record = record_failure("guide", error, sample.id)
    return Rollout(
        sample_id=sample.id,
        x=sample.x,
        output=ran.output,
        score=score,
        scores={**_length_of(ran.output), **measures, **named},
        feedback=feedback,
        transcript=transcript,
        failure=record,
        lineage="/".join(task.lineage),
        repeat=task.repeat,
        ms=0.0 if started is None else (time.perf_counter() - started) * 1000,
        handle=ran.handle,
    )


# ---- rollouts of an agent that takes batches


async def run_batch(
    agent: Agent, tasks: Sequence[RolloutTask], guide: Any, arrived: Callable[[int, Rollout], object]
) -> None:
    """Run tasks with the same values on an agent that takes batches, and call `arrived(index, rollout)` for each.

    If the agent raises, the remaining tasks have failed with that error; an error that ends the run is raised.
    ConfigError for anything but a rollout of one of the tasks, and for a missing task.
    """
    left = set(range(len(tasks)))
    overlaid: dict[ParameterNode[Any], Any] = {}
    if agent.isolation == "overlay" and tasks:
        parameters: dict[str, ParameterNode[Any]] = by_name(agent.parameters())  # type: ignore[arg-type]
        overlaid = {parameters[name]: value for name, value in tasks[0].values.items()}
    error: BaseException = ConfigError(
        f"Expected a rollout of every task from {type(agent).__name__}.rollouts, got fewer; yield (index, rollout) for "
        "each, with a failure if the agent failed"
    )
    try:
        with lay_over(overlaid), apart():
            async for found in agent.rollouts(tasks, guide):
                i, rollout = _check_arrival(agent, found, left)
                left.discard(i)
                task, scores = tasks[i], {**_length_of(rollout.output), **rollout.scores}
                named = {"sample_id": task.sample.id, "x": task.sample.x, "lineage": "/".join(task.lineage)}
                arrived(i, replace(rollout, scores=scores, repeat=task.repeat, **named))
    except BaseException as raised:  # the boundary: whatever an agent raises becomes a record
        if not is_own(raised):
            raise
        error = raised
    for i in sorted(left):
        arrived(i, await judge_run(tasks[i], Ran(error=error), guide, transcript=""))


def _check_arrival(agent: Agent, found: Any, left: set[int]) -> tuple[int, Rollout]:
    match found:
        case (int(i), Rollout() as rollout) if i in left:
            return i, rollout
    raise ConfigError(
        f"Expected (index, rollout) for each task once from {type(agent).__name__}.rollouts, got {shorten(found)}"
    )


def _length_of(output: Any) -> dict[str, float]:
    return {} if output is None else {"length": float(len(as_text(output)))}


# ---- errors of user code as records


def record_failure(stage: Stage, error: BaseException, sample_id: int | None = None) -> Failure:
    """Return the record of an exception of user code; raises it if it ends the run or this task."""
    if not is_own(error):
        raise error
    if ends_run(cause := root_of(error)):
        raise cause from None
    return failure(stage, cause, sample_id=sample_id)


def root_of(error: BaseException) -> BaseException:
    """Return the decisive error of a group: one that ends the run, else a lost call, else the first by name.

    An agent that fans out in a TaskGroup raises groups, whose order is that of completion.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [root_of(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: (not ends_run(leaf), not is_infrastructure(leaf), show_error(leaf)))


def failure(stage: Stage, error: BaseException, *, sample_id: int | None = None) -> Failure:
    """Record an error: class and message, and the line of the user's code that raised it; no addresses and no paths."""
    cause = root_of(error)
    name = type(cause).__name__
    message = show_error(cause, MESSAGE_LIMIT).removeprefix(name).removeprefix(": ") or name
    return Failure(
        stage=stage,
        error=name,
        message=message.encode(
            errors="backslashreplace"
        ).decode(),  # neither files nor prompts can hold a lone surrogate
        sample_id=sample_id,
        infrastructure=is_infrastructure(cause),
        where=where_of(cause, stage) if is_bug(cause) else "",
        traceback=traceback_of(cause) if is_bug(cause) else "",
    )


_PACKAGE = str(Path(__file__).parent.parent)
_STANDARD = tuple(filter(None, {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}))
_INSTALLED = tuple(filter(None, {sysconfig.get_path(name) for name in ("purelib", "platlib")}))
_FRAMES_SHOWN = 12
_TRAINED = ", trained>"
"""The suffix of the file name of trained code that runs in this process."""


def where_of(error: BaseException, stage: Stage) -> str:
    """Return the innermost line of the user's own code, as "agent.py:12 in forward".

    Without one, for example if the call has wrong arguments, it is the call of the agent or of the guide, else "".
    """
    if own := _own_frames(error):
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
    return f"the call of the {stage}" if stage in ("agent", "guide") else ""


def traceback_of(error: BaseException) -> str:
    """Return the traceback through the user's code, with file names and no paths; "" for other code."""
    lines = [
        f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
        for frame in _own_frames(error)[-_FRAMES_SHOWN:]
    ]
    return "\n".join(lines)


def is_bug(error: BaseException) -> bool:
    """Return True if an error comes from the user's own code: neither from trained code nor from the library.

    The library's errors are about calls, values and replies, which another value may mend; a guide without a verdict is
    the user's bug, and so is an error with `is_of_user`: the user's program in another process failed.
    """
    if isinstance(error, GuideError) or getattr(error, "is_of_user", False):
        return True
    if isinstance(error, AggregatorError) or hasattr(error, "source_line"):
        return False
    return not any(frame.filename.endswith(_TRAINED) for frame in traceback.extract_tb(error.__traceback__))


def check_output(output: Any) -> None:
    """Raise TypeError for an output that must be awaited, read or called first.

    Lists, tuples and dicts are searched, two levels deep; their items may be Completions.
    """
    what = _unfinished(output) or ("" if not isinstance(output, Completion) else _COMPLETION)
    if what:
        raise TypeError(f"Expected the agent's answer, got {what}")


_COMPLETION = "a Completion; return its text, as in self.llm(...).text"
_MOST_ITEMS = 1_000
_SCALARS = frozenset({str, int, float, bool, type(None)})
_ITERATORS: tuple[Any, ...] = (
    GeneratorType,
    map,
    filter,
    zip,
    enumerate,
    reversed,
    type(iter([])),
    itertools.chain,
    itertools.islice,
)


def _unfinished(output: Any, depth: int = 0) -> str:
    """Describe a value that is not an answer yet, with the remedy; "" for an answer."""
    if type(output) in _SCALARS:  # nearly always
        return ""
    if inspect.iscoroutine(output):
        output.close()  # avoid the warning that it was never awaited: the error says so
        return "a coroutine; write `await` before the call"
    if inspect.isasyncgen(output):
        return "an async generator; collect it with `async for`"
    if isinstance(output, _ITERATORS):
        return f"a {type(output).__name__}; return what it yields, as in list(...)"
    if isinstance(output, ParameterNode):
        return "a ParameterNode; return its value, as in self.prompt.data"
    if inspect.ismethod(output) or (inspect.isbuiltin(output) and not inspect.ismodule(output.__self__)):
        return f"the method {output.__name__}; call it, as in {output.__name__}()"
    if inspect.isawaitable(output) or isinstance(output, Future):
        remedy = "return its .result()" if isinstance(output, Future) else "write `await` before the call"
        return f"an awaitable {type(output).__name__}; {remedy}"
    if type(output) in (list, tuple, dict) and depth < 2 and len(output) <= _MOST_ITEMS:
        inner = [_unfinished(one, depth + 1) for one in (output.values() if type(output) is dict else output)]
        return next((f"a {type(output).__name__} with {what}" for what in inner if what), "")
    return ""


def show_failure(record: Failure) -> str:
    """Return a failure with its traceback."""
    where = f" (at {record.where})" if record.where and not record.traceback else ""
    trace = f"Traceback of the user's code:\n{record.traceback}\n" if record.traceback else ""
    return f"{trace}{record.error}: {record.message}{where}"


def failures_left(failures: Sequence[Failure]) -> list[str]:
    """Return one line for each kind of error in the user's code: how often, where, and the first one's traceback."""
    kinds: dict[tuple[str, str, str], list[Failure]] = {}
    for record in failures:
        if record.where and record.stage in ("agent", "guide"):
            kinds.setdefault((record.stage, record.error, record.where), []).append(record)
    return [
        f"the {stage} failed {len(found)} times with {error} at {where}, first on sample "
        f"{found[0].sample_id}\n{show_failure(found[0])}"
        for (stage, error, where), found in kinds.items()
    ]


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of the user's code, the innermost last, or those of packages if there are no others."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not _is_in(frame.filename, (_PACKAGE,))
    ]
    own = [frame for frame in frames if not _is_in(frame.filename, (*_STANDARD, *_INSTALLED))]
    return own or [frame for frame in frames if _is_in(frame.filename, _INSTALLED)]


def _is_in(file: str, folders: tuple[str, ...]) -> bool:
    return any(file.startswith((f"{folder}/", f"{folder}\\")) for folder in folders)
