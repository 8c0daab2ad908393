"""The vcrpy adapter: other clients record to and play from our tape, through vcrpy's own patches.

vcrpy patches process-wide and gives each patch one cassette; two of its cassettes open in two tasks mix. Here a patch
is installed once per client, however many tapes are open, and its cassette asks the context which tape is meant.
Requests outside of any tape, and those of clients that the tape does not serve, go through untouched.

What of vcrpy is in use beyond its documentation; `tests/cassettes/test_vcr_contract.py` has a test for each line:

    vcr.cassette.Cassette                 __init__(path=, record_mode=), load(**kwargs), _path
        called by stubs and overridden:   can_play_response_for, play_response, append, filter_request, write_protected,
                                          find_requests_with_most_matches, __contains__, __len__, _load, _save
    vcr.cassette.CassetteContextDecorator from_args(cls, **kwargs), _patch_generator(cassette), calls cls.load and _save
    vcr.patch.CassettePatcherBuilder      _aiohttp, _boto3, _httplib, _httplib2, _httpx, _httpx2, _requests, _tornado,
                                          _urllib3: each returns patchers; those of functions are unittest.mock's, with
                                          `new` and `attribute`, and `new.__wrapped__` is the original
    vcr.stubs                             boto3_stubs, httplib2_stubs, requests_stubs, urllib3_stubs can be imported
    vcr.request.Request                   method, uri, body, headers; takes an attribute of ours; one object a request
    responses                             {"status": {code, message}, "headers": {name: [value]}, "body": {string}}
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from typing import Any

from vcr.cassette import Cassette, CassetteContextDecorator
from vcr.patch import CassettePatcherBuilder
from vcr.record_mode import RecordMode
from vcr.request import Request

from aggregator.cassettes.clients import FAMILIES, families, from_reply, is_passing, to_reply, to_request
from aggregator.cassettes.current import tape_here
from aggregator.cassettes.slots import Slot
from aggregator.cassettes.tape import Tape
from aggregator.records import HTTPReply

_ASYNC_FUNCTIONS = frozenset({"_request", "handle_async_request"})
_GUARDED = frozenset({"aiohttp", "httpx"})  # clients whose patches are plain functions
_ASYNC_FAMILIES = frozenset({"tornado"})  # of the others; their stubs cannot wait, so answers come at once

# vcrpy's patches are process-wide, so what is patched is the process's state, and no tape's.
_lock = threading.RLock()
_served: dict[Tape, frozenset[str]] = {}
_installed: dict[str, tuple[int, CassetteContextDecorator]] = {}

for _stub in ("boto3", "httplib2", "requests", "urllib3"):
    with suppress(ImportError):  # no such client here; else now, since the stubs derive from what other patches replace
        import_module(f"vcr.stubs.{_stub}_stubs")

_pause: ContextVar[float | None] = ContextVar("aggregator_pause", default=None)
_live: ContextVar[_Turn | None] = ContextVar("aggregator_live_turn", default=None)


@contextmanager
def serving(tape: Tape, clients: str | Iterable[str]) -> Iterator[None]:
    """Serve other clients from `tape` for the time of a block: "all" or a list of names, as `["httpx", "requests"]`."""
    wanted = families(clients)
    with ExitStack() as stack:
        for family in sorted(wanted):
            stack.enter_context(_patches(family))
        with _lock:
            _served[tape] = wanted
        stack.callback(_served.pop, tape)
        yield


@contextmanager
def _patches(family: str) -> Iterator[None]:
    """Hold the patches of one client: the first holder installs them, the last takes them away."""
    with _lock:
        count, patched = _installed.get(family, (0, None))
        if patched is None:
            patched = _Patches.from_args(IndexedCassette, path=f"<{family}>", family=family)
            patched.__enter__()
        _installed[family] = (count + 1, patched)
    try:
        yield
    finally:
        with _lock:
            count, patched = _installed.pop(family)
            if count > 1:
                _installed[family] = (count - 1, patched)
            else:
                patched.__exit__(None, None, None)


def serving_tape(family: str) -> Tape | None:
    """Return the tape that a request of this client belongs to here and now; None: let it through."""
    tape = None if is_passing() else tape_here()
    if tape is None:
        return None
    if tape.rules.clients:
        tape.refuse_if_closed()
    return tape if family in _served.get(tape, ()) else None


class _Turn:
    """What the tape said about one request: its slot, and the reply to play, if any."""

    __slots__ = ("asked", "issued", "reply", "slot", "tape")

    def __init__(self, tape: Tape, request: Request) -> None:
        self.tape = tape
        self.asked = (request.method, request.uri)
        self.slot: Slot = tape.issue(to_request(request.method, request.uri, request.body, request.headers))
        self.reply: HTTPReply | None = None
        self.issued = time.perf_counter()

    def play(self) -> None:
        """Look for a recorded answer, and remember the turn as live where there is none."""
        self.reply = self.tape.play(self.slot)
        if self.reply is None:
            _live.set(self)


class IndexedCassette(Cassette):  # type: ignore[misc] # vcrpy is untyped
    """What vcrpy's stubs ask; answers from the tape of the context, in O(1) however long the tape is."""

    def __init__(self, path: str, family: str) -> None:
        super().__init__(path=path, record_mode=RecordMode.NEW_EPISODES)
        self.family = family

    def _load(self) -> None:
        """Nothing: the tape has its own file."""

    def _save(self, force: bool = False) -> None:
        """Nothing: the tape has written each exchange already."""

    @property
    def write_protected(self) -> bool:
        """False: whether a request may go live is the tape's decision, and it has raised where not."""
        return False

    def filter_request(self, request: Request) -> Request | None:
        """Return the request where a tape serves it, else None, so that it goes live and unrecorded."""
        return request if serving_tape(self.family) is not None else None

    def can_play_response_for(self, request: Request) -> bool:
        """Ask the tape once for each request object; raises CassetteMissError where going live is not allowed."""
        turn = self._turn(request)
        return turn is not None and turn.reply is not None

    __contains__ = can_play_response_for

    def play_response(self, request: Request) -> dict[str, Any]:
        """Return what `can_play_response_for` found."""
        turn = self._turn(request)
        if turn is None or turn.reply is None:
            raise KeyError(f"expected a request that the tape can play, got {request}")
        delay = turn.tape.delay(turn.reply)
        if self.family in _GUARDED:
            _pause.set(delay)
        elif delay and self.family not in _ASYNC_FAMILIES:
            time.sleep(delay)
        return from_reply(turn.reply)

    def append(self, request: Request, response: dict[str, Any]) -> None:
        """Record a live answer. The first hop of a redirect comes as a new object, the others unasked."""
        turn: _Turn | None = getattr(request, "aggregator_turn", None)
        if turn is None and (tape := serving_tape(self.family)) is not None:
            live = _live.get()
            turn = live if live is not None and live.asked == (request.method, request.uri) else _Turn(tape, request)
        _live.set(None)
        if turn is not None:
            waited = (time.perf_counter() - turn.issued) * 1e3
            turn.tape.record(turn.slot, to_reply(response, waited))

    def find_requests_with_most_matches(self, request: Request) -> list[tuple[Request, list[str], list[str]]]:
        """Return the request itself: stubs ask for the recorded hop of a redirect, which is found by its key."""
        return [(request, [], [])]

    def __len__(self) -> int:
        return 0

    def _turn(self, request: Request) -> _Turn | None:
        """The request's turn, taken at its first question: stubs ask up to three times about one object."""
        turn: _Turn | None = getattr(request, "aggregator_turn", None)
        if turn is None and (tape := serving_tape(self.family)) is not None:
            turn = _Turn(tape, request)
            turn.play()  # raises a miss, and again when the stub asks again
            request.aggregator_turn = turn
        return turn


