"""Agents and optimizers written for Trace, unchanged, in our training loop.

Trace keeps feedback on nodes that all instances share, and its registries are global, so only one instance at a time
may be inside it. One lock is held around a forward pass and around zero_feedback -> backward -> step, and given up
while the optimizer's model is awaited: the slow part of all instances runs at once, the rest never mixes. Nothing is
imported from Trace; what belongs to it is told by what it offers.

Forward passes of a Trace agent follow one another, since a traced operation reads and writes the registries all along.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from msgspec.structs import replace

from aggregator.agents.code import check_source, plain_source
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.cassettes.lineage import current_lineage, lineage, natural
from aggregator.errors import ConfigError, LLMError, ParameterError, ends_run
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.guides.calling import Call
from aggregator.protocols import Agent
from aggregator.records import Proposal, Rollout, RolloutTask


class YieldingLock:
    """Held around what reads or writes Trace's shared state; `released()` inside lets the others go on meanwhile.

    The holder finds the values it asked for on the nodes, and Trace's global registries as they were when it
    first came, however many others came between: names in its graph do not count what others made.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def hold(self, values: Mapping[Any, Any]) -> Iterator[None]:
        """Hold the lock; `values` (node -> data) are on the nodes for so long."""
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
        """Return registries of one's own that begin with what is in these."""
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


MOST_THREADS = 64

_CODE = "__code"
_MEMORIES = ("memory", "buffer")  # OptoPrime's and OPRO's
_SHARED = ("parameters", "log", "summary_log")


def as_optimizer(optimizer: Any, agent: Agent) -> Any:
    """Return an optimizer as the trainer asks it: one of Trace is wrapped, any other stays as it is.

    Raises ConfigError for an optimizer of Trace with an agent that is none of Trace's.
    """
    if not is_trace_optimizer(optimizer):
        return optimizer
    if isinstance(agent, TraceAgent):
        return TraceOptimizer(optimizer, agent)
    kind = type(getattr(agent, "program", agent)).__name__
    raise ConfigError(
        f"Expected an agent with parameters of Trace for {type(optimizer).__name__}, got {kind}; "
        "use LLMOptimizer for it"
    )


def is_trace_agent(agent: Any) -> bool:
    """Return True if an agent offers parameters of Trace."""
    return bool(_nodes_of(agent))


