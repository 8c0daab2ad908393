"""One rollout: an agent on one input under given values, judged by a guide, and what user code raises as a record.

`AgentWork` is what an executor runs. It needs nothing from its surroundings, so it does the same in this process, in
a worker and alone in a test.

A failure of user code is recorded with the line, a traceback without paths and, where it is known, the likely cause.
An error in trained code is not the user's bug: it describes the values on trial and is left to the optimizer.
"""

from __future__ import annotations

import asyncio
import inspect
import sysconfig
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
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
"""How many characters of an error's message a record keeps."""


# ---- one rollout


class Ran(Struct, frozen=True, kw_only=True):
    """What one run of an agent came to: an output, or the error that its code raised.

    `handle` is whatever the agent's own optimizer needs to go on from there, as the node of a graph.
    """

    output: Any = None
    handle: Any = None
    error: BaseException | None = None


class InstanceAgent:
    """The base of agents that run one instance at a time: a subclass has `parameters` and `run`."""

    isolation: Literal["overlay", "copy", "serial"] = "overlay"
    max_concurrency: int | None = None

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the parameters."""
        raise NotImplementedError

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent on the task's input; `call` runs a synchronous function in a thread. May raise anything."""
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

    What the agent assigns to its trainable parameters lasts until the end of its rollout.

    `agent` is what `as_agent` returns. `call` runs synchronous code; None uses its own threads. Pickling keeps agent
    and guide only. Raises what ends a run; every other error is the rollout's `failure`.
    """

    def __init__(self, agent: Agent, guide: Any, *, call: Call | None = None) -> None:
        self.agent = agent
        self.guide = guide
        self._judge = None if guide is None else as_guide(guide)
        self._is_instant = is_instant(self._judge)
        self.call: Call = call or LocalExecutor().call
        parameters: dict[str, ParameterNode[Any]] = by_name(agent.parameters())  # type: ignore[arg-type]
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.trainable}

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
                except BaseException as error:  # the boundary: whatever an agent raises becomes a record
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
"""Seconds that a coroutine has to end after it was cancelled for its timeout; then it is left to itself."""

Result = TypeVar("Result")
_left: set[asyncio.Task[Any]] = set()  # given up and not ended yet: the event loop holds its tasks weakly


async def within(task: RolloutTask, stage: Stage, run: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Await `run()` for at most the task's timeout; then cancel it and refuse all calls that it still makes.

    Raises InstanceTimeoutError then, and without running anything for a stage that is recorded as timed out.
    """
    if task.timed_out != stage:
        if task.timeout is None or task.timed_out:
            return await run()
        scope = portal.Scope()

        async def held() -> Result:
            scope.hold()
            return await run()

        with portal.on_branch(here.uncounted() if (here := portal.current_branch()) is not None else None):
            running = asyncio.get_running_loop().create_task(held())  # in no TaskGroup, which would wait for it
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
    """Return the rollout of a task whose agent took longer than its timeout and cannot be asked for more."""
    error = InstanceTimeoutError(_late("agent", task))
    return await judge_run(task, Ran(error=error), None, transcript="")


def _late(stage: Stage, task: RolloutTask) -> str:
    return f"Expected the {stage} to end within instance_timeout={task.timeout:g} s, got no answer"


def timed_out(rollout: Rollout | None) -> str:
    """Return the stage of a rollout that took longer than its timeout, "" for any other rollout."""
    record = None if rollout is None else rollout.failure
    return record.stage if record is not None and record.error == InstanceTimeoutError.__name__ else ""


def _forget(task: asyncio.Task[Any]) -> None:
    """Drop a task that has ended; an error that it raised after it was given up is of no interest."""
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
    """Return the rollout that a run of an agent makes, with the guide's score; with guide None it has no score.

    `guide` is what `as_guide` returns; its calls are placed below the current lineage. `started` is when the run began,
    by `perf_counter`, `measures` what its calls took. An `instant` guide asks no model, so it has no lineage.
    Raises what ends a run.
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
    """Call `arrived(index, rollout)` as an agent that takes batches runs the tasks, which all have the same values.

    If the agent raises, the tasks that are left have failed with that error; what ends the run is raised. ConfigError
    for anything that is not a rollout of one of the tasks, and for a task that is left out.
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
                arrived(i, _name_task(rollout, tasks[i]))
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


def _name_task(rollout: Rollout, task: RolloutTask) -> Rollout:
    """Fill in what a rollout says of its task."""
    sample, scores = task.sample, {**_length_of(rollout.output), **rollout.scores}
    return replace(
        rollout, scores=scores, sample_id=sample.id, x=sample.x, lineage="/".join(task.lineage), repeat=task.repeat
    )


