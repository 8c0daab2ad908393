"""Optimizers written for Trace, unchanged, as the trainer asks them: a proposal for given rollouts, applied by us."""

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


def is_trace_optimizer(optimizer: Any) -> bool:
    """Return True if an optimizer takes feedback as Trace's do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("zero_feedback", "backward", "step"))


class _Step(Protocol):
    """What a proposal needs to know of `aggregator.training.step.Step`."""

    @property
    def number(self) -> int: ...
    @property
    def parameters(self) -> Sequence[Any]: ...


class TraceOptimizer:
    """A Trace optimizer as the trainer asks it: for a proposal, applying nothing.

    It is shown one instance, or a whole minibatch as Trace's own trainers show it: one node that all outputs lead to,
    and all feedback, by number. Each proposal works on a copy that shares nothing but the parameters and the log, so
    that proposals of one batch do not see each other (in Trace, `memory_size` lets them). What they add to the memory
    is taken over when the next step begins, in the order of the samples.
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
        self._copies: dict[Any, Any] = {}  # place in the run, sample id -> copy

    async def propose(self, rollouts: Sequence[Rollout], step: _Step) -> Proposal:
        """Return what these instances ask for; raises LLMError if the call failed."""
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
        except Exception as error:  # an optimizer of others may raise anything; for this instance that is a record
            if isinstance(error, LLMError) or ends_run(error):
                raise
            return replace(silent, error=f"{type(error).__name__}: {error}")
        values, refused = self._convert(update, step.parameters)
        return replace(silent, values=values, error="; ".join(refused) or None)

    def _step(self, optimizer: Any, rollouts: Sequence[Rollout]) -> dict[Any, Any]:
        """Run zero_feedback, backward and step, alone but for the time the model takes."""
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
            propose = getattr(optimizer, "propose", None)  # `step` of some versions applies what it proposes
            update: dict[Any, Any] = propose() if callable(propose) else optimizer.step(bypassing=True)
            if callable(project := getattr(optimizer, "project", None)):  # 0.2: a parameter's own projections
                project(update)
        return update

    def _copy(self) -> Any:
        """Return the optimizer with a memory of its own, a model that gives up the lock, no conversion of values."""
        optimizer = object.__new__(type(self.optimizer))
        vars(optimizer).update(vars(self.optimizer))  # copy.copy of some versions leaves the parameters out
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

    def __init__(self, llm: Any, lock: TraceLock) -> None:
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


def _number_lines(found: Sequence[tuple[int, Any]]) -> str:
    """Return one text as it is, and several each below the number of its sample, as Trace's trainers do."""
    if len(found) == 1:
        return str(found[0][1])
    return "\n".join(f"ID [{sample_id}]: {text}" for sample_id, text in found)


def _one_node(rollouts: Sequence[Rollout]) -> Any:
    """Return one node that the nodes in all outputs lead to; call it with the lock."""
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
