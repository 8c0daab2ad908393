"""What the framework adapters share: parameters in a host's object, their values, versions, options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aggregator import ParameterNode, as_agent, trainable
from aggregator.adapters.frameworks import FrameworkAgent, HostParameter, package_of, require_version
from aggregator.errors import ConfigError, ParameterError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask


class Host:
    """A framework's object that answers with its text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def answer(self, x: object) -> str:
        return f"{self.text} {x}"


class HostAgent(FrameworkAgent):
    isolation = "copy"

    def __init__(self, program: Host) -> None:
        text = HostParameter(lambda: program.text, lambda value: setattr(program, "text", value), name="text")
        super().__init__(program, [text])

    @contextmanager
    def placed(self) -> Iterator[Host]:
        yield Host(self.parameters_dict()["text"].data)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        with self.placed() as program:
            return Ran(output=program.answer(task.sample.x))


def test_an_accepted_value_is_written_into_the_object_of_the_host() -> None:
    host = Host("hello")
    HostAgent(host).apply({"text": "good day"})
    assert host.text == "good day"


def test_values_of_a_file_apply_inside_applied_only(tmp_path: Path) -> None:
    host = Host("hello")
    agent = HostAgent(host)
    agent.apply({"text": "good day"})
    agent.save(tmp_path / "host.json")
    agent.apply({"text": "hello"})
    with agent.applied(tmp_path / "host.json") as program:
        assert program.answer("Ada") == "good day Ada"
    assert host.text == "hello"


def test_apply_writes_the_trained_values_into_another_program() -> None:
    agent, other = HostAgent(Host("trained")), Host("new")
    agent.apply(other)
    assert other.text == "trained"


@pytest.mark.parametrize(("values", "told"), [({"texts": "x"}, "text, got 'texts'"), ({"text": 7}, "Expected `str`")])
def test_applied_refuses_values_of_the_wrong_type(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ParameterError, match=told), HostAgent(Host("hello")).applied(values):
        pass


def test_a_program_without_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected a Host with a text that can be trained, got none"):
        FrameworkAgent(Host(""), [])


def test_two_parameters_with_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="a"):
        FrameworkAgent(Host(""), [ParameterNode("1", name="a"), ParameterNode("2", name="a")])


def test_an_unsupported_version_names_the_supported_ones() -> None:
    with pytest.raises(ConfigError, match=r"Expected msgspec of a version from 99 and below 100, got .*pip install"):
        require_version("msgspec", "99", "100")
    require_version("no-such-package", "1", "2")


def test_a_class_derived_from_a_class_of_a_framework_belongs_to_the_framework() -> None:
    base = type("Module", (), {"__module__": "dspy.primitives.module"})
    assert package_of(type("Mine", (base,), {})()) == "dspy"
    assert package_of(type("Agent", (), {"__module__": "google.adk.agents.llm_agent"})()) == "google.adk"
    assert package_of(type("Client", (), {"__module__": "google.genai"})()) is None
    assert package_of(ModuleType("dspy")) is None


def test_a_users_own_package_named_agents_is_not_the_agents_sdk() -> None:
    if "agents" in sys.modules:
        pytest.skip("the package agents is the SDK in this environment")
    kind = type("Router", (), {"__module__": "agents.router", "parameters": lambda _: [], "__call__": lambda *_: "x"})
    assert package_of(kind()) is None
    assert as_agent(kind()).parameters() == []


def test_nodes_without_a_framework_are_refused() -> None:
    with pytest.raises(ConfigError, match="got nodes; options belong to agents of other frameworks"):
        trainable(lambda x: x, [ParameterNode("a", name="a")])


def test_options_without_a_framework_are_refused() -> None:
    with pytest.raises(ConfigError, match="got tarin; options belong to agents of other frameworks"):
        as_agent(lambda x: x, tarin=["instructions"])


async def test_a_decorated_function_is_trained_saved_and_called(tmp_path: Path) -> None:
    @trainable(instruction="Name the team.", shots=3)
    async def route(ticket: str, *, instruction: str, shots: int) -> str:
        return f"{instruction} {shots} {ticket}"

    assert await route("parcel") == "Name the team. 3 parcel"
    route.apply({"instruction": "Route it.", "shots": 1})
    route.save(tmp_path / "route.json")
    route.apply({"instruction": "Other.", "shots": 2})
    route.load(tmp_path / "route.json")
    assert await route("parcel") == "Route it. 1 parcel"
    with route.applied({"shots": 9}) as function:
        assert await function("parcel") == "Route it. 9 parcel"


def test_a_decorated_function_keeps_its_defaults_as_seeds() -> None:
    @trainable
    def answer(x: str, *, instruction: str = "Answer briefly.") -> str:
        return f"{instruction} {x}"

    assert answer("why?") == "Answer briefly. why?"
    assert answer("why?", instruction="Answer at length.") == "Answer at length. why?"


class Greeting:
    """An object with a method as an agent."""

    def __init__(self) -> None:
        self.text = ParameterNode("hello", name="text")

    def answer(self, x: str) -> str:
        return f"{self.text.data} {x}"


def test_a_methods_object_holds_its_parameters() -> None:
    agent: Any = as_agent(Greeting().answer)
    assert [parameter.name for parameter in agent.parameters()] == ["text"]


def test_a_partials_parameters_are_found() -> None:
    def answer(text: ParameterNode[str], x: str, *, tone: ParameterNode[str]) -> str:
        return f"{text.data} {x} {tone.data}"

    made = partial(answer, ParameterNode("hello", name="text"), tone=ParameterNode("kindly", name="tone"))
    agent: Any = as_agent(made)
    assert {parameter.name for parameter in agent.parameters()} == {"text", "tone"}
