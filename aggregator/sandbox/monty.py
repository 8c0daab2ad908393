"""Trained code in Monty, a separate interpreter written in Rust (the extra `monty`), used on request only.

It has no files, no environment, no network and only a few of Python's modules, so nothing has to be restricted. It runs
a subset of Python: no generators, no class inheritance, no packages. A call costs about half a millisecond.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from aggregator.errors import ConfigError
from aggregator.sandbox.crossing import Call, Fault, Frame, plain

MEMORY = 64 << 20
"""The maximum number of bytes of a call, whatever its limits: a result of many values is larger here than there."""

_PREFIX = "_aggregator_"
_OWNER = f"""
class {_PREFIX}parameter:
    def __init__(self, data):
        self.data = data

class {_PREFIX}owner:
    pass

{_PREFIX}self = {_PREFIX}owner()
"""


class Engine:
    """Monty's own pool of processes, and threads that wait for it."""

    def __init__(self) -> None:
        try:
            import pydantic_monty
        except ImportError as error:
            raise ConfigError(
                f"Expected pydantic-monty for sandbox='monty', got {error}; pip install 'aggregated-update[monty]'"
            ) from error
        self.monty = pydantic_monty
        self.size = min(os.cpu_count() or 2, 8)
        self.pool = pydantic_monty.Monty(max_processes=self.size)
        self.pool.__enter__()
        self.threads = ThreadPoolExecutor(self.size, "aggregator-monty")

    def run(self, call: Call) -> Frame:
        """Make a call in a new session, and return its answer as a worker process would."""
        limits: Any = {"max_feed_duration_secs": call.seconds, "max_memory": min(call.memory, MEMORY)}
        feeds, own = list(_feeds(plain(call))), "<python-input-0>"
        try:
            with self.pool.checkout(limits=limits) as session:
                for source, inputs in feeds[:-1]:
                    session.feed_run(source, inputs=inputs)
                source, inputs = feeds[-1]
                result = session.feed_run(source, inputs=inputs)
            content = msgspec.msgpack.encode({"value": result})
        except self.monty.MontyError as error:
            return self._failure(error, own, call)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return Frame(f"its result cannot leave it ({error}); plain data can: str, numbers, lists, dicts", b"")
        if len(content) > call.output:
            return Frame(f"its result is larger than {call.output} bytes", b"")
        return Frame("", content)

    def _failure(self, error: Any, own: str, call: Call) -> Frame:
        if isinstance(error, self.monty.MontyCrashedError):
            return Frame("its process ended, most often for want of memory", b"")
        raised = error.exception()
        if isinstance(raised, MemoryError):
            return Frame(f"it used more than {min(call.memory, MEMORY) >> 20} MiB of memory", b"")
        if isinstance(raised, TimeoutError) and "time limit" in str(raised):
            return Frame(f"it ran longer than {call.seconds:g} seconds", b"")
        frames = error.traceback() if hasattr(error, "traceback") else []
        line = next((frame.line for frame in reversed(frames) if frame.filename == own), 0)
        args = [arg for arg in raised.args if arg is None or isinstance(arg, bool | int | float | str | bytes)]
        fault = Fault(kind=type(raised).__name__, text=str(raised), line=line, args=args)
        return Frame("", msgspec.msgpack.encode({"error": fault}))


def _feeds(call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the inputs of a session, each with its values.

    The operation comes first, so that its lines are counted from 1; then everything that it uses, and the call.
    """
    functions = call["functions"]
    made = {key: f"{_PREFIX}{i}" for i, key in enumerate(["", *filter(None, functions)])}
    yield functions[""]["source"], {}
    values: dict[str, Any] = {f"{_PREFIX}args": call["args"], f"{_PREFIX}kwargs": call["kwargs"]}
    lines = [f"import re as {_PREFIX}re"]
    for key, name in made.items():
        lines += [functions[key]["source"] if key else "", f"{name} = {functions[key]['name']}"]
    for function in functions.values():
        for name, module in function["modules"].items():
            home, _, part = module.partition(":")
            statement = f"from {home} import {part} as {name}" if part else f"import {home} as {name}"
            lines.append(f"try:\n    {statement}\nexcept ImportError:\n    pass")
        lines += [f"{name} = {made[used]}" for name, used in function["uses"].items()]
        for name, value in function["values"].items():
            if isinstance(value, re.Pattern):
                lines.append(f"{name} = {_PREFIX}re.compile({value.pattern!r}, {value.flags})")
            else:
                values[name] = value
    arguments = f"*{_PREFIX}args, **{_PREFIX}kwargs"
    if call["owner"] is not None:
        owner_lines, owner_values = _owner(call, made)
        lines, values = lines + owner_lines, values | owner_values
        arguments = f"{_PREFIX}self, {arguments}"
    waiting = "await " if call["asynchronous"] else ""
    yield "\n".join([*lines, f"{waiting}{made['']}({arguments})"]), values


def _owner(call: dict[str, Any], made: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
    """Return the source of the object that replaces `self`."""
    lines, values = [_OWNER], {}
    for i, (name, (is_parameter, value)) in enumerate(call["owner"].items()):
        values[f"{_PREFIX}value_{i}"] = value
        shown = f"{_PREFIX}parameter({_PREFIX}value_{i})" if is_parameter else f"{_PREFIX}value_{i}"
        lines.append(f"{_PREFIX}self.{name} = {shown}")
    for name, key in call["methods"].items():
        lines.append(f"{_PREFIX}self.{name} = lambda *args, **kwargs: {made[key]}({_PREFIX}self, *args, **kwargs)")
    return lines, values


_engines: dict[int, Engine] = {}  # by process: a fork does not use its parent's processes
_lock = threading.Lock()


def engine() -> Engine:
    """Return this process's engine; raises ConfigError if pydantic-monty is not installed."""
    with _lock:
        found = _engines.get(os.getpid())
        if found is None:
            found = _engines[os.getpid()] = Engine()
            atexit.register(_close, found, os.getpid())
        return found


def _close(closing: Engine, pid: int) -> None:
    if os.getpid() == pid:
        closing.threads.shutdown()
        closing.pool.__exit__(None, None, None)


def run(call: Call) -> Frame:
    """Make a call and wait for it."""
    return engine().run(call)


async def arun(call: Call) -> Frame:
    """Make a call without blocking the event loop."""
    running = engine()
    return await asyncio.wrap_future(running.threads.submit(running.run, call))
