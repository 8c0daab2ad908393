"""Trained code in a worker process, with limits of time, memory, file system and network.

What it protects from: code that a model wrote by mistake. An endless loop, too much memory, new processes and threads,
writing files, reading files other than what imports need, sockets and the parent's environment variables are out of its
reach, and each attempt ends as a SandboxError that says so; every call starts from a clean state.

What it does not protect from: code written to break out. An audit hook is no security boundary (PEP 578), the system
call filter beneath it exists on Linux on x86-64 only, and neither hides the interpreter's own files. Run hostile code
in a container or a virtual machine. Systems without `fork` have no sandbox.

What crosses: None, bool, int (64 bits), float, str, bytes, and lists, tuples and dicts of them; a tuple arrives as a
list. The code sees its arguments, the modules and plain values that the function as written uses from its module, and
as `self` the parameters and plain values of the instance. Everything else it imports or defines inside itself.

An async operation waits for its worker without holding up the event loop; a sync one blocks whoever calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal

from msgspec import Struct

from aggregator.agents.code import CodeParameter
from aggregator.agents.crossing import Call
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError

_IS_COROUTINE = 0x80  # inspect.CO_COROUTINE


class Limits(Struct, frozen=True, kw_only=True):
    """What one call may use: wall-clock seconds, bytes of memory, bytes of result."""

    seconds: float = 5.0
    memory: int = 512 << 20
    output: int = 16 << 20

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.001), ("memory", 64 << 20), ("output", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"Expected Limits({name}=...) of at least {least}, got {getattr(self, name)!r}")


Sandbox = Literal["process"] | Limits | None
"""Where trained code runs: None in this process, "process" in a worker with the default limits, or your own Limits."""

_everywhere: ContextVar[Limits | None] = ContextVar("aggregator_sandbox", default=None)


def limits_of(sandbox: Sandbox) -> Limits | None:
    """Return the limits that a user's word stands for; raises ConfigError for any other word."""
    if sandbox is None or isinstance(sandbox, Limits):
        return sandbox
    if sandbox == "process":
        return Limits()
    raise ConfigError(f"Expected sandbox=None, 'process' or Limits(...), got {sandbox!r}")


@contextmanager
def sandboxed(sandbox: Sandbox = "process") -> Iterator[None]:
    """Run every trainable operation of the current context in a worker process, whatever its own @bundle says."""
    token = _everywhere.set(limits_of(sandbox))
    try:
        yield
    finally:
        _everywhere.reset(token)


def current_limits(own: Limits | None) -> Limits | None:
    """Return the limits for an operation whose own are `own`: those of the context go first."""
    return _everywhere.get() or own


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
    from aggregator.agents.workers import pool

    return pool().run(call).result(call.name)


async def arun(call: Call) -> Any:
    """Make the call in a worker without holding up the event loop; cancelling ends the worker."""
    from aggregator.agents.workers import pool

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
