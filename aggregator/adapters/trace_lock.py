"""The lock that lets one instance at a time into Trace, and is given up while a model is awaited."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class YieldingLock:
    """Held around what reads or writes Trace's shared state; `released()` inside lets the others go on meanwhile.

    Whoever holds it finds the values it asked for on the nodes, and Trace's global registries as they were when it
    first came, however many others came between: names in its graph do not count what others made.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def hold(self, values: Mapping[Any, Any]) -> Iterator[None]:
        """Hold the lock; `values` (node -> data) stand on the nodes for so long."""
        visit = _Visit(values)
        with self._lock:
            visit.enter()
            self._mine.visit = visit
            try:
                yield
            finally:
                self._mine.visit = None
                visit.leave()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Give the lock up around the block; where this thread does not hold it, do nothing."""
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


class _Visit:
    """What one holder changes on Trace's shared state: entered and left any number of times."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        self._values = values
        self._own: _Globals | None = None

    def enter(self) -> None:
        self._before = {node: node._data for node in self._values}  # noqa: SLF001 - Trace's `data` notes who read it
        self._outer = _Globals.current()
        (self._own or self._outer.fresh()).install()
        for node, value in self._values.items():
            node._data = value  # noqa: SLF001 - as above

    def leave(self) -> None:
        for node, value in self._before.items():
            node._data = value  # noqa: SLF001 - as above
        self._own = _Globals.current()
        self._outer.install()


class _Globals:
    """Trace's registries: the nodes by name, the stack of read nodes, the stack of name scopes."""

    def __init__(self, registry: Any, used: list[Any], scopes: list[Any]) -> None:
        self.registry = registry
        self.used = used
        self.scopes = scopes

    @classmethod
    def current(cls) -> _Globals:
        """Return what is installed now; nothing of it where Trace was never imported."""
        trace = sys.modules.get("opto.trace.nodes")
        if trace is None:
            return cls(None, [], [])
        return cls(trace.GRAPH._nodes, list(trace.USED_NODES), list(trace.NAME_SCOPES))  # noqa: SLF001 - its registry

    def fresh(self) -> _Globals:
        """Return registries of one's own that begin with what stands in these."""
        if self.registry is None:
            return self
        registry = type(self.registry)(list, {name: list(nodes) for name, nodes in self.registry.items()})
        return _Globals(registry, [], [])

    def install(self) -> None:
        """Make these the current ones, in place: others hold the same lists."""
        trace = sys.modules.get("opto.trace.nodes")
        if trace is None or self.registry is None:
            return
        trace.GRAPH._nodes = self.registry  # noqa: SLF001 - as above
        trace.USED_NODES[:] = self.used
        trace.NAME_SCOPES[:] = self.scopes
