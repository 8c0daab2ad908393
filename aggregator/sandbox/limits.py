"""The place of trained code: the values of `sandbox=`, limits, and `sandboxed` for a whole context.

    "changed"    source that training changed runs in a worker process, the author's own in this one (the default)
    "process"    every call runs in a worker process
    Limits(...)  the same, with custom limits
    "monty"      source that training changed runs in Monty, a separate interpreter (the extra `monty`)
    None         everything runs in this process: trained code may then do whatever your program may do

docs/security.md describes what the worker process protects from, and on which systems.

Values that can be sent to a worker: None, bool, int (64 bits), float, str, bytes, and lists, tuples and dicts of them;
a tuple comes back as a list. The code sees its arguments; of its module the imports, plain values, sets, patterns and
functions that it uses; and of `self` the parameters, plain values and methods. Everything else it imports or defines
itself.

An async operation waits for its worker without blocking the event loop; a sync one blocks its caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from aggregator.errors import ConfigError


class Limits(Struct, frozen=True, kw_only=True):
    """The limits of one call: wall-clock seconds, bytes of memory, and bytes and single values of its result.

    `packages` are those that trained code may import although the module of the operation does not. They are imported
    in the worker process before it is closed, so they run with your rights, except for the environment.
    """

    seconds: float = 5.0
    memory: int = 512 << 20
    output: int = 16 << 20
    values: int = 250_000
    packages: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.001), ("memory", 64 << 20), ("output", 1), ("values", 1)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"Expected Limits({name}=...) of at least {least}, got {getattr(self, name)!r}")
        names = self.packages
        if isinstance(names, str) or not all(str(name).isidentifier() for name in names):
            raise ConfigError(f"Expected Limits(packages=...) as a list of names such as ['numpy'], got {names!r}")
        force_setattr(self, "packages", tuple(names))


Sandbox = Literal["changed", "process", "monty"] | Limits | None


class Place(Struct, frozen=True, kw_only=True):
    """The place of an operation's code. With `always` the author's own source does not run in this process either."""

    engine: Literal["here", "process", "monty"] = "process"
    always: bool = False
    limits: Limits = Limits()

    def takes(self, *, changed: bool) -> bool:
        """Return True if source runs in the sandbox; `changed` is True if training changed it."""
        return self.engine != "here" and (changed or self.always)


HERE = Place(engine="here")
_PLACES = {"changed": Place(), "process": Place(always=True), "monty": Place(engine="monty")}

_everywhere: ContextVar[Place | None] = ContextVar("aggregator_sandbox", default=None)


def place_of(sandbox: Sandbox | Place) -> Place:
    """Return the place for a value of `sandbox=`; a `Place` is returned unchanged. Raises ConfigError for others."""
    if isinstance(sandbox, Place):
        return sandbox
    if sandbox is None:
        return HERE
    if isinstance(sandbox, Limits):
        return Place(always=True, limits=sandbox)
    place = _PLACES.get(str(sandbox))
    if place is not None:
        return place
    raise ConfigError(f"Expected sandbox=None, 'process' or Limits(...), or 'changed' or 'monty', got {sandbox!r}")


place_here = _everywhere.get
"""Return the place of the context's `sandboxed`, or None; a process executor passes it on."""


@contextmanager
def sandboxed(sandbox: Sandbox | Place = "process") -> Iterator[None]:
    """Run every trainable operation of the current context there, whatever the `sandbox=` of its @bundle."""
    token = _everywhere.set(place_of(sandbox))
    try:
        yield
    finally:
        _everywhere.reset(token)


def current_place(own: Place) -> Place:
    """Return the place of an operation's code; the context's overrides its own one, `own`."""
    return _everywhere.get() or own
