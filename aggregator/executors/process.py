"""ProcessExecutor: rollouts in worker processes, for agents whose code is CPU-bound.

Agent and guide are pickled and sent once to each worker, values and samples with each task. Models are called by this
process, with its cassette, budget, limits, keys and ledger. See `link.py` for the protocol.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from functools import partial
from multiprocessing import spawn
from types import TracebackType
from typing import Any, Self
from weakref import finalize

from msgspec.structs import replace

from aggregator.cassettes.lineage import current_lineage, current_role, tape_here
from aggregator.checks import check_positive
from aggregator.errors import ConfigError, is_own
from aggregator.executors import link
from aggregator.executors.link import Link, Reference, dump_error, dumps, load_error, loads, parameters_of
from aggregator.executors.local import finish
from aggregator.executors.work import time_out, timed_out
from aggregator.llm.client import LLM
from aggregator.llm.ledger import collecting, count
from aggregator.llm.models import CallableModel
from aggregator.llm.owner import Owner, stand_in_for
from aggregator.protocols import RolloutWork
from aggregator.records import Failure, Rollout, RolloutTask
from aggregator.sandbox.limits import place_here

GRACE = 2.0
"""Seconds that a cancelled task may take before its worker is killed, and a worker to exit."""

WATCH = 0.2
"""Seconds between two checks whether a worker is alive."""

STARTS = 2
"""How many new workers a task is given to if they die before they start it."""

_WRAPPED = ("program", "function", "agent")  # where `as_agent` keeps the original object
_LOCAL = "or use the local executor"
_SCRIPT = "import sys; sys.path[:] = {path!r}; from aggregator.executors.worker import main; main({descriptor})"


class ProcessExecutor:
    """Runs rollouts in worker processes, one at a time in each; at most `max_workers` (default: the processors).

    Use it for agents that compute; an agent that mainly waits for models is faster in threads and tasks of one process.
    Agent, guide, samples and outputs must be picklable, with classes in an importable module. Workers are started on
    demand, reused, and end with `with`, `close()` or the interpreter. Scripts need the usual `if __name__ ==
    "__main__":`. Workers do not see later changes of the agent, except the values of its parameters.

    A task whose worker dies is a lost instance: an infrastructure failure without a score; the worker is replaced. A
    cancelled task has two seconds to end, then its worker is killed. Needs a POSIX system.
    """

    is_remote = True

    def __init__(self, max_workers: int | None = None) -> None:
        if max_workers is not None:
            check_positive("max_workers", max_workers)
        if not hasattr(os, "killpg"):
            raise ConfigError(f"Expected a POSIX system for ProcessExecutor, got {sys.platform}; {_LOCAL}")
        self.max_workers = max_workers or os.cpu_count() or 1
        self.owner = Owner()
        self._cargo = _Cargo(self.owner)
        self._pool = _Pool(self.max_workers)
        self._finalizer = finalize(self, _Pool.end, self._pool)

    def __repr__(self) -> str:
        return f"ProcessExecutor({self.max_workers})"

    async def map(self, work: RolloutWork, tasks: Sequence[RolloutTask]) -> list[Rollout]:
        """Return the rollouts in the order of the tasks.

        Raises only errors that end a run, the earliest task's first, after the work in flight has ended; ConfigError
        for anything that cannot be pickled, before any task starts.
        """
        if not tasks:
            return []
        if (tape := tape_here()) is not None and tape.rules.clients:
            raise ConfigError(
                f"Expected a cassette of the library's own client with ProcessExecutor, got clients="
                f"{tape.rules.clients!r}: other clients in a worker process do not reach the cassette; {_LOCAL}"
            )
        messages = self._cargo.pack(work, tasks)
        return await finish(self._run, messages, self.max_workers)

    async def _run(self, job: tuple[RolloutTask, link.Run]) -> Rollout:
        """Run one task in a free worker."""
        task, message = job
        for _ in range(STARTS):
            worker = await self._pool.take()
            conversation = _Conversation(worker, self._cargo, task.timeout)
            outcome = rollout = None
            try:
                with collecting() as ledger:  # calls that this process makes for the worker
                    async with conversation.deadline:
                        outcome = await conversation.hold(message)
                    for role, usage in outcome.usage if outcome is not None else ():
                        count(role, usage)
                if isinstance(outcome, link.Done):
                    rollout = self._cargo.rollout(outcome.rollout, task)
                    rollout = replace(rollout, scores={**ledger.measures(without="guide"), **rollout.scores})
            except TimeoutError:
                if not conversation.deadline.expired():
                    raise
                rollout = await time_out(task)  # the worker did not notice: its event loop is blocked
            finally:
                if outcome is None or timed_out(rollout):  # it has ended, or still runs abandoned work
                    worker.kill()
                self._pool.put_back(worker)
            if rollout is not None:
                return rollout
            match outcome:
                case link.Failed():
                    raise load_error(outcome.error)
            if conversation.has_started:
                return _lost(task, worker.ending())
        raise ConfigError(
            f"Expected worker processes that load the agent and run it, got {STARTS} that ended before: "
            f'{worker.ending()}; put what starts the training under `if __name__ == "__main__":`, {_LOCAL}'
        )

    def close(self) -> None:
        """End the workers and whatever they run. The executor can no longer be used. Safe to call twice."""
        self._pool.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lost(task: RolloutTask, ending: str) -> Rollout:
    sample, path = task.sample, "/".join(task.lineage)
    message = f"the worker process {ending} while it ran this instance"
    failure = Failure(stage="agent", error="WorkerLostError", message=message, sample_id=sample.id, infrastructure=True)
    return Rollout(sample_id=sample.id, x=sample.x, failure=failure, lineage=path, repeat=task.repeat)


class _Cargo:
    """The objects that workers know by number: models, agents and guides."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.loads: list[link.Load] = []
        self._lock = threading.Lock()
        self._objects: list[Any] = []
        self._parameters: dict[int, Reference] = {}  # by id; the agents above keep them alive
        self._made: dict[bytes, LLM] = {}

    def pack(self, work: RolloutWork, tasks: Sequence[RolloutTask]) -> list[tuple[RolloutTask, link.Run]]:
        """Return a message for each task; raises ConfigError for anything that cannot be pickled."""
        remedy = f"give it plain attributes and importable functions, {_LOCAL}"
        with self._lock:  # several event loops may share an executor
            self._add(work.agent, "an agent", remedy)
            self._add(work.guide, "a guide", remedy)
        packed = dumps(work, self._refer, "the work of an executor", remedy)
        values = {name: one.data for name, one in parameters_of(work.agent).items() if one.trainable}
        path, role, place, jobs = current_lineage(), current_role(), place_here(), []
        for task in tasks:
            sent = replace(task, values={**values, **task.values})
            what = f"values and a sample (number {task.sample.id})"
            data = dumps(sent, self._refer, what, f"use samples of plain data, {_LOCAL}")
            jobs.append((task, link.Run(packed, data, path, role, place)))
        return jobs

    def _add(self, thing: Any, what: str, remedy: str) -> None:
        """Pickle an agent or a guide, once."""
        if thing is None or any(thing is known for known in self._objects):
            return
        program = next((getattr(thing, name) for name in _WRAPPED if hasattr(thing, name)), thing)
        dumps(program, self._refer, what, remedy)  # the user's own object, so that an error names it
        data = dumps(thing, self._refer, what, remedy)
        number = len(self._objects)
        self._objects.append(thing)
        self.loads.append(link.Load(number, data))
        for name, parameter in parameters_of(thing).items():
            self._parameters[id(parameter)] = ("parameter", number, name)

    def _refer(self, value: Any) -> Reference | None:
        """Return the reference of an object that workers know or must not have; None for an object to pickle."""
        if isinstance(value, LLM):
            return ("llm", self.owner.number_of(value), *stand_in_for(value))
        if isinstance(value, CallableModel):
            return ("model", self.owner.number_of(value), value.model)
        number = next((number for number, known in enumerate(self._objects) if known is value), None)
        return self._parameters.get(id(value)) if number is None else ("object", number)

    def _resolve(self, reference: Reference) -> Any:
        kind, number = reference
        return self.owner.model(number) if kind == "model" else self._objects[number]

    def rollout(self, data: bytes, task: RolloutTask) -> Rollout:
        """Return the rollout that a worker sent."""
        try:
            rollout: Rollout = loads(data, self._resolve)
        except Exception as error:
            raise ConfigError(
                f"Expected a rollout of instance {task.sample.id} that can be loaded here, got "
                f"{type(error).__name__}: {error}; return plain data from the agent, {_LOCAL}"
            ) from error
        return rollout

    def call(self, ask: link.Ask) -> Any:
        """Return the call that a worker requests, with its model filled in."""
        call = loads(ask.call, self._resolve)
        if ask.made is None:
            return call
        if ask.made not in self._made:  # a client that the agent created in the worker, from settings alone
            self._made[ask.made] = pickle.loads(ask.made)  # noqa: S301 - a worker runs trusted code
        return replace(call, model=self.owner.number_of(self._made[ask.made]))


