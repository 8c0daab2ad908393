"""`as_agent`, the one door for agents: what it accepts, and its error for anything else."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

import pytest
from msgspec import Meta

from aggregator.adapters.agents import as_agent
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, overriding, read, write
from aggregator.errors import ConfigError, ParameterError
from aggregator.executors.work import AgentWork
from aggregator.records import RolloutTask, Sample

GREETING = ParameterNode("hello", description="how to begin")
CLIENT = object()
MARKS = [ParameterNode("!", name="mark")]


def greet(x: str, *, times: Annotated[int, Meta(ge=1, le=3)] = 1, tone: str | None = None, client: Any = CLIENT) -> str:
    return f"{opening()} {x}{MARKS[0].data * times}{tone or ''}"


def opening() -> str:
    return GREETING.data


async def later(x: str, *, prompt: str = "say") -> str:
    await asyncio.sleep(0)
    return f"{prompt} {x}"


async def output(agent: Any, x: Any, **values: Any) -> Any:
    return (await AgentWork(agent, None)(RolloutTask(sample=Sample(0, x), values=values))).output


async def test_a_plain_function_was_refused() -> None:
    """Its keyword-only arguments are parameters, typed by the signature; so are the ParameterNodes that it reads."""
    agent = as_agent(greet)
    assert read(agent.parameters()) == {"times": 1, "tone": None, "mark": "!", "GREETING": "hello"}  # type: ignore[arg-type]
    assert await output(agent, "Ada") == "hello Ada!"
    assert await output(agent, "Ada", times=2, GREETING="bye") == "bye Ada!!"
    with pytest.raises(ParameterError, match="<= 3"):
        write(agent.parameters(), {"times": 9})  # type: ignore[arg-type]


async def test_an_accepted_value_changes_the_function() -> None:
    """Later callers of the function get the trained values."""

    def shout(x: str, *, mark: str = "!") -> str:
        return x + mark

    agent = as_agent(shout)
    with overriding(agent.parameters(), {"mark": "."}):  # type: ignore[arg-type]
        assert shout("a") == "a!"
    write(agent.parameters(), {"mark": "?"})  # type: ignore[arg-type]
    assert shout("a") == "a?"


async def test_async_functions_methods_and_partials() -> None:
    """They are called unchanged."""

    class Greeter:
        def greet(self, x: str, *, word: str = "hi") -> str:
            return f"{word} {x}"

    assert await output(as_agent(later), "it", prompt="write") == "write it"
    assert await output(as_agent(Greeter().greet), "Ada", word="yo") == "yo Ada"
    bound = partial(later, prompt="sing")
    agent = as_agent(bound)
    assert await output(agent, "it") == "sing it"
    write(agent.parameters(), {"prompt": "hum"})  # type: ignore[arg-type]
    assert await bound("it") == "hum it"


async def test_a_parameter_as_the_default_of_an_argument() -> None:
    """The function reads `.data` itself, so the argument is not a parameter."""
    node = ParameterNode("hi")

    def greet(x: str, *, word: ParameterNode[str] = node) -> str:
        return f"{word.data} {x}"

    agent = as_agent(greet)
    assert agent.parameters() == [node]
    assert await output(agent, "Ada", word="yo") == "yo Ada"


@pytest.mark.parametrize("function", [lambda: 1, lambda x, *, k: k, lambda x, y: x])
def test_a_function_that_cannot_be_an_agent(function: Any) -> None:
    """It is refused with the signature that it needs."""
    with pytest.raises(ConfigError, match="Expected a function of one input whose keyword-only arguments have"):
        as_agent(function)


class Predict:
    """A part of a framework's program, which is not one of our parameters."""


class Program:
    """A program like DSPy's: it is called, and its parameters() are something else."""

    def parameters(self) -> list[Predict]:
        return [Predict()]

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Program(), r"got <.*Program>, whose parameters\(\) holds Predict objects without name, value, type"),
        (Program, "got the class Program"),
        (len, "got <built-in function len>"),
        ("agent", "got 'agent', a text without a placeholder"),
        (object(), "got <object>"),
    ],
)
def test_a_program_passed_as_an_agent_failed_in_training(thing: Any, message: str) -> None:
    """DSPy's programs have `parameters()` too: the error lists what is accepted, and what this one lacks."""
    with pytest.raises(
        ConfigError, match=rf"Expected an agent, {message}.* An agent is a Module; a template with a placeholder"
    ):
        as_agent(thing)


class Setting:
    """A framework's parameter: it has the Protocol's methods and is not a ParameterNode."""

    name = "temperature"
    type = float
    description = "how bold"
    constraint = None

    def __init__(self, program: dict[str, Any]) -> None:
        self.program = program

    @property
    def value(self) -> float:
        return float(self.program["temperature"])

    def convert(self, raw: Any) -> Any:
        if raw > 2:
            raise ParameterError("Expected at most 2, got more")
        return raw

    def store(self, value: float) -> None:
        self.program["temperature"] = value


class Foreign:
    """An agent with its own class of parameters."""

    def __init__(self) -> None:
        self.program = {"temperature": 0.5}
        self.settings = [Setting(self.program)]

    def parameters(self) -> list[Setting]:
        return self.settings

    def __call__(self, x: Any) -> Any:
        return x


def test_foreign_parameters_are_typed_checked_and_written_back() -> None:
    """Both sides check a value, and an accepted one is written to its program."""
    foreign = Foreign()
    agent = as_agent(foreign)
    (node,) = agent.parameters()
    assert node is agent.parameters()[0]
    assert node.convert("0.75") == 0.75
    with pytest.raises(ParameterError, match="Expected at most 2"):
        node.convert(3.0)
    write([node], {"temperature": "1"})  # type: ignore[list-item]
    assert foreign.program == {"temperature": 1.0}


@pytest.mark.parametrize(("isolation", "limit"), [("none", None), (None, None), ("copy", 0), ("copy", True)])
def test_a_batch_agent_must_declare_its_isolation(isolation: Any, limit: Any) -> None:
    """Without it candidates' values would mix, so the agent is refused."""

    class Batches(Foreign):
        def rollouts(self, tasks: Any, guide: Any) -> Any: ...

    agent = Batches()
    agent.isolation, agent.max_concurrency = isolation, limit  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="set isolation to one of overlay, copy, serial"):
        as_agent(agent)


def test_a_module_is_returned_unchanged() -> None:
    """It has its own parameters, and a second `as_agent` changes nothing."""

    class Empty(Module):
        def forward(self, x: Any) -> Any:
            return x

    agent = as_agent(Empty())
    assert agent.parameters() == []
    assert as_agent(agent) is agent
