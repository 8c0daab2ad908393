"""Run a code parameter outside this process, and find before training what would fail there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from types import FunctionType
from typing import Any, get_type_hints

from aggregator.agents.code import CodeParameter
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.surroundings import Surroundings, uses_of
from aggregator.checks import looks_secret
from aggregator.errors import ConfigError
from aggregator.sandbox.crossing import Call, pack, result_of
from aggregator.sandbox.limits import Limits, Place

REDACTED = "REDACTED"
_IS_COROUTINE = 0x80  # inspect.CO_COROUTINE
_PLAIN = frozenset({None, type(None), bool, int, float, str, bytes, list, tuple, dict, object, Any})


def prepare(
    source: str, like: FunctionType, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], limits: Limits
) -> Call:
    """Return the call of `source`, which replaces the function `like`, with all that it needs.

    Raises ConfigError for an argument that cannot cross.
    """
    given = args if owner is None else args[1:]
    around = Surroundings(owner)
    around.add(source, like, is_method=owner is not None)
    return Call(
        functions=around.functions,
        args=[_packed(value, f"argument {i} of {like.__name__}") for i, value in enumerate(given)],
        kwargs={name: _packed(value, f"{name} of {like.__name__}") for name, value in kwargs.items()},
        owner=None if owner is None else around.attributes(),
        methods=around.methods,
        asynchronous=bool(like.__code__.co_flags & _IS_COROUTINE),
        seconds=limits.seconds,
        memory=limits.memory,
        output=limits.output,
        most_values=limits.values,
    )


def _packed(value: Any, what: str) -> Any:
    try:
        return pack(value.data if isinstance(value, ParameterNode) else value)
    except TypeError as error:
        raise ConfigError(
            f"Expected {what} to be None, bool, int, float, str, bytes or a list, tuple or dict of them, to cross to "
            f"its sandbox, got {error}; pass plain data, or set sandbox=None in its @bundle"
        ) from None


def sandboxed_function(code: CodeParameter, owner: Any, place: Place) -> Callable[..., Any]:
    """Return what runs a code parameter's current source in a sandbox: a function, async if the original is."""
    source, like = code.data, code.original
    if place.engine == "monty":
        from aggregator.sandbox.monty import arun, run
    else:
        from aggregator.sandbox.pool import arun, run
    if like.__code__.co_flags & _IS_COROUTINE:

        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            call = prepare(source, like, owner, args, kwargs, place.limits)
            return result_of(await arun(call), call)

        return asynchronous

    def synchronous(*args: Any, **kwargs: Any) -> Any:
        call = prepare(source, like, owner, args, kwargs, place.limits)
        return result_of(run(call), call)

    return synchronous


def hide_secrets(value: Any) -> Any:
    """Return what trained code returned, with values of the environment that look like secrets replaced.

    Such a value would go on into prompts, recordings and reports. Containers without one are returned as they are.
    """
    secrets = environment_secrets()
    return _without(value, secrets) if secrets else value


def hide_secrets_in(error: BaseException) -> BaseException:
    """Replace secrets in what an exception of trained code says; return the same exception."""
    error.args = hide_secrets(error.args)
    return error


def _without(value: Any, secrets: Sequence[str], levels: int = 64) -> Any:
    kind = type(value)
    if not levels:  # a list that holds itself
        return value
    if kind is str:
        for secret in secrets:
            value = value.replace(secret, REDACTED) if secret in value else value
        return value
    if kind is bytes:
        for secret in secrets:
            value = value.replace(secret.encode(errors="surrogateescape"), REDACTED.encode())
        return value
    if kind in (list, tuple):
        items = [_without(item, secrets, levels - 1) for item in value]
        return value if all(map(is_, items, value)) else kind(items)
    if kind is dict:
        pairs = [(_without(key, secrets), _without(item, secrets, levels - 1)) for key, item in value.items()]
        same = all(new is old and value[old] is item for (new, item), old in zip(pairs, value, strict=True))
        return value if same else dict(pairs)
    return value


def environment_secrets() -> list[str]:
    """Return the values of environment variables that look like secrets, the longest first."""
    return sorted({value for name, value in os.environ.items() if looks_secret(name, value)}, key=len, reverse=True)


def check_sandboxed(operations: Iterable[tuple[str, CodeParameter, Any]]) -> None:
    """Check that trainable operations can run in their sandbox; raises ConfigError that names what cannot, for all.

    `operations` are (name, code parameter, its instance or None) of those that will run in one. The check reads source
    and values and runs nothing. It does not see what hides behind another name or in the values of arguments.
    """
    found = [f"{name} {problems}" for name, code, owner in operations if (problems := _problems(code, owner))]
    if found:
        raise ConfigError(
            "Expected trainable operations that can run in a sandbox, as the code that training writes does, got "
            f"{'; '.join(found)}. Keep that outside of the operation, or set sandbox=None in its @bundle: the code "
            "then runs in this process and may do what your program may do"
        )


def _problems(code: CodeParameter, owner: Any) -> str:
    """Return in words what an operation does or uses that no sandbox can give it, "" for nothing."""
    source, like = code.data, code.original
    uses = uses_of(source, is_method=owner is not None)
    around = Surroundings(owner)
    around.add(source, like, is_method=owner is not None)
    lines = {**uses.names, **{f"self.{name}": line for name, line in uses.attributes.items()}}
    facts = [(lines.get(name, 0), f"uses {name}, {what}") for name, what in around.missing.items()]
    facts += [(line, what) for what, line in uses.problems.items()]
    facts += [(1, f"takes {name}: {kind}") for name, kind in _odd_arguments(like)]
    return ", ".join(f"{what} (line {line})" if line else what for line, what in sorted(facts))


def _odd_arguments(like: FunctionType) -> list[tuple[str, str]]:
    """Return the arguments that are annotated with a class whose values cannot cross."""
    try:
        hints = get_type_hints(like)
    except Exception:  # noqa: BLE001 - annotations are the user's own, and need not mean anything
        return []
    return [
        (name, getattr(kind, "__name__", str(kind)))
        for name, kind in hints.items()
        if name != "return" and isinstance(kind, type) and not hasattr(kind, "__origin__") and kind not in _PLAIN
    ]
