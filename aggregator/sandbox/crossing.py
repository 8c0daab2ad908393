"""What crosses to a worker process and what comes back, as msgpack carries them."""

from __future__ import annotations

import builtins
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.errors import ConfigError, SandboxError


class Answer(Struct, frozen=True):
    """What a worker sends back: a value, an error of the code's own, or the limit that ended it."""

    value: Any = None
    error: dict[str, Any] | None = None
    limit: str | None = None

    def result(self, name: str) -> Any:
        """Return the value, or raise what stands for the error; `name` is the operation's."""
        if self.limit is not None:
            raise SandboxError(f"Expected {name} to stay within its sandbox, but {self.limit}")
        if self.error is not None:
            raise _rebuilt(name, **self.error)
        return self.value


class Call(Struct, frozen=True, kw_only=True):
    """One call to be made in a worker."""

    source: str
    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    owner: dict[str, tuple[bool, Any]] | None
    values: dict[str, Any]
    modules: dict[str, str]
    asynchronous: bool
    seconds: float
    memory: int
    output: int

    def encoded(self) -> bytes:
        """Return the request as bytes."""
        try:
            return msgspec.msgpack.encode(self)
        except (OverflowError, RecursionError, ValueError) as error:
            raise ConfigError(f"Expected arguments of {self.name} that can cross to its sandbox, got {error}") from None


def _rebuilt(name: str, kind: str, args: list[Any], text: str, line: int, builtin: bool) -> Exception:
    """Return the exception that trained code raised, of its own class where that is a builtin one."""
    error: Exception = SandboxError(f"{name} failed with {kind}: {text}")
    if builtin:
        with suppress(TypeError):  # a class that takes other arguments than it shows
            error = getattr(builtins, kind)(*args)
    error.__dict__["source_line"] = line
    return error
