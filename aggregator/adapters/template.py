"""Agents without code: a prompt template that a model answers, and values that a function or a host scores.

MLflow, ADK and Opik each have a function that runs a candidate's values on instances; `HostAgent` makes an agent of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Literal

from msgspec import Struct

from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.cassettes.lineage import lineage_at
from aggregator.checks import accepts, is_async
from aggregator.errors import ConfigError
from aggregator.executors.work import InstanceAgent, Ran, judge_run
from aggregator.guides.calling import Call
from aggregator.llm.ledger import collecting
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import Rollout, RolloutTask, Sample, Scores
from aggregator.text import fill, placeholders, shorten


class TemplateAgent(InstanceAgent):
    """A prompt template, which is the only parameter, `prompt`: a model answers it for each row.

    The placeholders (`{ticket}`, `{{ticket}}` or `$ticket`) are filled from the row's columns; a row that is not a
    mapping fills the only placeholder. `model` is anything that `as_model` accepts; None is the default model. Raises
    ConfigError for a text without a placeholder, which could not depend on its input.
    """

    def __init__(self, template: str, model: Any = None, *, max_tokens: int | None = None) -> None:
        if not placeholders(template):
            raise ConfigError(
                f"Expected a template with a placeholder, as in 'Classify: {{ticket}}', got {shorten(template)}"
            )
        self.prompt = ParameterNode(template, name="prompt", description="the prompt template of the agent")
        self.model: ChatModel = as_model(model)
        self.max_tokens = max_tokens

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the template."""
        return [self.prompt]

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the text of the model's answer."""
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        message = {"role": "user", "content": fill(self.prompt.data, task.sample.x)}
        return Ran(output=(await self.model.complete([message], **limit)).text)


class EvaluatedValues(InstanceAgent):
    """Named values that a function scores row by row, for programs without an agent.

    `evaluator(values, row)`, sync or async, returns a score, or (score, feedback). It gets plain values by name. It is
    the agent and its guide in one: train it with the guide `own_verdict`. Raises ConfigError for a mapping without
    names, and an evaluator that does not take two arguments.
    """

    def __init__(self, values: Mapping[str, Any], evaluator: Callable[[dict[str, Any], Any], Any]) -> None:
        if not values or {type(name) for name in values} != {str} or "" in values:
            raise ConfigError(
                f"Expected named seed values, as in {{'prompt': 'Answer briefly.'}}, got {shorten(values)}"
            )
        if not accepts(evaluator, {}, None):
            raise ConfigError(
                f"Expected an evaluator (values, row) -> score or (score, feedback) for named values, got "
                f"{shorten(evaluator)}; write it as in def judge(values, row): ..."
            )
        self.evaluator = evaluator
        self._parameters = [
            value if isinstance(value, ParameterNode) else ParameterNode(value, name=name)
            for name, value in values.items()
        ]

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return a parameter for each named value."""
        return list(self._parameters)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the evaluator's result."""
        values = {parameter.name: parameter.data for parameter in self._parameters}
        if is_async(self.evaluator):
            return Ran(output=await self.evaluator(values, task.sample.x))
        verdict = await call(self.evaluator, values, task.sample.x)
        return Ran(output=await verdict if isawaitable(verdict) else verdict)


def own_verdict(x: Any, output: Any, info: Any) -> Any:
    """Return an evaluator's verdict: the guide of `EvaluatedValues`."""
    return output


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
