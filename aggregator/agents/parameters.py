"""ParameterNode: a named, typed, described value that training may change.

Reading a value asks the overrides of the current context first, so candidates are tried concurrently and side by side
(`overriding`) while the stored values stay as they are; `write` is the one lasting mutation, and it is all or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from aggregator.agents import values as typed_values
from aggregator.agents.values import SCALARS, Unfit, snapshot
from aggregator.errors import ConfigError, ParameterError
from aggregator.text import shorten

if TYPE_CHECKING:
    from aggregator.agents.bundles import Operation
    from aggregator.records import Values

T = TypeVar("T")
Constraint = str | Callable[[Any], bool] | None
"""What a value must satisfy beyond its type: words for the optimizer, or a predicate."""

UNNAMED = "parameter"

CODE = "__code"
"""What follows an operation's name in the name of the parameter that holds its source."""

_overrides: ContextVar[Mapping[ParameterNode[Any], Any]] = ContextVar("aggregator_overrides")
_NOTHING: Mapping[Any, Any] = {}


class ParameterNode(Generic[T]):
    """A value that training may change, with the type, description and constraint that a new value must meet.

    `type` defaults to the value's own (`["a"]` is a list[str]); `Annotated[float, Meta(ge=0, le=1)]` adds bounds.
    `name` defaults to the attribute path from the module that was asked for its parameters, such as "retriever.k".
    `constraint` is text for the optimizer, or a predicate: a new value for which it returns False or raises ValueError
    is refused. `trainable=False` keeps the value out of training; it is still saved and loaded if JSON can carry it.
    `demonstrations=True` marks worked examples, which may quote the training data (`leak_guard`).

    Raises ParameterError for a value that does not meet them, ConfigError for a type that JSON cannot carry.
    """

    def __init__(
        self,
        data: T,
        *,
        name: str | None = None,
        type: Any = None,  # noqa: A002 - the word users know
        description: str | None = "",
        constraint: Constraint = None,
        trainable: bool = True,
        demonstrations: bool = False,
    ) -> None:
        if name == "":
            raise ConfigError("Expected a name, got ''; leave it out for the attribute path")
        self.name = name or UNNAMED
        self.named = name is not None
        self.type = typed_values.infer_type(data) if type is None else type
        self.description = description or ""
        self.constraint = constraint
        self.trainable = trainable
        self.demonstrations = demonstrations
        if trainable and not typed_values.carried_by_json(self.type, data):
            raise ConfigError(
                f"Expected a value that JSON can carry, got {shorten(data)} of type "
                f"{typed_values.describe_type(self.type)} for the parameter {self.name}; use str, int, float, bool, "
                "list, dict (its keys all text or all numbers) or a msgspec.Struct, or trainable=False"
            )
        self._stored: T = self.check(data, self.name)

    @property
    def data(self) -> T:
        """The value: the current context's override if there is one, else as stored.

        Assigning converts and checks, and raises ParameterError. Inside `overriding` an assignment lasts as long
        as the override does.
        """
        value: T = _overrides.get(_NOTHING).get(self, self._stored)
        return value

    @data.setter
    def data(self, raw: T) -> None:
        value = self.check(raw, f"{self.name}.data")
        overrides = _overrides.get(_NOTHING)
        if self in overrides:
            _overrides.set({**overrides, self: value})
        else:
            self._stored = value

    @property
    def value(self) -> T:
        """The value, under the name that `aggregator.protocols.Parameter` has for it."""
        return self.data

    def store(self, value: T) -> None:
        """Store a value of this parameter's type for good, as `write` does; it is not converted or checked again."""
        self._stored = value

    def __shows_as__(self) -> T:
        """Return the value, as `text.show` prints a parameter as what it holds."""
        return self.data

    @property
    def py_name(self) -> str:
        """The name as an identifier, as in prompts and suggestions: "retriever_k"."""
        return py_name(self.name)

    def convert(self, raw: Any) -> T:
        """Return a suggested value as one of this parameter's type; raises ParameterError, and never guesses."""
        return self.check(raw, f"$.suggestion.{py_name(self.name)}")

    def check(self, raw: Any, where: str) -> T:
        """Convert and check a value; `where` is what the error points at."""
        try:
            value: T = typed_values.convert(raw, self.type)
            if callable(self.constraint):
                self._constrain(value)
        except Unfit as unfit:
            raise ParameterError(f"{unfit.reason} - at {where}{unfit.path}") from None
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the value, with its description if it has one."""
        schema = typed_values.schema(self.type)
        return schema | {"description": self.description} if self.description else schema

    def code_engine(self) -> str | None:
        """Return where source in this parameter runs: "process", "monty" or "here" (this process); None for no code."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return what a prompt says of this parameter: value, type, and description and constraint where given."""
        facts = {"value": self.data, "type": typed_values.describe_type(self.type)}
        if self.description:
            facts["description"] = self.description
        if words := constraint_words(self.constraint):
            facts["constraint"] = words
        return facts

    def _constrain(self, value: T) -> None:
        constraint: Any = self.constraint
        try:
            fits = constraint(value)
        except ValueError as error:
            raise Unfit(f"Expected {constraint_words(self.constraint)}, got {shorten(value)}: {error}") from None
        if not fits:
            raise Unfit(f"Expected {constraint_words(self.constraint)}, got {shorten(value)}")

    def __str__(self) -> str:
        return str(self.data)

    def __repr__(self) -> str:
        return f"ParameterNode({shorten(self.data)}, name={self.name!r})"


