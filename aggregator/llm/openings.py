"""Openings: long beginnings of prompts that several calls share, as the proposals of one step do.

A provider that caches by marks (Anthropic, Bedrock, OpenRouter for some models) charges more for what it writes and a
tenth for what it reads. Calls that are sent at once would all write, so the first one goes ahead and the others wait
until it has been answered. Where a provider has no marks, nothing is marked and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import asyncio


SHORTEST = 4096
"""Characters: no provider caches less than 1,024 tokens, which are about four characters each."""

_KEPT = 240.0  # seconds; providers keep an opening for five minutes after its last use
_PATIENCE = 60.0  # seconds that a call waits for the first one at most
_MOST = 256


class Opening(dict[str, Any]):
    """A message whose first `length` characters begin the prompts of other calls, too.

    An attribute and no key: a server without marks is sent the message as it is, and so the same bytes as without.
    """

    length: int = 0


class Mark(NamedTuple):
    """Where a prompt's opening ends: in which message, after how many characters."""

    message: int
    length: int


def find_mark(messages: Sequence[Mapping[str, Any]]) -> Mark | None:
    """Return where the opening of a prompt ends; None without one, or for one too short to be cached.

    >>> message = Opening(role="user", content="x" * 5000 + "y")
    >>> message.length = 5000
    >>> find_mark([message])
    Mark(message=0, length=5000)
    """
    before = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(message, Opening) and isinstance(content, str) and 0 < message.length < len(content):
            return Mark(index, message.length) if before + message.length >= SHORTEST else None
        before += len(content) if isinstance(content, str) else 0
    return None


def digest(messages: Sequence[Mapping[str, Any]], mark: Mark) -> bytes:
    """Return the digest of an opening, the messages before it included."""
    found = sha256()
    for message in messages[: mark.message]:
        found.update(f"{message.get('role')}\n{message.get('content')}\n".encode(errors="replace"))
    found.update(str(messages[mark.message]["content"])[: mark.length].encode(errors="replace"))
    return found.digest()


class Openings:
    """Lets one call of several with the same opening go first. One object serves every event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._warm: dict[bytes, float] = {}  # when an opening was used last
        self._leading: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[bytes, asyncio.Event]] = WeakKeyDictionary()

    async def enter(self, opening: bytes, timeout: float | None) -> bool:
        """Wait for the call that goes first, if one does; return True if it is this one, which then has to `leave`."""
        import asyncio  # here, as messages alone need no event loop

        now = self._clock()
        if now - self._warm.get(opening, -_KEPT) < _KEPT:
            self._warm[opening] = now
            return False
        leading = self._leading.setdefault(asyncio.get_running_loop(), {})
        first = leading.get(opening)
        if first is None:
            leading[opening] = asyncio.Event()
            return True
        try:
            async with asyncio.timeout(_PATIENCE if timeout is None else min(timeout, _PATIENCE)):
                await first.wait()
        except TimeoutError:
            pass  # better written twice than late
        return False

    def leave(self, opening: bytes) -> None:
        """Let the others go: the first call has been answered, or has failed and would fail for them as well."""
        import asyncio

        first = self._leading.get(asyncio.get_running_loop(), {}).pop(opening, None)
        if first is not None:
            first.set()
        self._warm[opening] = self._clock()
        if len(self._warm) > _MOST:
            del self._warm[min(self._warm, key=self._warm.__getitem__)]
