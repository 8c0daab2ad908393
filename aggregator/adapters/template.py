"""Minimal agents: a prompt template that a model answers, and named values that an evaluator scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isawaitable
from typing import Any

from aggregator.agents.parameters import ParameterNode
from aggregator.checks import accepts, is_async
from aggregator.errors import ConfigError
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.guides.calling import Call
from aggregator.llm.models import as_model
from aggregator.protocols import ChatModel
from aggregator.records import RolloutTask
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
