"""The one door for agents: `as_agent` returns an agent as the library runs it; its error lists what it accepts.

as_agent(my_module)        # an instance of Module, or any callable that offers parameters()
as_agent("Classify: {ticket}", model="openai/gpt-4o-mini")
as_agent(my_function)      # keyword-only arguments, or the ParameterNodes that it reads, are its parameters
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from inspect import isawaitable, signature
from types import FunctionType
from typing import Any, overload

from aggregator.adapters.frameworks import ADAPTERS, FrameworkAgent, is_gepa_adapter, package_of
from aggregator.adapters.function import FunctionAgent, is_plain_function, variables_of
from aggregator.adapters.template import EvaluatedValues, TemplateAgent, own_verdict
from aggregator.adapters.trace import TraceAgent, is_trace_agent
from aggregator.agents.modules import Module
from aggregator.agents.parameters import ParameterNode, by_name
from aggregator.checks import is_async
from aggregator.errors import ConfigError
from aggregator.executors.work import InstanceAgent, Ran
from aggregator.guides.calling import Call
from aggregator.protocols import Agent, Parameter
from aggregator.records import Rollout, RolloutTask
from aggregator.text import placeholders, shorten

ACCEPTED = (
    "a Module; a template with a placeholder, as in 'Classify: {ticket}'; a mapping of named seed values with "
    "evaluator= (guide= of optimize); a function whose keyword-only arguments, or the ParameterNodes that it reads, "
    "are its parameters; an agent of Trace, pydantic-ai, the OpenAI Agents SDK, LangChain, LlamaIndex, ADK or CrewAI; "
    "a DSPy program; a GEPA adapter; or an object with parameters(), rollouts(tasks, guide), isolation and "
    "max_concurrency"
)
_ISOLATIONS = ("overlay", "copy", "serial")
_PARAMETER = ("name", "value", "type", "description", "constraint", "convert", "store")


def as_agent(thing: Any, *, model: Any = None, evaluator: Any = None, **options: Any) -> Agent:
    """Return an agent as the library runs it.

    `thing` is an instance of Module, or of any class that is called with an input and offers `parameters()`; a plain
    function; a prompt template, which `model` answers; a mapping of named seed values, which `evaluator(values, row)`
    scores; an agent or program of another framework (docs/frameworks.md), which may take options of its own; or an
    object of the Protocol `aggregator.protocols.Agent`. Its parameters are ParameterNodes, or objects of the Protocol
    `aggregator.protocols.Parameter`.

    Raises ConfigError for anything else; the error states what is missing.

    >>> def answer(question, *, instruction="Answer briefly."):
    ...     return f"{instruction} {question}"
    >>> as_agent(answer).parameters()[0].name
    'instruction'
    """
    agent = _of_framework(thing, options)
    if agent is not None:
        return agent
    if isinstance(thing, InstanceAgent | BatchAgent):
        return thing
    if is_plain_function(thing):
        return of_function(thing)
    if isinstance(thing, str) and placeholders(thing):
        return TemplateAgent(thing, model)
    if isinstance(thing, Mapping):
        return EvaluatedValues(thing, evaluator)
    offered = getattr(thing, "parameters", None)
    if isinstance(thing, type) or not callable(offered):
        raise _refuse(thing, ", a text without a placeholder" if isinstance(thing, str) else "")
    if is_trace_agent(thing):
        return TraceAgent(thing)
    if hasattr(thing, "rollouts"):
        agent = BatchAgent(thing)
    elif callable(thing):
        agent = CalledAgent(thing)
    else:
        raise _refuse(thing, ", which has parameters() but cannot be called")
    agent.parameters()
    return agent


@overload
def trainable(thing: None = None, /, **options: Any) -> Callable[[Callable[..., Any]], FunctionAgent]: ...
@overload
def trainable(thing: FunctionType, /, **options: Any) -> FunctionAgent: ...
@overload
def trainable(thing: Any, nodes: Sequence[Any] | None = None, /, **options: Any) -> Any: ...
def trainable(thing: Any = None, nodes: Sequence[Any] | None = None, /, **options: Any) -> Any:
    """Return an agent that can be trained, saved, loaded and used: `as_agent`, and a decorator for functions.

    Above a function it is a decorator, whose options are the initial values of keyword-only arguments:

    >>> @trainable(instruction="Name the team.", shots=3)
    ... def route(ticket, *, instruction, shots):
    ...     return f"{instruction} {ticket}"
    >>> route("a parcel"), [parameter.name for parameter in route.parameters()]
    ('Name the team. a parcel', ['instruction', 'shots'])

    For an agent or program of another framework the options are those of its adapter (docs/frameworks.md); `nodes` are
    ParameterNodes that the code of a graph reads where they cannot be found. What it returns has `save(path)`,
    `load(path)`, `applied(path)` for production and `apply(program)`. Raises ConfigError as `as_agent` does.
    """
    if thing is None:
        return partial(trainable, **options)
    if nodes is not None:
        return as_agent(thing, nodes=nodes, **options)
    if is_plain_function(thing):
        return of_function(partial(thing, **options) if options else thing)
    return as_agent(thing, **options)


def _of_framework(thing: Any, options: Mapping[str, Any]) -> Agent | None:
    """Return an object of another framework as an agent, or None for anything else."""
    package = None
    if not isinstance(thing, Module | type):  # a GEPA adapter may be a class of another framework
        package = "gepa" if is_gepa_adapter(thing) else package_of(thing)
    if package is None and options:
        raise ConfigError(
            f"Expected no other options than model and evaluator for {shorten(thing)}, got {', '.join(options)}; "
            "options belong to agents of other frameworks (docs/frameworks.md)"
        )
    if package is None:
        return None
    adapt = import_module(f"aggregator.adapters.{ADAPTERS[package]}").adapt
    known = list(signature(adapt).parameters)[1:]
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(
            f"Expected the options {', '.join(known) or '(none)'} for {type(thing).__name__}, got {', '.join(unknown)}"
        )
    agent: Agent | None = adapt(thing, **options)
    return agent


def of_function(function: Callable[..., Any]) -> FunctionAgent:
    """Return a function as an agent: with its own parameters, or without any with those of the agents that it runs.

    Agents whose candidates run on copies are left out: the function would not run the copies.
    """
    made = FunctionAgent(function)
    if made.parameters():
        return made
    hosts: dict[str, FrameworkAgent] = {}
    for name, value in variables_of(function):
        is_known = any(value is host.program for host in hosts.values())
        if not (is_known or isinstance(value, type)) and package_of(value) is not None:
            with suppress(ConfigError):  # a model or a tool, which is no agent
                host = as_agent(value)
                if isinstance(host, FrameworkAgent) and host.isolation == "overlay":
                    hosts[name] = host
    return RunsAgents(function, hosts) if hosts else made


class RunsAgents(FunctionAgent):
    """A function that runs agents of other frameworks: their texts are its parameters."""

    def __init__(self, function: Callable[..., Any], hosts: Mapping[str, FrameworkAgent]) -> None:
        super().__init__(function)
        self._hosts = list(hosts.values())
        names = [one.name for host in self._hosts for one in host.parameters()]
        for variable, host in hosts.items():
            for one in host.parameters():
                one.name = one.name if names.count(one.name) == 1 else f"{variable}.{one.name}"
        self._parameters = by_name(one for host in self._hosts for one in host.parameters())

    def __reduce__(self) -> tuple[Any, ...]:
        return of_function, (self.function,)

    @contextmanager
    def placed(self) -> Iterator[Callable[..., Any]]:
        """Yield the function, whose agents have the texts of this context."""
        with ExitStack() as stack:
            for host in self._hosts:
                stack.enter_context(host.placed())
            yield self.forward

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the function's result with the texts of this context."""
        with self.placed():
            return await super().run(task, call)


