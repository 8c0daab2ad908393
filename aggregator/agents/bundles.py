"""@bundle: a traced operation. With `trainable=True` its source is a parameter.

Values pass through unchanged, nothing is caught, and no state of a call is kept on the operation: it may run in any
number of tasks and threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, overload

from aggregator.agents.code import CodeParameter
from aggregator.agents.modules import operation_of
from aggregator.agents.parameters import CODE
from aggregator.agents.sandbox import hide_secrets, hide_secrets_in, sandboxed_function
from aggregator.agents.transcripts import current_transcript, recording
from aggregator.errors import ConfigError
from aggregator.sandbox.limits import HERE, Place, Sandbox, current_place, place_of

F = TypeVar("F", bound=Callable[..., Any])

_IS_COROUTINE, _HAS_VARARGS = 0x80, 0x04  # inspect.CO_COROUTINE, inspect.CO_VARARGS: not worth the import


class Operation:
    """A bundled function: its name, its description, and the parameter that holds its source."""

    def __init__(
        self, function: FunctionType, description: str | None, *, trainable: bool, place: Place = HERE
    ) -> None:
        doc = (function.__doc__ or "").strip()
        self.function = function
        self.name = function.__name__
        self.title = function.__qualname__.rpartition("<locals>.")[2]
        self.description = " ".join(doc.split("\n\n")[0].split()) if description is None else description
        self.is_async = bool(function.__code__.co_flags & _IS_COROUTINE)
        self.code: CodeParameter | None = None
        if trainable:
            self.code = CodeParameter(function, name=self.name + CODE, description=self.description, place=place)

    def code_of(self, owner: Any) -> CodeParameter | None:
        """Return the parameter that holds the source: the instance's own for a method, otherwise the operation's."""
        if self.code is None or not isinstance(getattr(owner, "__dict__", None), dict):
            return self.code  # a class, or an instance without its own entry
        key = self.name + CODE
        own = vars(owner).get(key)
        if own is None:  # setdefault: two concurrent first threads get the same one
            own = vars(owner).setdefault(key, self.code.fresh())
        return own if isinstance(own, CodeParameter) else self.code

    def parameters(self) -> list[CodeParameter]:
        """Return the operation's own parameter, named after it."""
        if self.code is None:
            return []
        self.code.name = self.name + CODE
        return [self.code]

    def owner_among(self, args: tuple[Any, ...]) -> Any:
        """Return the instance whose method is called with these arguments, or None for a plain function.

        A method that a subclass overrides is no longer its class's operation: `super()` runs the original.
        """
        if args and operation_of(getattr(type(args[0]), self.name, None)) is self:
            return args[0]
        return None

    def current(self, args: tuple[Any, ...]) -> tuple[Callable[..., Any], bool]:
        """Return the function to call: the original, one compiled from the parameter's source, or one run in a sandbox.

        The second value is True if its source is not the author's own.
        """
        if self.code is None:
            return self.function, False
        owner = self.owner_among(args)
        code = self.code_of(owner) or self.code
        changed, place = code.is_changed(), current_place(code.place)
        function = sandboxed_function(code, owner, place) if place.takes(changed=changed) else code.function()
        return function, changed

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the arguments of a call by name, without `self`."""
        facts = self.function.__code__
        names = facts.co_varnames[: facts.co_argcount]
        named = [(name, value) for name, value in zip(names, args, strict=False) if name not in ("self", "cls")]
        rest = args[len(names) :]
        if rest and facts.co_flags & _HAS_VARARGS:
            named.append((f"*{facts.co_varnames[facts.co_argcount + facts.co_kwonlyargcount]}", rest))
        return [*named, *kwargs.items()]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation, and record it if a transcript is open."""
        function, changed = self.current(args)
        if current_transcript() is None and not changed:
            return function(*args, **kwargs)
        with recording(self.title, self.description, self.inputs(args, kwargs)) as span:
            try:
                output = function(*args, **kwargs)
            except BaseException as error:
                span.fail(hide_secrets_in(error) if changed else error, self._place(error, function, args))
                raise
            output = hide_secrets(output) if changed else output
            span.finish(output)
            return output

    async def acall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the asynchronous operation, and record it if a transcript is open."""
        function, changed = self.current(args)
        if current_transcript() is None and not changed:
            return await function(*args, **kwargs)
        with recording(self.title, self.description, self.inputs(args, kwargs)) as span:
            try:
                output = await function(*args, **kwargs)
            except BaseException as error:
                span.fail(hide_secrets_in(error) if changed else error, self._place(error, function, args))
                raise
            output = hide_secrets(output) if changed else output
            span.finish(output)
            return output

    def _place(self, error: BaseException, function: Callable[..., Any], args: tuple[Any, ...]) -> str:
        """Return the line of a trainable operation's source that failed, or "" for any other operation."""
        code = self.code and self.code_of(self.owner_among(args))
        return code.place_of(error, function) if code else ""


@overload
def bundle(description: F) -> F: ...
@overload
def bundle(
    description: str | None = None, *, trainable: bool = False, sandbox: Sandbox = "changed"
) -> Callable[[F], F]: ...
def bundle(description: Any = None, *, trainable: bool = False, sandbox: Sandbox = "changed") -> Any:
    """Trace a function or method, sync or async: transcripts show its name, description, inputs and output.

    `description` defaults to the docstring's first paragraph. `trainable=True` makes the source a parameter named
    `<operation>__code`: of the instance for a method of a Module, else of the operation itself. Source that training
    changed runs in a worker process with limits; `sandbox=` changes that (`aggregator.sandbox.limits` lists its values,
    and what the code can access there), and `sandbox=None` runs it in this process.

    >>> @bundle()
    ... def add(a: int, b: int) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> add(1, b=2)
    3
    """
    if callable(description):
        return _wrap(description, None, trainable=False, place=HERE)
    place = place_of(sandbox)
    if sandbox not in ("changed", None) and not trainable:
        raise ConfigError("Expected trainable=True with sandbox=..., got False; only trained code is sandboxed")
    return lambda function: _wrap(function, description, trainable=trainable, place=place)


def _wrap(function: Any, description: str | None, *, trainable: bool, place: Place) -> Any:
    if not isinstance(function, FunctionType):
        raise ConfigError(
            f"Expected a function written with `def`, got {type(function).__name__}; put @bundle closest to the "
            "function, below @staticmethod, @classmethod or other decorators"
        )
    operation = Operation(function, description, trainable=trainable, place=place)
    if operation.is_async:

        @wraps(function)
        async def traced(*args: Any, **kwargs: Any) -> Any:
            return await operation.acall(args, kwargs)
    else:

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            return operation.call(args, kwargs)

    traced.__operation__ = operation  # type: ignore[attr-defined]
    if trainable and "." not in operation.title:  # a function can be an agent by itself, like a Module
        traced.parameters = operation.parameters  # type: ignore[attr-defined]
    return traced
