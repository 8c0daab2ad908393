"""What Trace shares between all instances, handed to one of them at a time.

Trace keeps feedback on nodes that all instances share, and its registries are global. `TraceLock` is held around a
forward pass and around zero_feedback -> backward -> step, and released while the optimizer's model is awaited: the slow
part of all instances runs at once, the rest never mixes. A `Visit` is the state that one of them finds while it holds
the lock: its own values on the nodes, its own registries.

Nothing is imported from Trace: its modules are found in sys.modules once somebody else has imported them.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from itertools import product
from typing import Any

from aggregator.adapters.frameworks import require_version

OLDEST, NEWEST = "0.1.3", "0.3"
"""The versions of Trace that are supported: from the first one, and below the second."""

_NODES = "opto.trace.nodes"


def require_trace() -> None:
    """Raise ConfigError if the imported Trace is of a version that is not supported; pass if none is imported."""
    version = getattr(sys.modules.get("opto.version"), "__version__", None)
    if version is not None:
        require_version("trace-opt", OLDEST, NEWEST, version=version)


class TraceLock:
    """Held around what reads or writes Trace's shared state; `released()` inside lets the others go on meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def hold(self, visit: Visit) -> Iterator[None]:
        """Hold the lock, in this thread, with the state of the visit in place."""
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
        """Hold the lock in a task; a thread waits for it, so that the event loop goes on.

        It is kept across every `await` inside: what a task starts there reads the nodes too.
        """
        taken = asyncio.get_running_loop().run_in_executor(threads, self._lock.acquire)
        try:
            await asyncio.shield(taken)
        except asyncio.CancelledError:
            taken.add_done_callback(lambda _: self._lock.release())  # the thread cannot be stopped: undo what it does
            raise
        visit.enter()
        try:
            yield
        finally:
            visit.leave()
            self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release the lock around the block; does nothing in a thread that does not hold it."""
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
    """What one instance finds on Trace's shared state: entered and left any number of times.

    `values` is the data of each parameter's node. Feedback and children of these nodes are the visit's own, and so are
    the global registries: names in its graph do not count what other instances made, and no graph is kept for good.
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
        """Put the visit's state in place, and keep what was there."""
        self._outer_registries = _Registries.current()
        (self._registries or self._outer_registries.fresh()).install()
        self._outer = [(node, name, getattr(node, name)) for node, name, _ in self._own]
        _assign(self._own)

    def leave(self) -> None:
        """Keep the visit's state, and put back what was there before."""
        self._own = [(node, name, getattr(node, name)) for node, name, _ in self._own]
        _assign(self._outer)
        self._registries = _Registries.current()
        self._outer_registries.install()

    def rename(self, nodes: Iterable[Any]) -> None:
        """Give the nodes names that differ, for as long as the visit lasts; the first of a name keeps it."""
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
        """Let objects on the nodes, as the `self` of a traced method, look the same in the prompts of every run."""
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

    The nodes that were read are in a list up to version 0.1.3.8, and later in a context variable, which keeps tasks and
    threads apart by itself. Up to 0.1.3.9 the nodes by name are in lists, and later they are counted.
    """

    def __init__(self, names: Any, used: list[Any] | None, scopes: list[Any]) -> None:
        self.names = names
        self.used = used
        self.scopes = scopes

    @classmethod
    def current(cls) -> _Registries:
        """Return what is installed now; empty if Trace was never imported."""
        trace = sys.modules.get(_NODES)
        if trace is None:
            return cls(None, None, [])
        used = list(trace.USED_NODES) if isinstance(trace.USED_NODES, list) else None
        return cls(trace.GRAPH._nodes, used, list(trace.NAME_SCOPES))  # noqa: SLF001 - its registry

    def fresh(self) -> _Registries:
        """Return a copy of the names, and no nodes that were read."""
        if self.names is None:
            return self
        names = copy.copy(self.names)
        names.update({name: copy.copy(nodes) for name, nodes in names.items()})
        return _Registries(names, None if self.used is None else [], [])

    def install(self) -> None:
        """Make these the current ones, in place: other modules of Trace hold the same lists."""
        trace = sys.modules.get(_NODES)
        if trace is None or self.names is None:
            return
        trace.GRAPH._nodes = self.names  # noqa: SLF001 - as above
        trace.NAME_SCOPES[:] = self.scopes
        if self.used is not None:
            trace.USED_NODES[:] = self.used


def graph_of(nodes: Iterable[Any]) -> list[Any]:
    """Return all nodes that these were made of, each once: parents before children, in the order given."""
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
    """Return one node of Trace made of several, so that feedback on it reaches them all."""
    return sys.modules[_NODES].MessageNode(value, inputs=dict(nodes), name=name, description=description)
