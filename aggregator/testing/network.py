"""Refuse connections while a test replays, so that a test which must not use the network fails if it does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from aggregator.cassettes.hosts import is_ignored
from aggregator.errors import CassetteError

Call = Callable[..., Any]

REMEDY = "record the exchange, serve its client (clients=...), or allow the host (allowed_hosts=...)"
ADDRESS_AT = {"connect": 0, "connect_ex": 0, "sendto": -1, "sendmsg": 3}
"""Methods of a socket that may reach another host, and which argument is the address."""

_LOOPBACK = ("127.0.0.1", "::1")
_pairing = threading.local()  # Windows emulates socketpair(), which every event loop needs, by connecting to itself


@contextmanager
def refuse_connections(
    why: str,
    allowed_hosts: Iterable[str] = (),
    *,
    remedy: str = REMEDY,
    met: list[CassetteError] | None = None,
    unreported: Container[str] = (),
) -> Iterator[None]:
    """Refuse connections, datagrams and name look-ups within a block, to the loopback too unless it is allowed.

    A host that is allowed by name is allowed at every address that it resolves to; `*.example.com` stands for the hosts
    below it. Refusals are added to `met`, since code may hide the error, but not those of `unreported` hosts. Unix
    sockets and connections that were made before still work. uvloop connects below Python's sockets, so only its name
    look-ups are refused.
    """
    guard = _Guard(allowed_hosts, f"{why}; {remedy}", [] if met is None else met, unreported)
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
    """Which hosts may be reached, and the replacements of the functions that reach them."""

    def __init__(
        self, allowed_hosts: Iterable[str], why: str, met: list[CassetteError], unreported: Container[str]
    ) -> None:
        names = [host.lower() for host in allowed_hosts]
        self.allowed = {host.strip("[]") for host in names}
        self.patterns = tuple(host for host in names if "*" in host)
        self.unreported = unreported
        if "localhost" in self.allowed:
            self.allowed.update(_LOOPBACK)
        self.why, self.met = why, met

    def check(self, host: object) -> None:
        """Raise CassetteError unless this host is allowed. None is no host, as for a server that listens everywhere."""
        name = host.decode("latin-1") if isinstance(host, bytes) else host
        if name is None or str(name).lower() in self.allowed or getattr(_pairing, "active", False):
            return
        if is_ignored(f"//{name}/", self.patterns):
            return
        refusal = CassetteError(f"Expected no connection, got one to {name!r}: {self.why}")
        if str(name).lower() not in self.unreported:
            self.met.append(refusal)
        raise refusal

    def leading(self, at: int) -> Callable[[Call], Call]:
        """Return the wrapper of a socket's method whose argument at this position is an address."""

        def wrap(original: Call) -> Call:
            def guarded(self_: socket.socket, *args: Any) -> Any:
                if self_.family in (socket.AF_INET, socket.AF_INET6) and len(args) > at and args[at] is not None:
                    self.check(args[at][0])
                return original(self_, *args)

            return guarded

        return wrap

    def functions(self) -> dict[str, Callable[[Call], Call]]:
        """Return the wrappers of the functions of the module `socket`."""
        return {
            "socketpair": _pair,
            "getaddrinfo": self.resolving,
            "gethostbyname": self.naming(lambda found: [found]),
            "gethostbyname_ex": self.naming(lambda found: found[2]),
            "gethostbyaddr": self.naming(),
        }

    def resolving(self, original: Call) -> Call:
        """Wrap `getaddrinfo`; `localhost` needs no network, and resolves to its allowed addresses."""

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
        """Return the wrapper of an older look-up; the machine's own name is allowed, as `http.server` looks it up."""

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
