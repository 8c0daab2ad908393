"""Agents written for Trace, unchanged, in our training loop: PyPI's trace-opt, OpenTrace's main and experimental.

An instance runs while it holds a `TraceLock`, so forward passes follow one another: a traced operation reads and writes
Trace's registries all along. An async `forward` holds it across its awaits, because its tasks read the nodes too.
Guides get plain data: the data of an output's nodes, also in tuples, lists, dicts and data classes.

Trace keeps feedback on nodes that all instances share, and its registries are global. The lock is held around a forward
pass and around zero_feedback -> backward -> step, and released while the optimizer's model is awaited: the slow parts
run concurrently, the rest never mixes. A `Visit` is the state of one instance while it holds the lock: its own values
on the nodes, its own registries.

Nothing is imported from Trace: its modules are found in sys.modules once the user has imported them.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from inspect import isawaitable
from itertools import product
from typing import Any

from aggregator.adapters.frameworks import require_version
from aggregator.agents.code import check_source, plain_source
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.agents.transcripts import current_transcript, recording
from aggregator.checks import contain_stop, is_async
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask

# ---- what Trace shares between instances

OLDEST, NEWEST = "0.1.3", "0.3"
"""The supported versions of Trace: from the first one to below the second."""

_NODES = "opto.trace.nodes"


def require_trace() -> None:
    """Raise ConfigError if the imported Trace has an unsupported version; pass if none is imported."""
    version = getattr(sys.modules.get("opto.version"), "__version__", None)
    if version is not None:
        require_version("trace-opt", OLDEST, NEWEST, version=version)


class TraceLock:
    """Held by code that reads or writes Trace's shared state; `released()` lets the others run meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def hold(self, visit: Visit) -> Iterator[None]:
        """Hold the lock in this thread, with the visit's state installed."""
        with self._lock:
            visit.enter()
            self._mine.visit = visit
            try:
                yield
            finally:
                self._mine.visit = None
                visit.leave()

    @asynccontextmanager
    async def hold_async(self, visit: Visit, threads: Executor) -> AsyncIterator[None]:
        """Hold the lock in a task; a thread waits for it, so that the event loop is not blocked.

        It is held across every `await` inside, because a task's children read the nodes too.
        """
        taken = asyncio.get_running_loop().run_in_executor(threads, self._lock.acquire)
        try:
            await asyncio.shield(taken)
        except asyncio.CancelledError:
            taken.add_done_callback(lambda _: self._lock.release())  # the thread cannot be stopped: undo its work
            raise
        visit.enter()
        try:
            yield
        finally:
            visit.leave()
            self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release the lock around the block; do nothing in a thread that does not hold it."""
        visit = getattr(self._mine, "visit", None)
        if visit is None:
            yield
            return
        visit.leave()
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            visit.enter()


class Visit:
    """One instance's view of Trace's shared state: entered and left any number of times.

    `values` is the data of each parameter's node. Feedback and children of these nodes are the visit's own, and so are
    the global registries: names in its graph do not depend on other instances, and no graph is kept.
    """

    def __init__(self, values: Mapping[Any, Any]) -> None:
        self._own: list[tuple[Any, str, Any]] = [(node, "_data", value) for node, value in values.items()]
        for node, name in product(values, ("_feedback", "_children")):
            if hasattr(node, name):
                mine = copy.copy(getattr(node, name))
                mine.clear()
                self._own.append((node, name, mine))
        self._outer: list[tuple[Any, str, Any]] = []
        self._registries: _Registries | None = None

    def enter(self) -> None:
        """Install the visit's state, and save the previous one."""
        self._outer_registries = _Registries.current()
        (self._registries or self._outer_registries.fresh()).install()
        self._outer = [(node, name, getattr(node, name)) for node, name, _ in self._own]
        _assign(self._own)

    def leave(self) -> None:
        """Save the visit's state, and restore the previous one."""
        self._own = [(node, name, getattr(node, name)) for node, name, _ in self._own]
        _assign(self._outer)
        self._registries = _Registries.current()
        self._outer_registries.install()

    def rename(self, nodes: Iterable[Any]) -> None:
        """Give the nodes different names during the visit; the first one of a name keeps it."""
        taken: set[str] = set()
        for node in nodes:
            base, _, number = node.name.partition(":")
            name, count = node.name, int(number)
            while name in taken:
                count += 1
                name = f"{base}:{count}"
            taken.add(name)
            if name != node.name:
                self._set(node, "_name", name)

    def show_without_addresses(self, nodes: Iterable[Any]) -> None:
        """Give objects on the nodes, such as a traced method's `self`, the same text in the prompts of every run."""
        for node in nodes:
            kind: Any = type(node._data)  # noqa: SLF001 - Trace's `data` notes who read it
            if kind.__repr__ is object.__repr__:
                shown = f"<{kind.__module__}.{kind.__qualname__} object>"
                namesake = type(kind.__name__, (), {"__repr__": lambda _, shown=shown: shown})
                self._set(node, "_data", namesake())

    def _set(self, node: Any, name: str, value: Any) -> None:
        self._outer.append((node, name, getattr(node, name)))
        self._own.append((node, name, value))
        setattr(node, name, value)


