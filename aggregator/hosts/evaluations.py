"""The base of hosts that score candidates themselves: (values, instances) in, one judged result per instance out.

MLflow, ADK and Opik each have such a function. `HostAgent` makes an agent of it, which our algorithm can train.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from aggregator.adapters.template import own_verdict
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.cassettes.lineage import lineage_at
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran, judge_run
from aggregator.llm.ledger import collecting
from aggregator.records import Rollout, RolloutTask, Sample, Scores


class Judged(Struct, frozen=True, kw_only=True):
    """A host's result for one instance: its output, score and feedback, or the error with which the agent failed."""

    output: Any = None
    score: float | None = None
    feedback: str = ""
    transcript: str = ""
    scores: Mapping[str, float] = {}
    error: Exception | None = None


Evaluate = Callable[[dict[str, Any], Sequence[Sample]], Awaitable[Sequence[Judged]]]
"""Runs a candidate's values on instances and returns one result for each, in order."""


class HostAgent(Module):
    """A host's program as an agent that scores itself: train it with `guide=None`.

    All instances of one candidate go to `evaluate` in one call. `isolation` is "copy" if the host makes a program of
    each candidate, so that calls may overlap, and "serial" if it sets values for the whole process.
    """

    max_concurrency: int | None = None
    scores_itself = True

    def __init__(
        self, parameters: Iterable[ParameterNode[Any]], evaluate: Evaluate, *, isolation: Literal["copy", "serial"]
    ) -> None:
        self._parameters = by_name(parameters)
        if not self._parameters:
            raise ConfigError("Expected texts to train, got none")
        self._evaluate = evaluate
        self.isolation: Literal["overlay", "copy", "serial"] = isolation

    def __repr__(self) -> str:
        return f"<HostAgent with parameters {', '.join(self._parameters)}>"

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter."""
        return dict(self._parameters)

    async def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        """Evaluate the tasks in one call and yield (index, rollout) for each.

        Model calls belong to the first task: a host does not distinguish them.
        """
        values = {name: one.data for name, one in self._parameters.items()} | dict(tasks[0].values)
        with lineage_at("/".join(tasks[0].lineage), tasks[0].role), collecting() as ledger:
            found = await self._evaluate(values, [task.sample for task in tasks])
        if len(found) != len(tasks):
            raise ConfigError(f"Expected a result for each of {len(tasks)} instances from the host, got {len(found)}")
        measures = {name: value / len(tasks) for name, value in ledger.measures().items()}
        for i, (task, one) in enumerate(zip(tasks, found, strict=True)):
            scores = Scores(one.score, dict(one.scores), one.feedback)
            own = guide is None or guide is own_verdict
            judge = (lambda _x, _output, _info, given=scores: given) if own else guide
            ran = Ran(output=one.output, error=one.error)
            shown = one.transcript if task.capture else ""
            with lineage_at("/".join(task.lineage), task.role):
                yield i, await judge_run(task, ran, judge, transcript=shown, measures=measures)
