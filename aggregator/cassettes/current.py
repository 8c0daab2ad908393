"""Which tape a call belongs to: that of its context, else, for what starts without one, the only one that is open.

A plain thread begins with an empty context; so do those that unittest and anyio make before a test's cassette is
opened. Their calls would reach the network unseen. Which tapes are open is the process's state, and no tape's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

from aggregator import portal

if TYPE_CHECKING:  # a program that opens no cassette loads nothing of one
    from aggregator.cassettes.tape import Tape

_TAPE: ContextVar[Tape | None] = ContextVar("aggregator_tape", default=None)
_open: list[Tape] = []

current_tape = _TAPE.get
"""Return the tape of this context, None where no cassette is open."""


def enter(tape: Tape) -> Token[Tape | None]:
    """Make a tape the current one of this context."""
    _open.append(tape)
    return _TAPE.set(tape)


def leave(tape: Tape, token: Token[Tape | None]) -> None:
    """Make the tape of before the current one again."""
    if tape in _open:
        _open.remove(tape)
    try:
        _TAPE.reset(token)
    except ValueError:  # left in another context than entered, as by a pytest fixture of asyncio
        if _TAPE.get() is tape:
            _TAPE.set(None)


def tape_here() -> Tape | None:
    """Return the tape that calls made here and now belong to."""
    tape = _TAPE.get()
    return _adopting() if tape is None and _open else tape


def _adopting() -> Tape | None:
    """Return the tape of calls whose context has none."""
    if len(_open) != 1:
        return None
    (tape,) = _open
    adopts = tape.rules.adopts
    return tape if adopts == "everything" or (adopts == "threads" and _is_stray()) else None


def _is_stray() -> bool:
    """Say whether this is a thread that somebody started; to our own, contexts travel along."""
    return threading.current_thread() is not threading.main_thread() and not portal.is_here()


@contextmanager
def adopted() -> Iterator[None]:
    """Let calls made inside, on another thread's loop, belong to the tape of this thread."""
    tape = tape_here() if _TAPE.get() is None else None
    if tape is None:
        yield
        return
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)
