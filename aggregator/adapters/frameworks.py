"""The common base of framework adapters: parameters stored in a host's object, and setting trained values.

An adapter is a file here with a function `adapt(thing, **options)`, which returns a `FrameworkAgent`, or None for an
object that is not the framework's. `ADAPTERS` names its package; `as_agent` imports the file for an object whose class
comes from that package.

    class Greeter(FrameworkAgent):
        def __init__(self, program):
            text = HostParameter(lambda: program.text, lambda value: setattr(program, "text", value), name="text")
            super().__init__(program, [text])

        async def run(self, task, call):
            with self.placed() as program:
                return Ran(output=await program.answer(task.sample.x))
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from os import PathLike
from typing import Any

from aggregator.agents.modules import Module, read_artefact
from aggregator.agents.parameters import ParameterNode, by_name, overriding
from aggregator.agents.transcripts import Group, LLMCall, current_transcript
from aggregator.errors import ConfigError, ParameterError
from aggregator.executors.work import InstanceAgent
from aggregator.records import Completion

ADAPTERS = {
    "crewai": "crewai",
    "dspy": "dspy",
    "gepa": "gepa",
    "google.adk": "adk",
    "langchain": "langchain",
    "langchain_core": "langchain",
    "langgraph": "langchain",
    "llama_index": "llama_index",
    "agents": "openai_agents",
    "pydantic_ai": "pydantic_ai",
}
"""Package of a framework -> the file in this room that adapts its objects."""

MARKS = {"agents": "Runner"}
"""Package with an ambiguous name -> a name that the framework's own package defines."""


class HostParameter(ParameterNode[Any]):
    """A parameter whose value is stored in an object of another framework.

    `read()` returns the value, `write(value)` changes the host's object; the options are those of ParameterNode.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], *, name: str, **options: Any) -> None:
        self._read, self._write, self._is_made = read, write, False
        super().__init__(read(), name=name, **options)
        self._is_made = True

    @property
    def _stored(self) -> Any:
        return self._read()

    @_stored.setter
    def _stored(self, value: Any) -> None:
        if self._is_made:
            self._write(value)


class FrameworkAgent(Module, InstanceAgent):
    """An object of another framework as an agent: the base class of adapters, which add `run` and, if needed, `placed`.

    `program` is the host's object. Accepted values are written to it, so it becomes the trained program. `isolation` is
    "overlay" if the host reads its texts when it runs, "copy" if each candidate runs on a copy that `placed` makes, and
    "serial" if neither is possible. Raises ConfigError for two parameters with one name, and for a program without any.
    """

    def __init__(self, program: Any, parameters: Iterable[ParameterNode[Any]]) -> None:
        self.program = program
        self._parameters = by_name(parameters)
        if not self._parameters:
            kind = type(program).__name__
            article = "an" if kind[0] in "AEIOU" else "a"
            raise ConfigError(
                f"Expected {article} {kind} with a text that can be trained, got none; give it instructions, or read a "
                "ParameterNode in the function that returns them"
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} with parameters {', '.join(self._parameters)}>"

    def parameters_dict(self) -> dict[str, ParameterNode[Any]]:
        """Return name -> parameter."""
        return dict(self._parameters)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield the program with the values of this context: the host's own object, or a copy.

        An adapter whose host does not read the parameters itself sets them here.
        """
        yield self.program

    @contextmanager
    def applied(self, values: str | PathLike[str] | Mapping[str, Any]) -> Iterator[Any]:
        """Yield the program with trained values: those of a file written by `save`, or values by name.

        The values apply in this context only, so that requests with different values can be served concurrently. Raises
        ParameterError for an invalid file or value.

        with agent.applied("support.json") as program:
            print((await program.run("Where is my parcel?")).output)
        """
        given = values if isinstance(values, Mapping) else read_artefact(values).parameters
        if unknown := [name for name in given if name not in self._parameters]:
            raise ParameterError(
                f"Expected values of the parameters {', '.join(self._parameters)}, got {', '.join(map(repr, unknown))}"
            )
        chosen = [self._parameters[name] for name in given]
        converted = {parameter.name: parameter.check(given[parameter.name], parameter.name) for parameter in chosen}
        with overriding(chosen, converted), self.placed() as program:
            yield program

    def apply(self, values: Any, *, which: str = "") -> None:
        """Store values in the parameters of these names, or store this agent's values in another program.

        `agent.apply(result.best_parameters)` changes this agent. `agent.apply(program)` writes the current values to
        another object of the framework with the same parameters.
        """
        if isinstance(values, Mapping):
            super().apply(values, which=which)
            return
        self.like(values).apply({name: parameter.data for name, parameter in self._parameters.items()}, which=which)

    def like(self, program: Any) -> FrameworkAgent:
        """Return an agent with the same options around another program."""
        kind: Any = type(self)
        agent: FrameworkAgent = kind(program)  # an adapter with options overrides `like`
        return agent


class Calls:
    """Model calls that a framework reports during a rollout, shown in its transcript.

    A call is shown once: nothing is added if `clients=`, or our own model, shows the calls as they are made.
    """

    def __init__(self) -> None:
        self._seen = current_transcript()
        self._own: list[LLMCall] = []

    def start(self, messages: Any) -> LLMCall:
        """Take the slot of a call before it is sent, with its messages in OpenAI's shape."""
        call = LLMCall(messages) if self._seen is None else self._seen.llm_call(messages)
        self._own.append(call)
        return call

    def end(self, call: LLMCall, completion: Completion) -> None:
        """Record the answer, or free the slot if the call is shown already."""
        call.finish(completion)
        if self._seen is not None and any(one not in self._own for one, _ in _calls_in(self._seen.root)):
            for one, group in list(_calls_in(self._seen.root)):
                if one is call:
                    group.items.remove(call)

    def write(self, calls: Iterable[tuple[Any, Completion]]) -> None:
        """Record calls that have ended, such as those of a message history."""
        for messages, completion in calls:
            self.end(self.start(messages), completion)


def _calls_in(group: Group) -> Iterator[tuple[LLMCall, Group]]:
    for item in group.items:
        if isinstance(item, LLMCall):
            yield item, group
        else:
            yield from _calls_in(item)


def require_version(distribution: str, at_least: str, below: str, *, version: str | None = None) -> None:
    """Raise ConfigError unless a package has a supported version; one without metadata is accepted.

    `version` is the imported package's own version, if known; by default the installed one.

    >>> require_version("msgspec", "0.1", "99")
    """
    try:
        version = version or metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return
    if not _numbers(at_least) <= _numbers(version) < _numbers(below):
        raise ConfigError(
            f"Expected {distribution} of a version from {at_least} and below {below}, got {version}; install one: pip "
            f"install '{distribution}>={at_least},<{below}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def is_gepa_adapter(thing: Any) -> bool:
    """Return True for an object of any class with the two methods of GEPA's adapter protocol."""
    methods = (getattr(thing, "evaluate", None), getattr(thing, "make_reflective_dataset", None))
    return not isinstance(thing, type) and all(map(callable, methods))


def package_of(thing: Any, packages: Collection[str] = ADAPTERS) -> str | None:
    """Return the package among these that defines an object's class or one of its base classes, or None.

    >>> package_of(ConfigError("x"), {"aggregator.errors", "dspy"})
    'aggregator.errors'
    """
    for kind in (thing if isinstance(thing, type) else type(thing)).__mro__:
        parts = kind.__module__.split(".")
        for end in range(len(parts), 0, -1):
            package = ".".join(parts[:end])
            is_it = package not in MARKS or hasattr(sys.modules.get(package), MARKS[package])
            if package in packages and is_it:
                return package
    return None
