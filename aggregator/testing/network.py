"""Refuse connections while a test replays: a test that must not need the network cannot come to need it unseen."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from aggregator.errors import CassetteError

Call = Callable[..., Any]

REMEDY = "record the exchange, serve its client (clients=...), or allow the host (allowed_hosts=...)"
ADDRESS_AT = {"connect": 0, "connect_ex": 0, "sendto": -1, "sendmsg": 3}
"""Methods of a socket that may lead somewhere new, and which argument says where."""

_LOOPBACK = ("127.0.0.1", "::1")
_pairing = threading.local()  # Windows emulates socketpair(), which every event loop needs, by connecting to itself


@contextmanager
def refused(
    why: str, allowed_hosts: Iterable[str] = (), *, remedy: str = REMEDY, met: list[CassetteError] | None = None
) -> Iterator[None]:
    """Refuse connections, datagrams and look-ups of names for the time of a block; the loopback too, unless allowed.

    A host allowed by name is so at every address that its look-up tells. What was refused is noted in `met`, since
    code may hide the error. Unix sockets stay open, and so do connections that were made before. uvloop connects
    below Python's sockets and is only met at its look-up of names.
    """
    guard = _Guard(allowed_hosts, f"{why}; {remedy}", [] if met is None else met)
    kind: Any = socket.socket
    methods = [(kind, name, guard.leading(at)) for name, at in ADDRESS_AT.items() if hasattr(kind, name)]
    functions = [(socket, name, wrap) for name, wrap in guard.functions().items()]
    with ExitStack() as stack:
        for owner, name, wrap in (*methods, *functions):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, wrap(original))
        yield


class _Guard:
    """Which hosts may be reached, and what stands in for the functions that reach them."""

    def __init__(self, allowed_hosts: Iterable[str], why: str, met: list[CassetteError]) -> None:
        self.allowed = {host.lower() for host in allowed_hosts}
        if "localhost" in self.allowed:
            self.allowed.update(_LOOPBACK)
        self.why, self.met = why, met

    def check(self, host: object) -> None:
        """Raise unless this host is allowed; None stands for no host, as where a server listens."""
        name = host.decode("latin-1") if isinstance(host, bytes) else host
        if name is None or str(name).lower() in self.allowed or getattr(_pairing, "active", False):
            return
        refusal = CassetteError(f"expected no connection, got one to {name!r}: {self.why}")
        self.met.append(refusal)
        raise refusal

    def leading(self, at: int) -> Callable[[Call], Call]:
        """Return what guards a method of a socket whose argument at this place is an address."""

        def wrap(original: Call) -> Call:
            def guarded(self_: socket.socket, *args: Any) -> Any:
                if self_.family in (socket.AF_INET, socket.AF_INET6) and len(args) > at and args[at] is not None:
                    self.check(args[at][0])
                return original(self_, *args)

            return guarded

        return wrap

    def functions(self) -> dict[str, Callable[[Call], Call]]:
        """Return what guards the functions of the module `socket`."""
        return {
            "socketpair": _pair,
            "getaddrinfo": self.resolving,
            "gethostbyname": self.naming(lambda found: [found]),
            "gethostbyname_ex": self.naming(lambda found: found[2]),
            "gethostbyaddr": self.naming(),
        }

    def resolving(self, original: Call) -> Call:
        """Guard `getaddrinfo`; `localhost` needs no network, and leads to those of its addresses that are allowed."""

        def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
            if host in ("localhost", b"localhost") and "localhost" not in self.allowed:
                found = [info for info in original(host, *args, **kwargs) if info[4][0] in self.allowed]
                if not found:
                    self.check(host)
                return found
            self.check(host)
            found = original(host, *args, **kwargs)
            self.allowed.update(info[4][0] for info in found if host is not None)
            return found

        return look_up

    def naming(self, addresses: Callable[[Any], list[str]] = lambda _: []) -> Callable[[Call], Call]:
        """Return what guards an older look-up; of the machine itself it is free, as `http.server` asks its own name."""

        def wrap(original: Call) -> Call:
            def look_up(host: Any) -> Any:
                if host in ("localhost", socket.gethostname(), *_LOOPBACK):
                    return original(host)
                self.check(host)
                found = original(host)
                self.allowed.update(addresses(found))
                return found

            return look_up

        return wrap


def _pair(original: Call) -> Call:
    def pair(*args: Any, **kwargs: Any) -> Any:
        before, _pairing.active = getattr(_pairing, "active", False), True
        try:
            return original(*args, **kwargs)
        finally:
            _pairing.active = before

    return pair