# ---- errors of user code as records


def record_failure(stage: Stage, error: BaseException, sample_id: int | None = None) -> Failure:
    """Return the record of an error that user code raised; raises it if it ends the run or ends this task."""
    if not is_own(error):
        raise error
    if ends_run(cause := root_of(error)):
        raise cause from None
    return failure(stage, cause, sample_id=sample_id)


def root_of(error: BaseException) -> BaseException:
    """Return what a group of errors comes down to: what ends the run, else a lost call, else the first by name.

    An agent that fans out in a TaskGroup raises groups, whose order is that of completion.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [root_of(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: (not ends_run(leaf), not is_infrastructure(leaf), show_error(leaf)))


def failure(stage: Stage, error: BaseException, *, sample_id: int | None = None) -> Failure:
    """Record an error: class and message, and where the user's code raised it; no addresses and no paths."""
    cause = root_of(error)
    name = type(cause).__name__
    message = show_error(cause, MESSAGE_LIMIT).removeprefix(name).removeprefix(": ") or name
    return Failure(
        stage=stage,
        error=name,
        message=message.encode(errors="backslashreplace").decode(),  # a lone surrogate fits neither file nor prompt
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
"""How the file of trained code ends that runs in this process."""


def where_of(error: BaseException, stage: Stage) -> str:
    """Return the innermost line of the user's own code, as "agent.py:12 in forward".

    Without one, as when the call does not fit the function, it is the call of the agent or of the guide, else "".
    """
    if own := _own_frames(error):
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
    return f"the call of the {stage}" if stage in ("agent", "guide") else ""


def traceback_of(error: BaseException) -> str:
    """Return the traceback through the user's code, with file names and no paths; "" for code that is not theirs."""
    lines = [
        f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"
        for frame in _own_frames(error)[-_FRAMES_SHOWN:]
    ]
    return "\n".join(lines)


def is_bug(error: BaseException) -> bool:
    """Return True if an error is that of code which the user wrote: not of trained code, not one of the library's.

    The library's own errors are those of calls, values and replies, which another value may mend; a guide that gives no
    verdict is the user's.
    """
    if isinstance(error, GuideError):
        return True
    if isinstance(error, AggregatorError) or hasattr(error, "source_line"):
        return False
    return not any(frame.filename.endswith(_TRAINED) for frame in traceback.extract_tb(error.__traceback__))


def check_output(output: Any) -> None:
    """Raise TypeError for what no agent means to return: something that must be awaited, read or called first.

    Lists, tuples and dicts are looked into, two levels deep; what is in them may be a Completion.
    """
    what = _unfinished(output) or ("" if not isinstance(output, Completion) else _COMPLETION)
    if what:
        raise TypeError(f"Expected the agent's answer, got {what}")


_COMPLETION = "a Completion; return its text, as in self.llm(...).text"
_MOST_ITEMS = 1_000
_SCALARS = frozenset({str, int, float, bool, type(None)})


def _unfinished(output: Any, depth: int = 0) -> str:
    """Return what a value is that is not an answer yet, and the remedy; "" for an answer."""
    if type(output) in _SCALARS:  # nearly always
        return ""
    if inspect.iscoroutine(output):
        output.close()  # no warning that it was never awaited: the error says so
        return "a coroutine; write `await` before the call"
    if inspect.isasyncgen(output):
        return "an async generator; collect it with `async for`"
    if inspect.isgenerator(output):
        return "a generator; return what it yields, as in list(...)"
    if isinstance(output, ParameterNode):
        return "a ParameterNode; return its value, as in self.prompt.data"
    if inspect.ismethod(output) or (inspect.isbuiltin(output) and not inspect.ismodule(output.__self__)):
        return f"the method {output.__name__}; call it, as in {output.__name__}()"
    if inspect.isawaitable(output):
        return f"an awaitable {type(output).__name__}; write `await` before the call"
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
    """Return one line for each kind of error of the user's code: how often, where, and the first one's traceback."""
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
    """Return the frames of the user's code, the innermost last: of installed packages if there are no others."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not _is_in(frame.filename, (_PACKAGE,))
    ]
    own = [frame for frame in frames if not _is_in(frame.filename, (*_STANDARD, *_INSTALLED))]
    return own or [frame for frame in frames if _is_in(frame.filename, _INSTALLED)]


def _is_in(file: str, folders: tuple[str, ...]) -> bool:
    return any(file.startswith((f"{folder}/", f"{folder}\\")) for folder in folders)
