"""A function that uses prompts of MLflow's registry, as an agent whose parameters are these prompts.

    agent = RegisteredPrompts(predict, ["prompts:/greet/1"])
    result = optimize(agent, rows, guide=guide, model="openai/gpt-4o")
    agent.register()

`PromptVersion.template` returns the value of the current context, so that candidates run concurrently; everywhere else
it returns the registry's text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any

import mlflow.genai
from mlflow.entities.model_registry import PromptVersion

from aggregator.adapters.frameworks import FrameworkAgent, require_version
from aggregator.agents.parameters import ParameterNode, is_overridden, overriding
from aggregator.checks import is_async
from aggregator.errors import ConfigError
from aggregator.executors.local import LocalExecutor
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.patching import Patch, Patches
from aggregator.records import RolloutTask
from aggregator.text import placeholders, shorten


class RegisteredPrompts(FrameworkAgent):
    """`predict`, sync or async, with the prompts of these URIs as parameters.

    A mapping as input is passed as keyword arguments, as in MLflow; any other input as the only argument. Accepted
    values stay in this agent until `register()`. Raises ConfigError for a function that cannot be called, no prompts,
    and two with one name.
    """

    def __init__(self, predict: Callable[..., Any], prompts: Sequence[str]) -> None:
        require_version("mlflow", "3.12", "4")
        given: Any = predict  # annotations are not checked if this is called
        if not callable(given) or isinstance(prompts, str) or not prompts:
            raise ConfigError(
                f"Expected a function and URIs of its prompts, as in RegisteredPrompts(predict, ['prompts:/greet/1']), "
                f"got {shorten(predict)} and {prompts!r}"
            )
        self.prompts = list(prompts)
        loaded = [mlflow.genai.load_prompt(uri) for uri in prompts]
        self._configs = {one.name: one.model_config for one in loaded}
        super().__init__(predict, [prompt_parameter(one.name, as_template(one.template)) for one in loaded])
        owner = f"{PromptVersion.__module__}", f"{PromptVersion.__qualname__}.template"
        self._patches = Patches([Patch(*owner, self._wrap)])

    def _wrap(self, original: Any) -> Any:
        def template(prompt: Any) -> Any:
            parameter = self._parameters.get(prompt.name)
            if parameter is None or not is_overridden(parameter):
                return original.__get__(prompt, type(prompt))
            return copy.deepcopy(parameter.data)

        return property(template)

    def like(self, program: Any) -> RegisteredPrompts:
        """Return an agent with the same prompts around another function."""
        return RegisteredPrompts(program, self.prompts)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield the function; inside, the prompts have the values of this context."""
        values = {name: one.data for name, one in self._parameters.items()}
        self._patches.hold()
        try:
            with overriding(self._parameters.values(), values):
                yield self.program
        finally:
            self._patches.release()

    async def forward(self, x: Any) -> Any:
        """Run the function once with the current values."""
        return await self._call(x, LocalExecutor().call)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the function's result."""
        return Ran(output=await self._call(task.sample.x, call))

    async def _call(self, x: Any, call: Call) -> Any:
        def once() -> Any:
            return self.program(**x) if isinstance(x, Mapping) else self.program(x)

        with self.placed():
            found = once() if is_async(self.program) else await call(once)
            return await found if isawaitable(found) else found

    def register(self, **options: Any) -> list[Any]:
        """Register each prompt that differs from its loaded version as a new one, and return the new versions.

        `options` are those of `mlflow.genai.register_prompt`, such as `commit_message`.
        """
        made = []
        for uri, (name, parameter) in zip(self.prompts, self._parameters.items(), strict=True):
            if as_template(parameter.data) != as_template(mlflow.genai.load_prompt(uri).template):
                given = {"model_config": self._configs[name], **options}
                made.append(mlflow.genai.register_prompt(name=name, template=parameter.data, **given))
        return made


def prompt_parameter(name: str, template: str) -> ParameterNode[Any]:
    """Return a prompt as a parameter that keeps its variables: a text, or the messages of a chat with their roles."""
    variables = placeholders(template)
    try:
        messages = json.loads(template)
    except ValueError:
        messages = None
    is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    value: Any = messages if is_chat else template
    roles = [message["role"] for message in messages] if is_chat else []

    def keeps(value: Any) -> bool:
        given = [message.get("role") for message in value] if is_chat else []
        return set(placeholders(as_template(value))) == set(variables) and given == roles

    kept = f"exactly the variables {', '.join(variables)}" if variables else "no variables"
    keeps.__doc__ = f"It has {kept}" + (f", in messages of the roles {', '.join(roles)}" if is_chat else "")
    kind: Any = list[dict[str, Any]] if is_chat else str
    return ParameterNode(value, name=name, type=kind, description=f"the prompt {shorten(name)}", constraint=keeps)


def as_template(value: Any) -> str:
    """Return a prompt as MLflow's optimizers store it: a text, for a chat the JSON of its messages."""
    return value if isinstance(value, str) else json.dumps(value)
