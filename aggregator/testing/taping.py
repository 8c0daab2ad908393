"""The cassette of one test: opened around it, the network refused while it replays, dropped unless it passes."""

from __future__ import annotations

import socket
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aggregator.cassettes.exchanges import exchange_id
from aggregator.cassettes.recorder import Mode, cassette
from aggregator.cassettes.rules import IGNORED_HOSTS, host_of, ignored_by, is_ignored
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteError, CassetteWarning

# Connections refused

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
    """Refuse connections, datagrams and name look-ups in a block, also to the loopback unless it is allowed.

    A host that is allowed by name is allowed at every address that it resolves to; `*.example.com` matches the hosts
    below it. Refusals are added to `met`, because code may hide the error, except those of `unreported` hosts, which
    look like a network that is down. Unix sockets and existing connections still work. uvloop connects below Python's
    sockets, so only its name look-ups are refused.
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
    """The allowed hosts, and the replacements of the functions that reach hosts."""

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
        """Raise CassetteError unless this host is allowed; None is a server's address, not a host.

        For an unreported host the error is that of a network that is down, which code can handle.
        """
        name = host.decode("latin-1") if isinstance(host, bytes) else host
        if name is None or str(name).lower() in self.allowed or getattr(_pairing, "active", False):
            return
        if is_ignored(f"//{name}/", self.patterns):
            return
        refusal = CassetteError(f"Expected no connection, got one to {name!r}: {self.why}")
        if str(name).lower() in self.unreported:
            raise socket.gaierror(socket.EAI_NONAME, f"{refusal}")
        self.met.append(refusal)
        raise refusal

    def leading(self, at: int) -> Callable[[Call], Call]:
        """Return the wrapper of a socket's method with an address at this position."""

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
        """Return the wrapper of an older look-up; the machine's own name is allowed for `http.server`."""

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


# The cassette of a test

Unplayed = Literal["ignore", "report", "error"]
SHOWN = 5
WIDER = "it comes before the test's cassette is open, from a fixture of wider scope than a function"
WIDER_REMEDY = "ask the model in a fixture of function scope, or allow the host (allowed_hosts=...)"


def refuse_early(path: Path, allowed_hosts: Iterable[str], met: list[CassetteError]) -> AbstractContextManager[None]:
    """Refuse the network to fixtures that are set up before the cassette of the first test that uses them."""
    return refuse_connections(f"{path} is replayed, and {WIDER}", allowed_hosts, remedy=WIDER_REMEDY, met=met)


class Taping:
    """A context manager around one test. `tape` is open inside; the plugin sets `passed` when the test passes."""

    tape: Tape

    def __init__(
        self,
        path: Path,
        *,
        mode: Mode,
        options: Mapping[str, Any],
        unplayed: Unplayed = "report",
        allowed_hosts: Iterable[str] = (),
        refusals: list[CassetteError],
    ) -> None:
        self.path = path
        self.passed = False
        self._refusals = refusals
        # threads and loops that were started before do not have this test's context
        self._cassette = cassette(path, mode, adopts="everything", **options)
        self._unplayed = unplayed
        ignored = ignored_by(options.get("ignore_hosts") or (), localhost=bool(options.get("ignore_localhost")))
        own = [host_of(f"//{entry}") for entry in ignored if entry not in IGNORED_HOSTS]
        self._allowed_hosts = (*allowed_hosts, *own)
        self._stack = ExitStack()
        self._found = 0

    def __enter__(self) -> Self:
        """Open the cassette; a tape that only plays refuses the network."""
        self.tape = self._stack.enter_context(self._cassette)
        self._found = len(self.tape.unplayed())
        if not self.tape.records:
            self._stack.enter_context(
                refuse_connections(
                    f"{self.path} is being replayed",
                    self._allowed_hosts,
                    met=self._refusals,
                    unreported=self.tape.left_out,
                )
            )
        return self

    def settle(self) -> None:
        """Raise the errors that the test's code hid, and for unplayed exchanges with unplayed='error'."""
        self._raise_hidden()
        left = self.tape.unplayed()
        if left and self._unplayed == "error":
            listing = "\n".join(f"  {exchange_id(row)}" for row in left[:SHOWN])
            more = f"\n  and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            raise CassetteError(
                f"Expected every exchange of {self.path} to be played, got {len(left)} left over:\n{listing}{more}\n"
                "record the test again (--cassette-mode=all), or allow it: unplayed='report'"
            )

    def _raise_hidden(self) -> None:
        self.tape.flush()
        self.tape.raise_remembered()
        for refusal in self._refusals:
            raise CassetteError(f"{refusal}") from refusal

    def unreported(self, report: str) -> str:
        """Return misses and blocked connections that the failure report does not already mention."""
        hidden = [
            error for error in (*self.tape.misses, *self._refusals) if f"{error}".partition("\n")[0] not in report
        ]
        missing = [f"{type(error).__name__}: {error}" for error in hidden]
        more = [f"and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
        return "\n\n".join(missing[:SHOWN] + more)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file of a test that passed, including its fixtures' calls at teardown; otherwise discard it."""
        try:
            if self.passed and error is None:
                self._raise_hidden()
        except CassetteError:
            self.passed = False
            raise
        finally:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # the summary lists them
                self._close(whole=self.passed and error is None)

    def _close(self, *, whole: bool) -> None:
        if whole:
            self._stack.close()
            return
        self.tape.discard()
        with suppress(CassetteError):  # the failed test has reported the errors
            self._stack.close()

    def account(self) -> dict[str, Any]:
        """Return as plain data what this test played, and whether unplayed exchanges are reported."""
        return account_of(self.path, self.tape) | {
            "rule": self._unplayed,
            "idle": self._unplayed != "ignore" and not self.tape.recorded and len(self.tape.unplayed()) == self._found,
        }


def account_of(path: Path, tape: Tape) -> dict[str, Any]:
    """Return the exchanges of its cassette that a passed test left unplayed."""
    return {"path": str(path), "unplayed": [exchange_id(row) for row in tape.unplayed()], "complete": True}