class _Patches(CassetteContextDecorator):  # type: ignore[misc] # vcrpy is untyped
    """vcrpy's patches of one client only, whatever vcrpy's version; those of functions let other contexts through."""

    def _patch_generator(self, cassette: IndexedCassette) -> Iterator[IndexedCassette]:
        builder = CassettePatcherBuilder(cassette)
        patchers = [patcher for group in FAMILIES[cassette.family] for patcher in getattr(builder, f"_{group}")()]
        with ExitStack() as stack:
            for patcher in patchers:
                if cassette.family in _GUARDED:
                    patcher.new = _guard(patcher.new, cassette.family, patcher.attribute)
                stack.enter_context(patcher)
            yield cassette


@contextmanager
def _withdrawing() -> Iterator[None]:
    """Take a live request back that fails: nothing of it is recorded, so whoever tries again has its place."""
    _live.set(None)
    _pause.set(None)
    try:
        yield
    except Exception:
        if (turn := _live.get()) is not None:
            turn.tape.withdraw(turn.slot)
            _live.set(None)
        raise


def _guard(served: Callable[..., Any], family: str, attribute: str) -> Callable[..., Any]:
    """Call vcrpy's stub where a tape serves this context, else the original: stubs read streams to their end."""
    original: Callable[..., Any] = served.__wrapped__  # type: ignore[attr-defined] # set by functools.wraps

    @wraps(original)
    async def guarded_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        if serving_tape(family) is None:
            return await original(self, *args, **kwargs)
        with _withdrawing():
            response = await served(self, *args, **kwargs)
        if (pause := _pause.get()) is not None:
            _pause.set(None)
            await asyncio.sleep(pause)  # a played reply gives up its turn, as a live one would
        return response

    @wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if serving_tape(family) is None:
            return original(self, *args, **kwargs)
        with _withdrawing():
            response = served(self, *args, **kwargs)
        if pause := _pause.get():
            time.sleep(pause)
        _pause.set(None)
        return response

    return guarded_async if attribute in _ASYNC_FUNCTIONS else guarded
