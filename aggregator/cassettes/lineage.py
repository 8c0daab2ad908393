"""The place of a call: its lineage and role, its tape, and its observers, all in context variables.

Identical requests are distinguished by their lineage, so a replay is exact in any order of completion. Every concurrent
branch sets its own part; asyncio copies the path into each task.

A call belongs to the tape of its context. A plain thread starts with an empty context, and so do contexts that unittest
and anyio create before a test's cassette is opened: their calls belong to the only open tape, if its rules adopt them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from aggregator import portal
from aggregator.errors import CassetteMissError, ConfigError
from aggregator.records import Role
from aggregator.text import show_call

if TYPE_CHECKING:  # a program without a cassette loads none of its code
    from aggregator.cassettes.tape import Tape
    from aggregator.cassettes.traffic import Exchanges


# The lineage


class Place(Struct, frozen=True):
    """The path and role of the calls of this context, and those before this block.

    A chain, since one `lineage` object may be entered by several tasks at once.
    """

    path: str
    role: Role
    outer: Place | None = None
    branch: portal.Branch | None = None


_PLACE: ContextVar[Place] = ContextVar("aggregator_lineage", default=Place("", "agent"))  # noqa: B039 - frozen


current_place = _PLACE.get
"""Return path and role of this context at once."""


def current_lineage() -> str:
    """Return the path of this context, such as `train/epoch=0/batch=3/sample=17/propose`; "" outside a lineage."""
    return _PLACE.get().path


def current_role() -> Role:
    """Return the role that calls the model in this context; "agent" by default."""
    return _PLACE.get().role


class lineage(AbstractContextManager[str]):  # noqa: N801 - reads as a word at its use: `with lineage("retrieve"):`
    """Extend the path of every call made inside, and set its role if `role` is given.

    With `root=True` the parts are the whole path, whatever surrounds the block.

    >>> with lineage("train", "epoch=0"), lineage("propose", role="optimizer"):
    ...     print(current_lineage(), current_role())
    train/epoch=0/propose optimizer
    """

    def __init__(self, *parts: str, role: Role | None = None, root: bool = False) -> None:
        try:
            self._parts = "/".join(parts)
        except TypeError:
            _check_parts(parts)
        if not all(parts) or not self._parts.isprintable():
            _check_parts(parts)
        self._role = role
        self._root = root

    def __repr__(self) -> str:
        return show_call("lineage", self._parts, role=self._role, root=self._root)

    def __enter__(self) -> str:
        """Return the extended path."""
        place, path = _PLACE.get(), self._parts
        if place.path and not self._root:
            path = f"{place.path}/{path}" if path else place.path
        _PLACE.set(Place(path, self._role or place.role, place, portal.begin_block()))
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous path."""
        place = _PLACE.get()
        if place.outer is not None:  # else left in another context than entered, which has its own
            _PLACE.set(place.outer)
            if place.branch is not None:
                portal.set_branch(place.branch)


def lineage_at(path: str, role: Role) -> lineage:
    """Replace the path and the role for calls made inside, for calls of another process.

    >>> with lineage("train"), lineage_at("train/sample=3", "guide"):
    ...     print(current_lineage(), current_role())
    train/sample=3 guide
    """
    return lineage(*([path] if path else []), role=role, root=True)


def _check_parts(parts: tuple[Any, ...]) -> None:
    for part in parts:
        if not isinstance(part, str) or not part or not part.isprintable():
            raise ConfigError(f"Expected non-empty printable text as a part of a lineage, got {part!r}")


def natural(path: str) -> tuple[tuple[str, int, str], ...]:
    """Return a sort key in which numbers count as numbers.

    >>> sorted(["sample=10/a", "sample=9/a", "sample=9"], key=natural)
    ['sample=9', 'sample=9/a', 'sample=10/a']
    """
    return tuple(_natural_part(part) for part in path.split("/")) if path else ()


def _natural_part(part: str) -> tuple[str, int, str]:
    name, _, value = part.rpartition("=")
    return (name, int(value), value) if value.isascii() and value.isdigit() and len(value) < 20 else (part, -1, "")


# The tape

_TAPE: ContextVar[Tape | None] = ContextVar("aggregator_tape", default=None)
_open: list[Tape] = []

current_tape = _TAPE.get
"""Return the tape of this context, or None."""


def enter(tape: Tape) -> Token[Tape | None]:
    """Make a tape this context's current one."""
    _open.append(tape)
    return _TAPE.set(tape)


def leave(tape: Tape, token: Token[Tape | None]) -> None:
    """Restore the previous tape."""
    if tape in _open:
        _open.remove(tape)
    try:
        _TAPE.reset(token)
    except ValueError:  # exited in another context than entered, as by a pytest fixture of asyncio
        if _TAPE.get() is tape:
            _TAPE.set(None)


def tape_here(*, for_client: bool = False) -> Tape | None:
    """Return the tape of a call made now; `for_client` if another HTTP client makes the call.

    Raises CassetteMissError for a call without a context that may belong to several tapes, if one of them only plays.
    """
    tape = _TAPE.get()
    if tape is not None or not _open:
        return tape
    is_thread = threading.current_thread() is not threading.main_thread() and not portal.is_here()
    adopting = ("everything", "threads") if is_thread else ("everything",)  # contexts travel to threads of our own
    found = [one for one in _open if one.rules.adopts in adopting and (one.rules.clients or not for_client)]
    if len(found) == 1:
        return found[0]
    if playing := [one for one in found if not one.records]:
        raise _refuse_to_guess(found, playing)
    return None


def _refuse_to_guess(found: list[Tape], playing: list[Tape]) -> CassetteMissError:
    names = ", ".join(tape.name for tape in found)
    miss = CassetteMissError(
        f"Expected one open cassette for a call of a thread that was started outside of them all, got {len(found)} "
        f"({names}); start the thread inside of its cassette, or open one cassette at a time"
    )
    for tape in playing:
        tape.misses.append(miss)
    return miss


@contextmanager
def adopted() -> Iterator[None]:
    """Assign calls made inside, on another thread's event loop, to this thread's tape."""
    tape = tape_here() if _TAPE.get() is None else None
    if tape is None:
        yield
        return
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


# Observers of other clients


class Watch(Struct, frozen=True):
    """This context's observers and settings of requests, in addition to the tape."""

    clients: frozenset[str] = frozenset()
    exchanges: Exchanges | None = None
    passing: bool = False


WATCH: ContextVar[Watch | None] = ContextVar("aggregator_watch", default=None)


def watcher_here() -> Exchanges | None:
    """Return the observer of this context's clients."""
    watch = WATCH.get()
    return None if watch is None else watch.exchanges


def is_passing() -> bool:
    """Return True if the patches ignore this context's requests."""
    watch = WATCH.get()
    return watch is not None and watch.passing


@contextmanager
def passing() -> Iterator[None]:
    """Let the patches ignore requests made inside, because the tape was already asked; its tasks get no number."""
    token = WATCH.set(_PASSING)
    branch = portal.current_branch()
    if branch is not None:
        portal.set_branch(branch.uncounted())
    try:
        yield
    finally:
        if branch is not None:
            portal.set_branch(branch)
        WATCH.reset(token)


_PASSING = Watch(passing=True)


@contextmanager
def unwatched() -> Iterator[None]:
    """Hide requests made inside from observers, because they are counted already; a tape records them as before."""
    token = WATCH.set(None)
    try:
        yield
    finally:
        WATCH.reset(token)