def is_trace_optimizer(optimizer: Any) -> bool:
    """Return True if an optimizer takes feedback as Trace's do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("zero_feedback", "backward", "step"))


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

    def check(self, raw: Any, where: str) -> Any:
        """Convert and check a value; source code must also parse, compile, and keep name and signature."""
        value = super().check(raw, where)
        if self.is_code and value != self.written:
            value = plain_source(value)
            check_source(value, like=plain_source(self.written), where=where)
        return value


class TraceAgent(Module, InstanceAgent):
    """A Trace agent as the library runs it: one instance at a time inside Trace, and the guide sees plain data."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.lock = YieldingLock()
        self.threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="aggregator-trace")
        self._parameters = by_name(_parameters_of(_nodes_of(agent)))

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter; names are Trace's, without its counters."""
        return dict(self._parameters)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Run the agent in a thread, under the values that this context reads; its node is kept for the optimizer."""
        try:
            output = await self.in_thread(self._run, task.sample.x)
        except Exception as error:  # noqa: BLE001 - an agent may raise anything, and Trace says where feedback starts
            return Ran(error=error, handle=getattr(error, "exception_node", None))
        return Ran(output=getattr(output, "data", output), handle=output)

    def _run(self, x: Any) -> Any:
        with self.inside():
            return self.agent(x)

    def inside(self) -> AbstractContextManager[None]:
        """Hold the lock, with the values on the nodes that this context reads."""
        return self.lock.hold({parameter.node: parameter.data for parameter in self._parameters.values()})  # type: ignore[attr-defined]

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread of our own, with this context's variables."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: context.run(function, *args))


class _Step(Protocol):
    """What a proposal needs to know of `aggregator.training.step.Step`."""

    @property
    def number(self) -> int: ...
    @property
    def parameters(self) -> Sequence[Any]: ...


class TraceOptimizer:
    """A Trace optimizer as the trainer asks it: for one instance's proposal, applying nothing.

    Each proposal works on a copy that shares nothing but the parameters and the log, so that proposals of one batch do
    not see each other (in Trace, `memory_size` lets them). What they add to the memory is taken over when the next step
    begins, in the order of the samples.
    """

    takes_batches = False

    def __init__(self, optimizer: Any, agent: TraceAgent) -> None:
        self.optimizer = optimizer
        self.agent = agent
        known = {id(parameter.node): parameter for parameter in agent.parameters()}  # type: ignore[attr-defined]
        missing = [node.name for node in optimizer.parameters if id(node) not in known]
        if missing:
            raise ConfigError(
                f"Expected an optimizer of the agent's own parameters, got {', '.join(missing)} beside them"
            )
        self.parameters: list[Any] = [known[id(node)] for node in optimizer.parameters]
        self._step_of_memories: int | None = None
        self._copies: dict[Any, Any] = {}  # place in the run, sample id -> copy

    async def propose(self, rollouts: Sequence[Rollout], step: _Step) -> Proposal:
        """Return what this instance asks for; raises LLMError if the call failed."""
        (rollout,) = rollouts
        silent = Proposal(score=rollout.score, feedback=rollout.feedback, sample_ids=(rollout.sample_id,))
        if not hasattr(rollout.handle, "parents"):
            reason = "the output is not one node of Trace, so no feedback can reach the parameters"
            return replace(silent, error=reason)
        self._take_over_memories(step)
        optimizer = self._copy()
        self._copies[natural(current_lineage()), rollout.sample_id] = optimizer
        try:
            with lineage("propose", role="optimizer"):
                update = await self.agent.in_thread(self._step, optimizer, rollout.handle, rollout.feedback)
        except Exception as error:  # an optimizer of others may raise anything; for this instance that is a record
            if isinstance(error, LLMError) or ends_run(error):
                raise
            return replace(silent, error=f"{type(error).__name__}: {error}")
        values, refused = self._convert(update, step.parameters)
        return replace(silent, values=values, error="; ".join(refused) or None)

    def _step(self, optimizer: Any, node: Any, feedback: str) -> dict[Any, Any]:
        """Run zero_feedback, backward and step for one instance, alone but for the time its model takes."""
        with self.agent.inside():
            optimizer.zero_feedback()
            optimizer.backward(node, feedback)
            propose = getattr(optimizer, "propose", None)  # `step` of some versions applies what it proposes
            update: dict[Any, Any] = propose() if callable(propose) else optimizer.step(bypassing=True)
            optimizer.zero_feedback()
        return update

    def _copy(self) -> Any:
        """Return the optimizer with a memory of its own, a model that gives up the lock, no conversion of values."""
        optimizer = copy.copy(self.optimizer)
        for name, value in vars(self.optimizer).items():
            if name in _MEMORIES or (isinstance(value, list) and name not in _SHARED):
                setattr(optimizer, name, _copy_of(value))
        if hasattr(optimizer, "llm"):
            optimizer.llm = _Yielding(optimizer.llm, self.agent.lock)
        if hasattr(optimizer, "construct_update_dict"):  # Trace's guesses at types: ours are asked instead
            optimizer.construct_update_dict = lambda suggestion: {
                node: suggestion[node.py_name]
                for node in optimizer.parameters
                if node.trainable and node.py_name in suggestion
            }
        return optimizer

    def _take_over_memories(self, step: _Step) -> None:
        """Once per step, add what each proposal of the step before remembered, in the order of the samples."""
        if self._step_of_memories == step.number:
            return
        for name in (name for name in _MEMORIES if hasattr(self.optimizer, name)):
            memory = getattr(self.optimizer, name)
            before = list(memory)
            for place in sorted(self._copies):
                after = list(getattr(self._copies[place], name))
                if after and list(map(id, after)) != list(map(id, before)):  # a step that failed early added nothing
                    _remember(memory, after[-1])
        self._copies = {}
        self._step_of_memories = step.number

    def _convert(self, update: dict[Any, Any], parameters: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the values that fit their parameters, and why the others do not."""
        values: dict[str, Any] = {}
        refused = []
        for parameter in parameters:
            if parameter.node in update:
                try:
                    value = parameter.convert(update[parameter.node])
                except ParameterError as error:
                    refused.append(str(error))
                    continue
                if value != parameter.data:
                    values[parameter.name] = value
        return values, refused


class _Yielding:
    """A model that lets other instances into Trace while it is asked."""

    def __init__(self, llm: Any, lock: YieldingLock) -> None:
        self._llm = llm
        self._lock = lock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock.released():
            return self._llm(*args, **kwargs)

    def create(self, *args: Any, **kwargs: Any) -> Any:
        """Ask, under the other name that Trace has for it."""
        with self._lock.released():
            return getattr(self._llm, "create", self._llm)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _copy_of(value: Any) -> Any:
    """Return a copy that can be added to without the original; what is in it stays the same."""
    copied = copy.copy(value)
    if isinstance(value, list):
        return copied
    for name, content in vars(copied).items():
        if isinstance(content, list):
            setattr(copied, name, list(content))
    return copied


def _remember(memory: Any, entry: Any) -> None:
    """Add to a list, or to one of Trace's buffers."""
    (memory.add if hasattr(memory, "add") else memory.append)(entry)


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


def _describe(node: Any) -> str:
    """Return a node's description without the tag that Trace puts in front."""
    text = getattr(node, "description", None) or ""
    return text.partition("] ")[2] if text.startswith("[") and "] " in text else text
