"""Agents written for Trace, unchanged, in our training loop: PyPI's trace-opt, OpenTrace's main and experimental.

An instance runs while it holds the lock of `trace_state`, so forward passes follow one another: a traced operation
reads and writes Trace's registries all along. An async `forward` holds it across its awaits, as what it starts reads
the nodes too. Guides see plain data: what the nodes of an output hold, also in tuples, lists, dicts and data classes.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any

from aggregator.adapters.trace_state import TraceLock, Visit, graph_of, require_trace
from aggregator.agents.code import check_source, plain_source
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.agents.transcripts import current_transcript, recording
from aggregator.checks import is_async
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask

MOST_THREADS = 64

_CODE = "__code"


def is_trace_agent(agent: Any) -> bool:
    """Return True if an agent offers parameters of Trace."""
    return bool(_nodes_of(agent))


class TraceParameter(ParameterNode[Any]):
    """A parameter of Trace: the value lives on Trace's node, type and checks are ours."""

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
        """Return "here" for source code, which Trace itself compiles and runs; no sandbox of ours reaches it."""
        return "here" if self.is_code else None

    def check(self, raw: Any, where: str) -> Any:
        """Convert and check a value; source code must also parse, compile, and keep name and signature."""
        value = super().check(raw, where)
        if self.is_code and value != self.written:
            value = plain_source(value)
            check_source(value, like=plain_source(self.written), where=where)
        return value


class TraceAgent(Module, InstanceAgent):
    """A Trace agent as the library runs it: one instance at a time inside Trace, and the guide sees plain data.

    `shares_state`: a trainer's overridden `forward`, which calls the user's own agent, runs for one instance at a time.
    Raises ConfigError if the imported Trace is of a version that is not supported.
    """

    shares_state = True

    def __init__(self, agent: Any) -> None:
        require_trace()
        self.agent = agent
        self.lock = TraceLock()
        self.threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="aggregator-trace")
        self._parameters = by_name(_parameters_of(_nodes_of(agent)))

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter; names are Trace's, without its counters."""
        return dict(self._parameters)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent under the values that this context reads; its nodes are kept for the optimizer.

        A synchronous agent runs in a thread, an async one in this task.
        """
        visit = self.visit()
        try:
            if is_async(getattr(self.agent, "forward", self.agent)) or is_async(self.agent):
                output, plain = await self._finish(visit, self.agent, task.sample.x)
            else:
                output, plain = await self.in_thread(self._run, visit, task.sample.x)
                if isawaitable(output):  # what a synchronous forward returns of an async operation
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
        """Return the state of Trace for one instance: the values that this context reads are on the nodes."""
        return Visit({parameter.node: parameter.data for parameter in self._parameters.values()})  # type: ignore[attr-defined]

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread of our own, with this context's variables."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: context.run(function, *args))


@contextmanager
def _showing() -> Iterator[Callable[[Any], Any]]:
    """Hand out a function that shows the operations which led to an output; those that led to an error are shown too.

    Parameters have the values on trial only while the lock is held.
    """

    def show(output: Any) -> Any:
        if current_transcript() is not None:
            for node in graph_of(node for _, node in nodes_in(output)):
                inputs = getattr(node, "_inputs", None)
                if inputs:
                    shown = [(name, plain_data(one)) for name, one in inputs.items() if name != "self"]
                    with recording(_operation(node), _describe(node).rstrip("."), shown) as span:
                        span.finish(plain_data(node))
        return output

    try:
        yield show
    except Exception as error:
        show(getattr(error, "exception_node", None))
        raise


def is_node(value: Any) -> bool:
    """Return True for a node of Trace."""
    return hasattr(value, "_data") and hasattr(value, "parents")


def plain_data(output: Any) -> Any:
    """Return what an agent's output holds, without nodes; what has none is returned as it is."""
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
    """Yield the nodes in an output with the place of each, as `output_answer` and `output_0`."""
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
    """Return an agent's parameters where they are Trace's, each once, else none."""
    offered = getattr(agent, "parameters", None)
    found = list(offered()) if callable(offered) else []
    traced = [node for node in found if hasattr(node, "_data") and hasattr(node, "py_name")]
    return list({id(node): node for node in traced}.values())


def _parameters_of(nodes: Sequence[Any]) -> Iterator[TraceParameter]:
    """Yield the nodes as parameters, named after Trace's names without the global counter."""
    taken: dict[str, int] = {}
    for node in nodes:
        base = node.name.partition(":")[0].replace("/", ".")
        taken[base] = taken.get(base, -1) + 1
        yield TraceParameter(node, base if taken[base] == 0 else f"{base}.{taken[base]}")


def _operation(node: Any) -> str:
    """Return the name of the operation that made a node, as `Router.route`."""
    return str(node.name.partition(":")[0].rpartition("<locals>.")[2])


def _describe(node: Any) -> str:
    """Return a node's description without the tag that Trace puts in front."""
    text = getattr(node, "description", None) or ""
    return text.partition("] ")[2] if text.startswith("[") and "] " in text else text
