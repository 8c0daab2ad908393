"""Plain functions as agents: `def answer(x, *, instruction="Answer briefly.")`.

The first argument is the input, keyword-only arguments are parameters, named and typed as in the signature. So are the
ParameterNodes that a function reads: global, closure and default variables, also of functions of its module that it
calls. An accepted value becomes the argument's default, so that the function itself uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter as Argument
from inspect import isawaitable, isfunction, ismethod, signature, unwrap
from types import CodeType
from typing import Any, get_type_hints

from aggregator.adapters.frameworks import FrameworkAgent
from aggregator.agents.modules import operation_of, walk
from aggregator.agents.parameters import ParameterNode, carried_by_json, index, infer_type
from aggregator.checks import accepts, is_async
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask

_FEW = 100
"""Larger containers are data, and not searched for parameters."""


def is_plain_function(thing: Any) -> bool:
    """Return True for a function, a method or a partial of them without its own `parameters`."""
    inner = thing
    while isinstance(inner, partial):
        inner = inner.func
    return (isfunction(inner) or ismethod(inner)) and not hasattr(thing, "parameters")


class KeywordParameter(ParameterNode[Any]):
    """A keyword-only argument: its value is the function's default."""

    def __init__(self, defaults: dict[str, Any], name: str, kind: Any) -> None:
        self._defaults = defaults
        self._argument = name
        super().__init__(defaults[name], name=name, type=kind)

    @property
    def _stored(self) -> Any:
        return self._defaults[self._argument]

    @_stored.setter
    def _stored(self, value: Any) -> None:
        self._defaults[self._argument] = value


class FunctionAgent(FrameworkAgent):
    """A plain function, sync or async, of one input; calling it calls the function with its trained values.

    Raises ConfigError for a function without an input, and for a keyword-only argument without a default.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.program = self.function = function
        self._keywords = {parameter.name: parameter for parameter in _keywords_of(function)}
        if not accepts(function, None, **self._keywords):
            raise ConfigError(
                f"Expected a function of one input whose keyword-only arguments have defaults, got {_name(function)}"
                f"{signature(function)}; write it as in def answer(x, *, instruction='Answer briefly.')"
            )
        known = index([*self._keywords.items(), *_read_by(function)])
        for name, parameter in known.items():
            parameter.name = name
        self._parameters = known

    def __repr__(self) -> str:
        return f"as_agent({_name(self.function)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result with the values of this context."""
        return self.function(*args, **{name: parameter.data for name, parameter in self._keywords.items()} | kwargs)

    @contextmanager
    def placed(self) -> Iterator[Callable[..., Any]]:
        """Yield the function with the values of this context."""
        yield self.forward

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the function's result with the values of this context."""
        if is_async(self.function):
            return Ran(output=await self.forward(task.sample.x))
        output = await call(self.forward, task.sample.x)
        return Ran(output=await output if isawaitable(output) else output)


def _keywords_of(function: Callable[..., Any]) -> Iterator[KeywordParameter]:
    """Yield the keyword-only arguments whose default is a value that JSON supports."""
    try:
        hints = get_type_hints(inner_function(function), include_extras=True)
    except Exception:  # noqa: BLE001 - annotations may name what exists for type checkers only
        hints = {}
    for name, argument in signature(function).parameters.items():
        value = argument.default
        if argument.kind is not Argument.KEYWORD_ONLY or value is Argument.empty or isinstance(value, ParameterNode):
            continue
        kind = next(
            (kind for kind in (hints.get(name), infer_type(value)) if kind and carried_by_json(kind, value)), None
        )
        if kind is not None:
            yield KeywordParameter(_defaults_of(function, name), name, kind)


def _defaults_of(function: Any, name: str) -> dict[str, Any]:
    """Return the dict that holds the default of an argument."""
    while isinstance(function, partial):
        if name in function.keywords:
            return function.keywords
        function = function.func
    defaults: dict[str, Any] = inner_function(function).__kwdefaults__
    return defaults


def _read_by(function: Any, seen: set[int] | None = None) -> Iterator[tuple[str, ParameterNode[Any]]]:
    """Yield (name, parameter) for each ParameterNode that a function can name, once."""
    seen = set() if seen is None else seen
    inner = inner_function(function)
    if id(inner) in seen:
        return
    seen.add(id(inner))
    for name, value in variables_of(function):
        if isfunction(value) and value.__module__ == inner.__module__ and operation_of(value) is None:
            yield from _read_by(value, seen)
        elif not isinstance(value, dict | list | tuple) or len(value) <= _FEW:
            yield from walk(value, name, seen)


def objects_read_by(
    function: Any, kind: type | tuple[type, ...], seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (variable, object) for each object of given types that a function can name, also in small containers.

    This includes the functions of its module that it calls.
    """
    seen = set() if seen is None else seen
    inner = inner_function(function)
    if id(inner) in seen or not isfunction(inner):
        return
    seen.add(id(inner))
    for variable, value in variables_of(function):
        for name, one in ((variable, value), *_items_of(variable, value)):
            if isinstance(one, kind):
                yield name, one
            elif isfunction(one) and one.__module__ == inner.__module__:
                yield from objects_read_by(one, kind, seen)


def nodes_read_by(functions: Iterable[Any], known: Sequence[ParameterNode[Any]]) -> list[ParameterNode[Any]]:
    """Return the known parameters, and the ParameterNodes that functions of a program name, each once.

    A node without a name of its own gets its variable's.
    """
    found = list(known)
    for function in functions:
        for name, node in objects_read_by(function, ParameterNode) if callable(function) else ():
            if all(node is not one for one in found):
                node.name = node.name if node.named else name
                found.append(node)
    return found


def _items_of(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict | list | tuple) or len(value) > _FEW:
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [(f"{name}.{key}", one) for key, one in pairs]


def variables_of(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of the variables that a function's code can name.

    These are its defaults, closures and globals, the attributes of a method's object, and a partial's arguments.
    """
    while isinstance(function, partial):
        yield from ((f"argument_{i}", value) for i, value in enumerate(function.args))
        yield from function.keywords.items()
        function = function.func
    method = function if ismethod(function) or isfunction(function) else function.__call__
    if ismethod(method):
        yield from getattr(method.__self__, "__dict__", {}).items()
    inner = inner_function(function)
    for name, argument in signature(inner).parameters.items():
        yield name, argument.default
    closed = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
    for name, cell in closed:
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in dict.fromkeys(_names_in(inner.__code__)):
        if name in inner.__globals__:
            yield name, inner.__globals__[name]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def inner_function(function: Any) -> Any:
    """Return the function behind partials, methods, decorators, and callable objects."""
    while isinstance(function, partial):
        function = function.func
    function = unwrap(function)
    if not isfunction(function) and not ismethod(function) and callable(function):
        function = function.__call__
    return function.__func__ if ismethod(function) else function


def _name(function: Any) -> str:
    function = inner_function(function)
    return str(getattr(function, "__name__", type(function).__name__))
