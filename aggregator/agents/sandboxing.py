"""Run a code parameter in the sandbox: what the call needs of its module and its instance, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from aggregator.agents.code import CodeParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.sandbox.crossing import Call
from aggregator.sandbox.limits import Limits

_IS_COROUTINE = 0x80  # inspect.CO_COROUTINE


def prepare(
    source: str, like: FunctionType, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], limits: Limits
) -> Call:
    """Return the call of `source`, which stands for the function `like`, with all that it needs beside.

    Raises ConfigError for an argument that cannot cross.
    """
    given = args if owner is None else args[1:]
    surroundings = _surroundings(like)
    return Call(
        source=source,
        name=like.__name__,
        args=[_crossing(value, f"argument {i} of {like.__name__}") for i, value in enumerate(given)],
        kwargs={name: _crossing(value, f"{name} of {like.__name__}") for name, value in kwargs.items()},
        owner=None if owner is None else _attributes(owner),
        values={name: value for name, value in surroundings.items() if _is_plain(value)},
        modules={name: value.__name__ for name, value in surroundings.items() if isinstance(value, ModuleType)},
        asynchronous=bool(like.__code__.co_flags & _IS_COROUTINE),
        seconds=limits.seconds,
        memory=limits.memory,
        output=limits.output,
    )


def run(call: Call) -> Any:
    """Make the call in a worker and wait for it."""
    from aggregator.sandbox.pool import pool

    return pool().run(call).result(call.name)


async def arun(call: Call) -> Any:
    """Make the call in a worker without holding up the event loop; cancelling ends the worker."""
    from aggregator.sandbox.pool import pool

    return (await pool().arun(call)).result(call.name)


def sandboxed_function(code: CodeParameter, owner: Any, limits: Limits) -> Callable[..., Any]:
    """Return what runs a code parameter's current source in a worker: a function, async where the original is."""
    source, like = code.data, code.original
    if like.__code__.co_flags & _IS_COROUTINE:

        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            return await arun(prepare(source, like, owner, args, kwargs, limits))

        return asynchronous

    def synchronous(*args: Any, **kwargs: Any) -> Any:
        return run(prepare(source, like, owner, args, kwargs, limits))

    return synchronous


def _surroundings(function: FunctionType) -> dict[str, Any]:
    """Return what a function uses from its module and from the functions around it."""
    names = set(_names(function.__code__))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return {name: found[name] for name in sorted(found)}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _attributes(owner: Any) -> dict[str, tuple[bool, Any]]:
    """Return an instance's parameters and plain values: name -> (is a parameter, value)."""
    attributes: dict[str, tuple[bool, Any]] = {}
    for name, value in vars(owner).items():
        is_parameter = isinstance(value, ParameterNode)
        content = value.data if is_parameter else value
        if _is_plain(content):
            attributes[name] = (is_parameter, content)
    return attributes


def _crossing(value: Any, what: str) -> Any:
    content = value.data if isinstance(value, ParameterNode) else value
    if not _is_plain(content):
        raise ConfigError(
            f"Expected {what} to be None, bool, int, float, str, bytes or a list, tuple or dict of them, to cross to "
            f"its sandbox, got {type(content).__name__}; pass plain data, or leave sandbox out"
        )
    return content


def _is_plain(value: Any, levels: int = 64) -> bool:
    """Say whether msgpack carries a value as what it is."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return True
    if levels == 0:
        return False
    if kind in (list, tuple):
        return all(_is_plain(item, levels - 1) for item in value)
    return kind is dict and all(_is_plain(key, 1) and _is_plain(item, levels - 1) for key, item in value.items())
