"""Optimizers written for Trace, unchanged, in our trainer: they propose for given rollouts, and we apply."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from aggregator.adapters.trace import (
    TraceAgent,
    TraceLock,
    graph_of,
    is_node,
    join,
    nodes_in,
    plain_data,
    require_trace,
)
from aggregator.cassettes.lineage import current_lineage, lineage, natural
from aggregator.errors import ConfigError, LLMError, ParameterError, ends_run
from aggregator.protocols import Agent
from aggregator.records import Proposal, Rollout

_MEMORIES = ("memory", "buffer")  # OptoPrime's and OPRO's
_SHARED = ("parameters", "log", "summary_log")


def as_optimizer(optimizer: Any, agent: Agent) -> Any:
    """Return an optimizer for the trainer: one of Trace is wrapped, any other is returned unchanged.

    Raises ConfigError for a Trace optimizer with an agent that is not Trace's.
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


def is_trace_optimizer(optimizer: Any) -> bool:
    """Return True if an optimizer accepts feedback as Trace's do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("zero_feedback", "backward", "step"))


class _Step(Protocol):
    """The fields of `aggregator.training.step.Step` that a proposal needs."""

    @property
    def number(self) -> int: ...
    @property
    def parameters(self) -> Sequence[Any]: ...


class TraceOptimizer:
    """A Trace optimizer in our trainer: it proposes, and applies nothing.

    It gets one instance, or a whole minibatch as in Trace's own trainers: one node with all outputs as parents, and all
    feedback, by number. Each proposal uses a copy that shares only the parameters and the log, so that proposals of one
    batch do not see each other (in Trace, `memory_size` lets them). Their additions to the memory are merged when the
    next step begins, in the order of the samples.
    """

    def __init__(self, optimizer: Any, agent: TraceAgent) -> None:
        require_trace()
        self.optimizer = optimizer
        self.agent = agent
        known = {id(parameter.node): parameter for parameter in agent.parameters()}  # type: ignore[attr-defined]
        missing = [node.name for node in optimizer.parameters if id(node) not in known]
        if missing:
            raise ConfigError(
                f"Expected an optimizer of the agent's own parameters, got {', '.join(missing)} as well; give "
                "it agent.parameters()"
            )
        self.parameters: list[Any] = [known[id(node)] for node in optimizer.parameters]
        self._step_of_memories: int | None = None
        self._copies: dict[Any, Any] = {}  # lineage, sample id -> copy

    async def propose(self, rollouts: Sequence[Rollout], step: _Step) -> Proposal:
        """Return these instances' proposal; raises LLMError if the call failed."""
        seen = [rollout for rollout in rollouts if next(nodes_in(rollout.handle), None)]
        scores = [rollout.score for rollout in rollouts if rollout.score is not None]
        silent = Proposal(
            score=sum(scores) / len(scores) if scores else None,
            feedback=_number_lines([(rollout.sample_id, rollout.feedback) for rollout in rollouts]),
            sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        )
        if not seen:
            reason = "the output holds no node of Trace, so no feedback can reach the parameters"
            return replace(silent, error=reason)
        self._take_over_memories(step)
        optimizer = self._copy()
        self._copies[natural(current_lineage()), silent.sample_ids] = optimizer
        try:
            with lineage("propose", role="optimizer"):
                update = await self.agent.in_thread(self._step, optimizer, seen)
        except Exception as error:  # a foreign optimizer may raise anything; for this instance that is a record
            if isinstance(error, LLMError) or ends_run(error):
                raise
            return replace(silent, error=f"{type(error).__name__}: {error}")
        values, refused = self._convert(update, step.parameters)
        return replace(silent, values=values, error="; ".join(refused) or None)

    def _step(self, optimizer: Any, rollouts: Sequence[Rollout]) -> dict[Any, Any]:
        """Run zero_feedback, backward and step under the lock, which is released during model calls."""
        feedback = _number_lines([(rollout.sample_id, rollout.feedback) for rollout in rollouts])
        visit = self.agent.visit()
        with self.agent.lock.hold(visit):
            target = rollouts[0].handle
            if len(rollouts) > 1 or not is_node(target):
                target = _one_node(rollouts)
                visit.rename(graph_of([*(parameter.node for parameter in self.parameters), target]))
            visit.show_without_addresses(graph_of([target]))
            optimizer.zero_feedback()
            # The graph is kept: several proposals may be made from one rollout.
            optimizer.backward(target, feedback, **({"retain_graph": True} if hasattr(target, "_backwarded") else {}))
            propose = getattr(optimizer, "propose", None)  # `step` of some versions applies its proposal
            update: dict[Any, Any] = propose() if callable(propose) else optimizer.step(bypassing=True)
            if callable(project := getattr(optimizer, "project", None)):  # 0.2: a parameter's own projections
                project(update)
        return update

    def _copy(self) -> Any:
        """Return the optimizer with its own memory, a model that releases the lock, and no conversion of values."""
        optimizer = object.__new__(type(self.optimizer))
        vars(optimizer).update(vars(self.optimizer))  # copy.copy of some versions leaves the parameters out
        for name, value in vars(self.optimizer).items():
            if name in _MEMORIES or (isinstance(value, list) and name not in _SHARED):
                setattr(optimizer, name, _copy_of(value))
        if hasattr(optimizer, "llm"):
            optimizer.llm = _Yielding(optimizer.llm, self.agent.lock)
        if hasattr(optimizer, "construct_update_dict"):  # replaces Trace's guesses at types by ours
            optimizer.construct_update_dict = lambda suggestion: {
                node: suggestion[node.py_name]
                for node in optimizer.parameters
                if node.trainable and node.py_name in suggestion
            }
        return optimizer

    def _take_over_memories(self, step: _Step) -> None:
        """Once per step, merge the memories of the previous step's proposals, in the order of the samples."""
        if self._step_of_memories == step.number:
            return
        for name in (name for name in _MEMORIES if hasattr(self.optimizer, name)):
            memory = getattr(self.optimizer, name)
            add = getattr(memory, "add", None) or memory.append  # one of Trace's buffers, or a list
            before = list(memory)
            for place in sorted(self._copies):
                after = list(getattr(self._copies[place], name))
                if after and list(map(id, after)) != list(map(id, before)):  # a step that failed early added nothing
                    add(after[-1])
        self._copies = {}
        self._step_of_memories = step.number

    def _convert(self, update: dict[Any, Any], parameters: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the valid values, and the reasons against the others."""
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
    """A model that lets other instances into Trace during its calls."""

    def __init__(self, llm: Any, lock: TraceLock) -> None:
        self._llm = llm
        self._lock = lock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock.released():
            return self._llm(*args, **kwargs)

    def create(self, *args: Any, **kwargs: Any) -> Any:
        """Call, under Trace's other name for it."""
        with self._lock.released():
            return getattr(self._llm, "create", self._llm)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _copy_of(value: Any) -> Any:
    """Return a copy that can be extended without changing the original."""
    copied = copy.copy(value)
    if isinstance(value, list):
        return copied
    for name, content in vars(copied).items():
        if isinstance(content, list):
            setattr(copied, name, list(content))
    return copied


def _number_lines(found: Sequence[tuple[int, Any]]) -> str:
    """Return one text unchanged, and several under the numbers of their samples, as Trace's trainers do."""
    if len(found) == 1:
        return str(found[0][1])
    return "\n".join(f"ID [{sample_id}]: {text}" for sample_id, text in found)


def _one_node(rollouts: Sequence[Rollout]) -> Any:
    """Return one node with the nodes of all outputs as parents; call it with the lock held."""
    several = len(rollouts) > 1
    nodes: dict[str, Any] = {}
    for i, rollout in enumerate(rollouts):
        for where, node in nodes_in(rollout.handle, f"output_{i}" if several else "output"):
            nodes[f"{where}_{len(nodes)}" if where in nodes else where] = node
    plain = [(rollout.sample_id, plain_data(rollout.handle)) for rollout in rollouts]
    if not several:
        return join(nodes, plain[0][1], name="output", description="[output] The output, made of these parts.")
    description = "[batch] The outputs of all instances, by their number."
    return join(nodes, _number_lines(plain), name="batch", description=description)