def _assign(state: Iterable[tuple[Any, str, Any]]) -> None:
    for node, name, value in state:
        setattr(node, name, value)


class _Registries:
    """Trace's registries: the nodes by name, the stack of read nodes, the stack of name scopes.

    The nodes that were read are in a list up to version 0.1.3.8, and later in a context variable, which separates tasks
    and threads itself. Up to 0.1.3.9 the nodes by name are in lists, and later they are counted.
    """

    def __init__(self, names: Any, used: list[Any] | None, scopes: list[Any]) -> None:
        self.names = names
        self.used = used
        self.scopes = scopes

    @classmethod
    def current(cls) -> _Registries:
        """Return the installed registries, empty if Trace was never imported."""
        trace = sys.modules.get(_NODES)
        if trace is None:
            return cls(None, None, [])
        used = list(trace.USED_NODES) if isinstance(trace.USED_NODES, list) else None
        return cls(trace.GRAPH._nodes, used, list(trace.NAME_SCOPES))  # noqa: SLF001 - its registry

    def fresh(self) -> _Registries:
        """Return a copy of the names, without nodes that were read."""
        if self.names is None:
            return self
        names = copy.copy(self.names)
        names.update({name: copy.copy(nodes) for name, nodes in names.items()})
        return _Registries(names, None if self.used is None else [], [])

    def install(self) -> None:
        """Install these registries in place, because other modules of Trace refer to the same lists."""
        trace = sys.modules.get(_NODES)
        if trace is None or self.names is None:
            return
        trace.GRAPH._nodes = self.names  # noqa: SLF001 - as above
        trace.NAME_SCOPES[:] = self.scopes
        if self.used is not None:
            trace.USED_NODES[:] = self.used


def graph_of(nodes: Iterable[Any]) -> list[Any]:
    """Return all ancestors of these nodes and the nodes, each once: parents before children, in the order given."""
    found: dict[int, Any] = {}
    waiting = [(node, False) for node in reversed(list(nodes))]
    while waiting:
        node, is_done = waiting.pop()
        if id(node) in found:
            continue
        if is_done:
            found[id(node)] = node
        else:
            waiting.append((node, True))
            waiting.extend((parent, False) for parent in reversed(node.parents))
    return list(found.values())


def join(nodes: Mapping[str, Any], value: Any, *, name: str, description: str) -> Any:
    """Return one Trace node made of several, so that feedback on it reaches all of them."""
    return sys.modules[_NODES].MessageNode(value, inputs=dict(nodes), name=name, description=description)


MOST_THREADS = 64

_CODE = "__code"


# ---- the agent


def is_trace_agent(agent: Any) -> bool:
    """Return True if an agent has Trace's parameters."""
    return bool(_nodes_of(agent))


class TraceParameter(ParameterNode[Any]):
    """A Trace parameter: the value is stored on Trace's node, type and checks are ours."""

    def __init__(self, node: Any, name: str) -> None:
        self.node = self.origin = node
        self.written: Any = node._data  # noqa: SLF001 - Trace's `data` also notes who read it
        self.is_code = _CODE in node.name
        constraint = getattr(node, "_constraint", None)
        super().__init__(
            self.written,
            name=name,
            description=_describe(node),
            constraint=constraint if isinstance(constraint, str) else None,
            trainable=bool(getattr(node, "trainable", True)),
        )

    @property
    def _stored(self) -> Any:
        return self.node._data  # noqa: SLF001 - as above

    @_stored.setter
    def _stored(self, value: Any) -> None:
        self.node._data = value  # noqa: SLF001 - as above

    def code_engine(self) -> str | None:
        """Return "here" for source code, which Trace itself compiles and runs, outside our sandbox."""
        return "here" if self.is_code else None

    def check(self, raw: Any, where: str) -> Any:
        """Convert and check a value; source code must also parse, compile, and keep name and signature."""
        value = super().check(raw, where)
        if self.is_code and value != self.written:
            value = plain_source(value)
            check_source(value, like=plain_source(self.written), where=where)
        return value