@overload
def node(data: ParameterNode[T]) -> ParameterNode[T]: ...
@overload
def node(
    data: T,
    name: str | None = None,
    trainable: bool = False,
    description: str | None = None,
    constraint: Constraint = None,
) -> ParameterNode[T]: ...
def node(
    data: Any,
    name: str | None = None,
    trainable: bool = False,
    description: str | None = None,
    constraint: Constraint = None,
) -> ParameterNode[Any]:
    """Return a parameter, under Trace's name and with Trace's defaults: not trainable unless asked for.

    >>> node("Answer briefly.", trainable=True).data
    'Answer briefly.'
    """
    if isinstance(data, ParameterNode):
        return data
    return ParameterNode(data, name=name, description=description, constraint=constraint, trainable=trainable)


def operation_of(function: Any) -> Operation | None:
    """Return the operation behind a bundled function, also under further decorators; None for anything else.

    It is here, and read by its mark, so that an agent without bundled functions does not load what they need.
    """
    function = getattr(function, "__func__", function)
    return vars(function).get("__operation__") if isinstance(function, FunctionType) else None


def read(parameters: Iterable[ParameterNode[Any]]) -> Values:
    """Return name -> value, copied, so that nothing done to the agent later changes what was read."""
    return values_of(by_name(parameters).values())


def values_of(parameters: Iterable[ParameterNode[Any]]) -> Values:
    """Do as `read` with parameters that are known to have different names."""
    return {one.name: data if type(data := one.data) in SCALARS else snapshot(data) for one in parameters}


def write(parameters: Iterable[ParameterNode[Any]], values: Values) -> None:
    """Store new values, all of them or, where one is refused, none; names left out keep their value.

    Raises ParameterError for a value that is refused and for a name that is unknown.
    """
    for parameter, value in _checked(parameters, values).items():
        parameter.store(value)


def is_overridden(parameter: ParameterNode[Any]) -> bool:
    """Return True if this context has a value of its own for a parameter."""
    return parameter in _overrides.get(_NOTHING)


@contextmanager
def overriding(parameters: Iterable[ParameterNode[Any]], values: Values) -> Iterator[None]:
    """Let these parameters read as `values` in the current context (task, thread) and what is started from it.

    Nothing shared is touched, so contexts with different values run at the same time, and there is nothing to restore.
    Raises ParameterError as `write` does.
    """
    token = _overrides.set({**_overrides.get(_NOTHING), **_checked(parameters, values)})
    try:
        yield
    finally:
        _overrides.reset(token)


@contextmanager
def keeping(parameters: Iterable[ParameterNode[Any]]) -> Iterator[None]:
    """Let whatever is assigned to these parameters, or done to their values in place, last until the end of this.

    It is `overriding` by the values that they have.
    """
    with lay_over({parameter: parameter.data for parameter in parameters}):
        yield


class lay_over(AbstractContextManager[None]):  # noqa: N801 - a context manager as `overriding`, entered per instance
    """Do as `overriding` with values that are known to have the types of their parameters."""

    def __init__(self, values: Mapping[ParameterNode[Any], Any]) -> None:
        self._values = values

    def __enter__(self) -> None:
        copies = {one: value if type(value) in SCALARS else snapshot(value) for one, value in self._values.items()}
        self._token = _overrides.set({**_overrides.get(_NOTHING), **copies})

    def __exit__(self, *error: object) -> None:
        _overrides.reset(self._token)


def by_name(parameters: Iterable[ParameterNode[Any]]) -> dict[str, ParameterNode[Any]]:
    """Return name -> parameter in the order they came; raises ConfigError where two share a name or py_name."""
    return index([(parameter.name, parameter) for parameter in parameters])


def index(found: Iterable[tuple[str, ParameterNode[Any]]]) -> dict[str, ParameterNode[Any]]:
    """Return name -> parameter for (path, parameter): its own name if it was given one, else the path.

    Raises ConfigError where two share a name or py_name.
    """
    named: dict[str, ParameterNode[Any]] = {}
    owners: dict[str, tuple[str, ParameterNode[Any]]] = {}
    for path, parameter in found:
        name = parameter.name if parameter.named else path
        other, owner = owners.setdefault(py_name(name), (path, parameter))
        if owner is not parameter:
            raise ConfigError(
                f"Expected parameters of different names, got {other!r} and {path!r}, which are both "
                f"{py_name(name)!r} in prompts; rename an attribute or give name="
            )
        named[name] = parameter
    return named


@lru_cache(maxsize=4096)  # asked for several times an instance
def py_name(name: str) -> str:
    """Return a name as an identifier.

    >>> py_name("steps.0.prompt"), py_name("a:10"), py_name("a1:0")
    ('steps_0_prompt', 'a_10', 'a1_0')
    """
    safe = re.sub(r"\W", "_", name)
    return f"_{safe}" if safe[:1].isdigit() else safe


def constraint_words(constraint: Constraint) -> str:
    """Return a constraint in words: the text itself, or a predicate's docstring or name."""
    if constraint is None or isinstance(constraint, str):
        return constraint or ""
    words = (getattr(constraint, "__doc__", None) or "").strip().split("\n")[0]
    return words or f"a value that satisfies {getattr(constraint, '__name__', type(constraint).__name__)}"


def _checked(parameters: Iterable[ParameterNode[Any]], values: Values) -> dict[ParameterNode[Any], Any]:
    """Return parameter -> converted value for every name in `values`."""
    known = by_name(parameters)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ParameterError(f"Expected names of parameters ({', '.join(known) or 'none'}), got {', '.join(unknown)}")
    return {known[name]: known[name].check(snapshot(raw), name) for name, raw in values.items()}