class CalledAgent(InstanceAgent):
    """An object that is called with each input: a Module, or an object of the user's own class.

    It may have `parameters()`; without them it can be evaluated, but not trained.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        self.program = program
        self._adapted: dict[int, ParameterNode[Any]] = {}

    def __repr__(self) -> str:
        return f"as_agent({self.program!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.program,)

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the program's parameters."""
        return as_parameters(self.program, self._adapted) if hasattr(self.program, "parameters") else []

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return `program(x)`: awaited if the program is async, in a thread if it is not."""
        program: Any = self.program
        if is_async(getattr(program, "forward", program)) or is_async(program):
            return Ran(output=await program(task.sample.x))
        output = await call(program, task.sample.x)
        return Ran(output=await output if isawaitable(output) else output)


class BatchAgent:
    """An object of the Protocol Agent, with parameters that prompts and overlays can use."""

    def __init__(self, agent: Agent) -> None:
        isolation = getattr(agent, "isolation", None)
        limit = getattr(agent, "max_concurrency", 0)
        if isolation not in _ISOLATIONS or not (limit is None or (type(limit) is int and limit > 0)):
            raise _refuse(
                agent,
                f", whose isolation is {isolation!r} and max_concurrency is {limit!r}; set isolation to one of "
                f"{', '.join(_ISOLATIONS)}, max_concurrency to an int or None",
            )
        self.agent = agent
        self.isolation = agent.isolation
        self.max_concurrency = agent.max_concurrency
        self._adapted: dict[int, ParameterNode[Any]] = {}

    def __repr__(self) -> str:
        return f"as_agent({self.agent!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.agent,)

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the agent's parameters."""
        return as_parameters(self.agent, self._adapted)

    def rollouts(self, tasks: Sequence[RolloutTask], guide: Any) -> AsyncIterator[tuple[int, Rollout]]:
        """Run the tasks on the agent, which scores itself without a guide."""
        return self.agent.rollouts(tasks, None if guide is own_verdict else guide)