class _Conversation:
    """One task in one worker: sends it and answers the worker's requests, in the context of `map`'s caller."""

    def __init__(self, worker: _Worker, cargo: _Cargo, timeout: float | None = None) -> None:
        self.has_started = False
        self.deadline = asyncio.timeout(None)
        self._worker, self._cargo, self._timeout = worker, cargo, timeout
        self._link = Link(worker.end, link.FromWorker)
        self._asks: dict[int, asyncio.Task[None]] = {}
        self._checks: dict[int, asyncio.Future[bytes | None]] = {}

    async def hold(self, message: link.Run) -> link.Done | link.Failed | None:
        """Return the task's final message, None if its worker died. If it is cancelled, the worker must be killed."""
        if self._worker.setting is not None:
            self._link.send(self._worker.setting)
            self._worker.setting = None
        for load in self._cargo.loads[self._worker.loaded :]:
            self._link.send(load)
        self._worker.loaded = len(self._cargo.loads)
        self._link.send(message)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.write())
            watching = group.create_task(self._watch())
            try:
                return await self._listen(group)
            except asyncio.CancelledError:
                self._stop_asks()
                self._link.send(link.Cancel())
                with suppress(TimeoutError):
                    async with asyncio.timeout(GRACE):
                        await self._listen(group)
                raise
            finally:
                watching.cancel()
                self._stop_asks()
                self._link.finish()

    async def _listen(self, group: asyncio.TaskGroup) -> link.Done | link.Failed | None:
        while (message := await self._link.receive()) is not None:
            match message:
                case link.Started():
                    self.has_started = True
                    if self._timeout is not None:  # the agent's and the guide's, which the worker has itself
                        late = 2 * (self._timeout + GRACE)
                        self.deadline.reschedule(asyncio.get_running_loop().time() + late)
                case link.Ask():
                    self._asks[message.number] = group.create_task(self._answer(message))
                case link.Stop() if message.number in self._asks:
                    self._asks[message.number].cancel()
                case link.Checked() if message.number in self._checks:
                    self._checks.pop(message.number).set_result(message.error)
                case link.Done() | link.Failed():
                    return message
        return None

    async def _answer(self, ask: link.Ask) -> None:
        """Have the owner answer a call, and send the answer or the error."""
        owner, number = self._cargo.owner, ask.number
        try:
            call = self._cargo.call(ask)
            if ask.stream:
                async with aclosing(owner.deltas(call)) as pieces:
                    async for piece in pieces:
                        self._link.send(link.Answer(number, pickle.dumps(piece)))
            else:
                check = partial(self._validate, number) if ask.checks else None
                completion = await owner.answer(call, check)
                self._link.send(link.Answer(number, pickle.dumps(completion)))
        except BaseException as error:
            if not is_own(error):
                raise
            self._link.send(link.Answer(number, dump_error(error), is_error=True))
        finally:
            self._asks.pop(number, None)

    async def _validate(self, number: int, text: str) -> None:
        """Have the worker check the text of an answer; raises the exception of its `validate`."""
        checked: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._checks[number] = checked
        self._link.send(link.Check(number, text))
        try:
            if (error := await checked) is not None:
                raise load_error(error)
        finally:
            self._checks.pop(number, None)

    def _stop_asks(self) -> None:
        for ask in list(self._asks.values()):
            ask.cancel()

    async def _watch(self) -> None:
        """Close the socket of a dead worker, if a process that it started still holds the other end."""
        while self._worker.is_alive():  # noqa: ASYNC110 - asyncio has no event for the end of such a process
            await asyncio.sleep(WATCH)
        await asyncio.sleep(WATCH)  # what it wrote before is read first
        with suppress(OSError):
            self._worker.end.shutdown(socket.SHUT_RDWR)