class TraceAgent(Module, InstanceAgent):
    """A Trace agent as the library runs it: one instance at a time inside Trace, and the guide gets plain data.

    `shares_state`: a trainer's overridden `forward`, which calls the user's own agent, runs for one instance at a time.
    Raises ConfigError if the imported Trace has an unsupported version.
    """

    shares_state = True

    def __init__(self, agent: Any) -> None:
        require_trace()
        self.agent = agent
        self.lock = TraceLock()
        self.threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="aggregator-trace")
        taken: dict[str, int] = {}
        found = []  # named after Trace's names without the global counter
        for node in _nodes_of(agent):
            base = node.name.partition(":")[0].replace("/", ".")
            taken[base] = taken.get(base, -1) + 1
            found.append(TraceParameter(node, base if taken[base] == 0 else f"{base}.{taken[base]}"))
        self._parameters = by_name(found)

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter; names are Trace's, without its counters."""
        return dict(self._parameters)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent with the values of this context; its nodes are kept for the optimizer.

        A synchronous agent runs in a thread, an async one in this task.
        """
        visit = self.visit()
        try:
            if is_async(getattr(self.agent, "forward", self.agent)) or is_async(self.agent):
                output, plain = await self._finish(visit, self.agent, task.sample.x)
            else:
                output, plain = await self.in_thread(self._run, visit, task.sample.x)
                if isawaitable(output):  # a synchronous forward may return the result of an async operation
                    output, plain = await self._finish(visit, lambda _: output, None)
        except Exception as error:  # noqa: BLE001 - an agent may raise anything, and Trace says where feedback starts
            return Ran(error=error, handle=getattr(error, "exception_node", None))
        return Ran(output=plain, handle=output)

    def _run(self, visit: Visit, x: Any) -> tuple[Any, Any]:
        with self.lock.hold(visit), _showing() as show:
            output = show(self.agent(x))
            return output, plain_data(output)

    async def _finish(self, visit: Visit, function: Callable[[Any], Awaitable[Any]], x: Any) -> tuple[Any, Any]:
        async with self.lock.hold_async(visit, self.threads):
            with _showing() as show:
                output = show(await function(x))
                return output, plain_data(output)

    def visit(self) -> Visit:
        """Return Trace's state for one instance: the nodes have the values of this context."""
        return Visit({parameter.node: parameter.data for parameter in self._parameters.values()})  # type: ignore[attr-defined]

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in one of our threads, with this context's variables."""
        context = contextvars.copy_context()

        def run() -> Any:
            try:
                return context.run(function, *args)
            except StopIteration as error:
                raise contain_stop(error) from error

        return await asyncio.get_running_loop().run_in_executor(self.threads, run)


@contextmanager
def _showing() -> Iterator[Callable[[Any], Any]]:
    """Yield a function that shows the operations behind an output; those behind an error are shown too.

    Parameters have the candidate's values only while the lock is held.
    """

    def show(output: Any) -> Any:
        if current_transcript() is not None:
            for node in graph_of(node for _, node in nodes_in(output)):
                inputs = getattr(node, "_inputs", None)
                if inputs:
                    shown = [(name, plain_data(one)) for name, one in inputs.items() if name != "self"]
                    operation = node.name.partition(":")[0].rpartition("<locals>.")[2]  # as in `Router.route`
                    with recording(str(operation), _describe(node).rstrip("."), shown) as span:
                        span.finish(plain_data(node))
        return output

    try:
        yield show
    except Exception as error:
        show(getattr(error, "exception_node", None))
        raise


def is_node(value: Any) -> bool:
    """Return True for a Trace node."""
    return hasattr(value, "_data") and hasattr(value, "parents")


def plain_data(output: Any) -> Any:
    """Return the plain data of an agent's output; an output without nodes is returned unchanged."""
    if is_node(output):
        return plain_data(output._data)  # noqa: SLF001 - Trace's `data` notes who read it
    if not any(True for _ in nodes_in(output)):
        return output
    if isinstance(output, Mapping):
        return {key: plain_data(value) for key, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = {one.name: plain_data(getattr(output, one.name)) for one in dataclasses.fields(output) if one.init}
        return dataclasses.replace(output, **changed)
    parts = [plain_data(part) for part in output]
    if hasattr(output, "_fields"):
        return type(output)(*parts)
    return next(kind for kind in (tuple, frozenset, set, list) if isinstance(output, kind) or kind is list)(parts)


def nodes_in(output: Any, where: str = "output") -> Iterator[tuple[str, Any]]:
    """Yield the nodes in an output with their names, such as `output_answer` and `output_0`."""
    if is_node(output):
        yield where, output
        return
    parts: Any = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = [(one.name, getattr(output, one.name)) for one in dataclasses.fields(output)]
    elif isinstance(output, AbstractSet | Sequence) and not isinstance(output, str | bytes | bytearray):
        parts = enumerate(output)
    for key, part in parts:
        yield from nodes_in(part, f"{where}_{''.join(c if c.isalnum() else '_' for c in str(key))}")


def _nodes_of(agent: Any) -> list[Any]:
    """Return an agent's parameters if they are Trace's, each once, else none."""
    offered = getattr(agent, "parameters", None)
    found = list(offered()) if callable(offered) else []
    traced = [node for node in found if hasattr(node, "_data") and hasattr(node, "py_name")]
    return list({id(node): node for node in traced}.values())


def _describe(node: Any) -> str:
    """Return a node's description without Trace's tag."""
    text = getattr(node, "description", None) or ""
    return text.partition("] ")[2] if text.startswith("[") and "] " in text else text
