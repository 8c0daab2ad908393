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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from msgspec import Struct

from aggregator.errors import ConfigError


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