class _Worker:
    """One worker process, and this end of the socket to it."""

    def __init__(self) -> None:
        self.setting: bytes | None = _setting()
        self.loaded = 0
        self.end, theirs = socket.socketpair()
        path = [os.fspath(entry) or os.getcwd() for entry in sys.path]  # noqa: PTH109 - as text
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # noqa: SLF001 - as multiprocessing
        with theirs:
            try:
                self.process = subprocess.Popen(  # noqa: S603 - this very interpreter and our own script
                    [sys.executable, *flags, "-c", _SCRIPT.format(path=path, descriptor=theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # this process handles Ctrl-C; and a worker's children end with it
                )
            except OSError as error:
                self.end.close()
                raise ConfigError(f"Expected a worker process to start, got {error}") from error

    def is_alive(self) -> bool:
        """Return False once the process has ended; it is not waited for, so that its id is not reused."""
        if self.process.returncode is not None or not hasattr(os, "waitid"):
            return self.process.poll() is None
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # the application ignores SIGCHLD: the system has reaped it
            return False

    def kill(self) -> None:
        """Kill the process and all its children."""
        self.hang_up()
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def hang_up(self) -> None:
        """Close the socket, also for a forked process that holds a copy of it: the worker ends."""
        with suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)
        self.end.close()

    def ending(self) -> str:
        """Return how the process ended."""
        code = self.process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"


def _setting() -> bytes:
    """Return what `multiprocessing` passes to a spawned process, as bytes; raises ConfigError within such a process."""
    method: str | None = multiprocessing.get_start_method(allow_none=True)
    try:
        data = spawn.get_preparation_data("aggregator-worker")
    except RuntimeError as error:  # a worker imports a main module without a guard
        raise ConfigError(
            'Expected the start of the training under `if __name__ == "__main__":`, got it at the top level of the '
            "main module, which worker processes import"
        ) from error
    data.pop("authkey", None)
    if method is None:  # reading it fixes one: the application may still choose another
        multiprocessing.set_start_method(None, force=True)
        data.pop("start_method", None)
    return pickle.dumps(data)


class _Pool:
    """At most `size` workers, given out first come, first served. Used from any event loop and thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._waiting: deque[Future[None]] = deque()
        self._pid = os.getpid()
        self._is_closed = False

    async def take(self) -> _Worker:
        """Return a free worker, start one if allowed, or wait; raises ConfigError."""
        while True:
            with self._lock:
                if self._is_closed:
                    raise ConfigError("Expected an executor that is open, got one that was closed; make a new one")
                if self._pid != os.getpid():  # after a fork: the workers are the parent's
                    for worker in self._workers:
                        worker.end.close()
                        worker.process.returncode = 0  # not a child of this process: nothing to wait for
                    self._workers, self._idle, self._pid = [], [], os.getpid()
                if self._idle:
                    return self._idle.pop()
                if len(self._workers) < self._size:
                    worker = _Worker()
                    self._workers.append(worker)
                    return worker
                turn: Future[None] = Future()
                self._waiting.append(turn)
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake()
                raise

    def put_back(self, worker: _Worker) -> None:
        """Return a worker to the pool, or drop one that has ended."""
        with self._lock:
            if worker.is_alive() and not self._is_closed:
                self._idle.append(worker)
            elif worker in self._workers:
                self._workers.remove(worker)
        if not worker.is_alive() or self._is_closed:
            worker.kill()
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return

    def end(self) -> None:
        """End every worker: an idle one may run its exit hooks, a busy one is killed."""
        with self._lock:
            workers, idle = ([], []) if self._pid != os.getpid() else (self._workers, self._idle)
            self._workers, self._idle, self._is_closed = [], [], True
            waiting, self._waiting = list(self._waiting), deque()
        for turn in waiting:
            if turn.set_running_or_notify_cancel():
                turn.set_result(None)
        for worker in idle:
            worker.hang_up()
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):
                if worker in idle:
                    worker.process.wait(GRACE)
            worker.kill()
