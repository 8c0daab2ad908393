"""Refuse connections while a test replays: a test that must not need the network cannot come to need it unseen."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from aggregator.errors import CassetteError

_pairing = threading.local()  # Windows emulates socketpair(), which every event loop needs, by connecting to itself


@contextmanager
def refused(why: str, allowed_hosts: Iterable[str] = ()) -> Iterator[None]:
    """Refuse connections and look-ups of names for the time of a block; the loopback too, unless allowed by name.

    Unix sockets stay open. uvloop connects below Python's sockets and is only met at its look-up of names.
    """
    allowed = frozenset(allowed_hosts)
    kind: Any = socket.socket
    saved = kind.connect, kind.connect_ex, socket.socketpair, socket.getaddrinfo

    def check(host: object) -> None:
        name = host.decode("latin-1") if isinstance(host, bytes) else host
        if name is not None and name not in allowed and not getattr(_pairing, "active", False):
            raise CassetteError(
                f"expected no connection, got one to {name!r}: {why}; "
                "record the exchange, serve its client (clients=...), or allow the host (allowed_hosts=...)"
            )

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return guarded

    def pair(*args: Any, **kwargs: Any) -> Any:
        before, _pairing.active = getattr(_pairing, "active", False), True
        try:
            return saved[2](*args, **kwargs)
        finally:
            _pairing.active = before

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return saved[3](host, *args, **kwargs)

    kind.connect, kind.connect_ex = guard(saved[0]), guard(saved[1])
    socket.socketpair, socket.getaddrinfo = pair, look_up
    try:
        yield
    finally:
        kind.connect, kind.connect_ex, socket.socketpair, socket.getaddrinfo = saved