class AdaptedParameter(ParameterNode[Any]):
    """A foreign parameter: its value is stored in its own program, and both sides check a new one."""

    def __init__(self, parameter: Parameter) -> None:
        self.origin = parameter
        self._made = False
        super().__init__(
            parameter.value,
            name=parameter.name,
            type=parameter.type,
            description=parameter.description,
            constraint=parameter.constraint,
            trainable=getattr(parameter, "trainable", True),
        )
        self._made = True

    @property
    def _stored(self) -> Any:
        return self.origin.value

    @_stored.setter
    def _stored(self, value: Any) -> None:
        if self._made:
            self.origin.store(value)

    def check(self, raw: Any, where: str) -> Any:
        """Convert to the parameter's declared type, then by its own `convert`."""
        return self.origin.convert(super().check(raw, where))


def as_parameters(owner: Any, adapted: dict[int, ParameterNode[Any]]) -> list[ParameterNode[Any]]:
    """Return `owner.parameters()` as ParameterNodes; `adapted` caches those made from other parameters.

    Raises ConfigError for anything but a ParameterNode or an object of the Protocol Parameter.
    """
    found: list[ParameterNode[Any]] = []
    for parameter in owner.parameters():
        if isinstance(parameter, ParameterNode):
            found.append(parameter)
            continue
        if missing := [name for name in _PARAMETER if not hasattr(parameter, name)]:
            raise _refuse(
                owner,
                f", whose parameters() holds {type(parameter).__name__} objects without {', '.join(missing)}; return "
                "ParameterNodes, or objects of the Protocol aggregator.protocols.Parameter",
            )
        known = adapted.get(id(parameter))
        found.append(known or adapted.setdefault(id(parameter), AdaptedParameter(parameter)))
    return found


def _refuse(thing: Any, why: str) -> ConfigError:
    """Return the error for an invalid agent: what it got and the reason, then everything that is accepted."""
    shown = thing.__name__ if isinstance(thing, type) else shorten(thing)
    kind, remedy = ("the class ", f"; make an instance, {shown}()") if isinstance(thing, type) else ("", "")
    return ConfigError(f"Expected an agent, got {kind}{shown}{why}{remedy}. An agent is {ACCEPTED}")
