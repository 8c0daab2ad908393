"""One request of another HTTP client: shown to observers, answered by the tape, or sent and recorded.

The patches of each client (`patches/`) convert its requests and answers; their common part is here. A patch calls
`is_wanted` and `leaves_out` first, which are cheap; only then it reads the request's body and begins a turn.

    turn = begin("httpx", request)      # raises a miss; the turn holds the reply to play or the failure to raise
    with turn.sending(ClientError):     # else: send the request; an error is recorded here
        ...
    turn.finish(reply)
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from aggregator import portal
from aggregator.cassettes.clients import families, kind_of, to_reply
from aggregator.cassettes.lineage import WATCH, Watch, is_passing, passing, tape_here
from aggregator.cassettes.payloads import is_stream
from aggregator.cassettes.slots import Slot
from aggregator.cassettes.tape import NO_ANSWER, RecordedError, Tape, miss_class, recorded_failure
from aggregator.errors import AggregatorError, APIConnectionError, CassetteMissError
from aggregator.records import HTTPReply, HTTPRequest, Usage

# ---- observers


class Answered(Struct, frozen=True, kw_only=True):
    """One request of another client with its result; exactly one of `reply` and `failure` is set.

    `client` is its name in `clients.FAMILIES`. `failure` is (kind, message), such as ("httpx.ConnectError", "refused").
    `milliseconds` is its duration, or the recorded one if it `was_played`.
    """

    client: str
    request: HTTPRequest
    reply: HTTPReply | None = None
    failure: tuple[str, str] | None = None
    milliseconds: float = 0.0
    was_played: bool = False


class Noted(Struct, frozen=True, kw_only=True):
    """Facts that an observer read from an answer, to be recorded with it."""

    model: str = ""
    usage: Usage | None = None


class Exchanges(Protocol):
    """Observes the requests of other clients, with or without a cassette; called in the context of each call.

    An exception of `before` reaches the code that made the request; an SDK that retries every error gets an answer that
    it does not retry. Each `before` is followed by one `after` or `dropped`.
    """

    def before(self, request: HTTPRequest, /) -> None:
        """Called before a request is answered; raise to refuse it, as a budget does."""
        ...

    def after(self, exchange: Answered, /) -> Noted | None:
        """Called with the answer, before it is recorded and used."""
        ...

    def dropped(self, request: HTTPRequest, /, *, was_sent: bool) -> None:
        """Called for a request without an answer: a miss, or a cancelled one."""
        ...


@contextmanager
def observing(exchanges: Exchanges, clients: str | Iterable[str]) -> Iterator[None]:
    """Show these clients' requests inside, while their patches are held (`cassettes.patches.patched`)."""
    token = WATCH.set(Watch(families(clients), exchanges))
    try:
        yield
    finally:
        WATCH.reset(token)


@lru_cache(maxsize=64)
def _families(clients: str | tuple[str, ...]) -> frozenset[str]:
    return families(clients)


def served_by(tape: Tape) -> frozenset[str]:
    """Return the clients that a tape records."""
    clients = tape.rules.clients
    return _families(clients if isinstance(clients, str) else tuple(clients))


def is_wanted(client: str, *, in_process: bool = False) -> bool:
    """Return True if a request of this client, made now, needs a turn; otherwise it is not intercepted.

    One through an in-process transport needs none unless the tape records these. Raises CassetteError if it outlived
    its cassette.
    """
    if in_process and ((tape := tape_here(for_client=True)) is None or not tape.rules.like_vcrpy):
        return False
    watch = WATCH.get()
    if watch is not None and (watch.passing or client in watch.clients):
        return not watch.passing
    tape = tape_here(for_client=True)
    if tape is None or not tape.rules.clients:
        return False
    tape.refuse_if_closed()
    return not tape.records or client in served_by(tape)


def leaves_out(client: str, url: object) -> bool:
    """Return True if a wanted request is sent to the network, because its host is ignored.

    It must be sent within `passing()`. An observed one gets a turn without a tape.
    """
    watch = WATCH.get()
    if watch is not None and client in watch.clients:
        return False
    tape = tape_here(for_client=True)
    return tape is not None and tape.leaves_out(str(url))


def refuse(client: str, method: str, url: str) -> CassetteMissError | None:
    """Return the error for a client that no tape can record, and remember it; None if it is allowed.

    It is allowed if a tape records, or covers no other clients.
    """
    tape = None if is_passing() else tape_here(for_client=True)
    if tape is None or not tape.rules.clients:
        return None
    tape.refuse_if_closed()
    return None if tape.records else _refused(tape, client, method, url)


def _refused(tape: Tape, client: str, method: str, url: str) -> CassetteMissError:
    known = f'add "{client}" to clients=, or use clients="all"'
    asked = f"{method} {url}".rstrip()
    miss = miss_class()(
        f"Expected only calls that {tape.name} can answer while it plays, got {asked} by {client}, which "
        f"clients={tape.rules.clients!r} does not serve; "
        + (known if client in families("all") else "make it outside of the cassette, or replace it by a fake")
    )
    tape.misses.append(miss)
    return miss


# ---- the turn of one request


class Turn:
    """One request of another client: its slot on the tape, and the reply to play or the failure to raise, if any."""

    __slots__ = ("_began", "_is_served", "_watch", "client", "failure", "reply", "request", "slot", "tape")

    def __init__(
        self,
        client: str,
        request: HTTPRequest,
        tape: Tape | None,
        watch: Exchanges | None,
        *,
        is_served: bool = False,
    ) -> None:
        self.client, self.request, self.tape, self._watch = client, request, tape, watch
        self._is_served = is_served
        self.slot: Slot | None = None
        self.reply: HTTPReply | None = None
        self.failure: RecordedError | None = None
        self._began = time.perf_counter()

    def ask(self) -> None:
        """Take a ticket and look up a recorded answer; raises CassetteMissError."""
        tape = self.tape
        if tape is None:
            return
        try:
            admitted = tape.admit(self.request)
            if admitted is None:
                self.tape = None
                return
            if not (tape.records or self._is_served or self.client in served_by(tape)):
                raise _refused(tape, self.client, self.request.method, self.request.url)
            self.slot = tape.issue(admitted)
            self.reply = tape.play(self.slot)
        except CassetteMissError as miss:
            self._drop(was_sent=False)
            if not _retries_all_errors(self.request):
                raise
            self.reply = _as_answer(miss)
            return
        except APIConnectionError as failure:
            self.failure = recorded_failure(failure)
            self._note(failure=(self.failure.kind, self.failure.message), was_played=True)
            return
        if self.reply is not None:
            self._note(reply=self.reply, milliseconds=self.reply.milliseconds, was_played=True)

    def _drop(self, *, was_sent: bool) -> None:
        if self._watch is not None:
            self._watch.dropped(self.request, was_sent=was_sent)

    def _note(self, **found: Any) -> Noted:
        if self._watch is None:
            return Noted()
        return self._watch.after(Answered(client=self.client, request=self.request, **found)) or Noted()

    @property
    def delay(self) -> float:
        """Return the seconds that a replay waits for its answer."""
        return 0.0 if self.tape is None or self.reply is None else self.tape.delay(self.reply)

    def answer(self, status: int, reason: str | None, headers: Iterable[tuple[Any, Any]], body: bytes) -> HTTPReply:
        """Return a client's answer in our form, for the tape."""
        return to_reply(status, reason, headers, body, decode=self.tape is None or not self.tape.rules.coded)

    def wait(self) -> None:
        """Wait as long as the recorded answer took, if the cassette has that option."""
        if delay := self.delay:
            time.sleep(delay)

    async def await_turn(self) -> None:
        """Wait in the same way; yield to the event loop in any case, as a live answer would."""
        await sleep(self.delay)

    def _measure(self, reply: HTTPReply | None, failure: tuple[str, str] | None = None) -> tuple[HTTPReply, Noted]:
        """Return an answer with its duration, and the facts that an observer read from it."""
        waited = round((time.perf_counter() - self._began) * 1e3, 3)
        if self.tape is not None and self.tape.rules.like_vcrpy:
            waited = 0.0  # its files hold no times
        if reply is not None:
            reply = msgspec.structs.replace(reply, milliseconds=waited)
        noted = self._note(reply=reply, failure=failure, milliseconds=waited)
        return reply or msgspec.structs.replace(NO_ANSWER, milliseconds=waited), noted

    def finish(self, reply: HTTPReply) -> None:
        """Record a live answer, before it is used; pending answers of other threads are written with it."""
        reply, noted = self._measure(reply)
        if self.tape is not None and self.slot is not None:
            self.tape.record(self.slot, reply, usage=noted.usage, model=noted.model)

    async def afinish(self, reply: HTTPReply) -> None:
        """Record a live answer; answers of the same event loop iteration are written together."""
        reply, noted = self._measure(reply)
        if self.tape is None or self.slot is None:
            return
        if _running_loop() is None:  # trio
            self.tape.record(self.slot, reply, usage=noted.usage, model=noted.model)
        else:
            await self.tape.arecord(self.slot, reply, usage=noted.usage, model=noted.model)

    @contextmanager
    def sending(
        self, *failures: type[BaseException], module: str = "", text: Callable[[Any], str] = str
    ) -> Iterator[None]:
        """Send the request, and read its answer, inside this block; its patches leave that to this turn.

        An error of `failures` is recorded: under its name in `module`, or in the standard library, with the message
        that `text` reads. Any other exception withdraws the request.
        """
        with passing():
            try:
                yield
            except failures as error:
                self.fail(kind_of(error, module), text(error))
                raise
            except BaseException:
                self.withdraw()
                raise

    def fail(self, kind: str, message: str) -> None:
        """Record that the request got no answer, with the reason: it replays as this failure."""
        reply, noted = self._measure(None, (kind, message))
        if self.tape is not None and self.slot is not None:
            failure = RecordedError(message, kind=kind)
            self.tape.record(self.slot, reply, usage=noted.usage, model=noted.model, failure=failure)

    def tee(self, status: int, reason: str | None, headers: Iterable[tuple[Any, Any]]) -> Tee | None:
        """Return the collector of a streamed answer while its client reads it; None if it must be read first.

        A recording must hold an answer before it is used; other answers are read completely anyway.
        """
        given = list(headers)
        kind = next((value for name, value in given if _text(name).lower() == "content-type"), "")
        is_streamed = self.slot is None and status < 300 and is_stream({"content-type": _text(kind)})
        return Tee(self, status, reason, given) if is_streamed else None

    def withdraw(self) -> None:
        """Withdraw a request that is not recorded, for example a cancelled one."""
        self._drop(was_sent=True)
        if self.tape is not None and self.slot is not None:
            self.tape.withdraw(self.slot)


class Tee:
    """Collects an answer that its client reads piece by piece, and shows it once: at its end, or when it is left."""

    def __init__(self, turn: Turn, status: int, reason: str | None, headers: list[tuple[Any, Any]]) -> None:
        self._turn: Turn | None = turn
        self._head = (status, reason, headers)
        self._pieces: list[bytes] = []

    def take(self, piece: bytes) -> bytes:
        """Add a piece, and return it."""
        if self._turn is not None:
            self._pieces.append(piece)
        return piece

    def end(self, *, is_plain: bool = False) -> None:
        """Show the collected answer; `is_plain` if the client has decompressed it already."""
        turn, self._turn = self._turn, None
        if turn is not None:
            status, reason, headers = self._head
            if is_plain:
                headers = [(name, value) for name, value in headers if _text(name).lower() != "content-encoding"]
            turn.finish(turn.answer(status, reason, headers, b"".join(self._pieces)))

    def fail(self, kind: str, message: str) -> None:
        """Show that the answer was truncated."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.fail(kind, message)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def begin(client: str, request: HTTPRequest, *, shown: Exchanges | None = None) -> Turn:
    """Begin the turn of a wanted request: show it, take its ticket, look up its answer.

    Our own client gives its observer as `shown`, and is recorded by any tape. Raises CassetteMissError if there is no
    answer, and the observer's exceptions.
    """
    portal.refuse_strays(f"a call of {client}")
    watch, tape, is_ours = WATCH.get(), tape_here(for_client=True), shown is not None
    if tape is not None and not tape.rules.clients and not is_ours:
        tape = None
    if shown is None and watch is not None and client in watch.clients:
        shown = watch.exchanges
    if shown is not None:
        try:
            shown.before(request)
        except AggregatorError as refusal:
            if not _retries_all_errors(request):
                raise
            turn = Turn(client, request, None, None)
            turn.reply = _as_answer(refusal)
            return turn
    if tape is not None and tape.records and not is_ours and client not in served_by(tape):
        tape = None
    turn = Turn(client, request, tape, shown, is_served=is_ours)
    turn.ask()
    return turn


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def sleep(seconds: float) -> None:
    """Wait in asyncio and in trio."""
    if _running_loop() is not None:
        await asyncio.sleep(seconds)
    elif (trio := sys.modules.get("trio")) is not None:
        await trio.sleep(seconds)


def _retries_all_errors(request: HTTPRequest) -> bool:
    """Return True if the request was made by an SDK that takes every exception for a lost connection, and retries."""
    return any(name.lower().startswith("x-stainless-") for name in request.headers)


MISS_STATUS = 424
"""Failed Dependency: a status that no SDK retries or takes for its provider's answer."""


def _as_answer(refusal: AggregatorError) -> HTTPReply:
    """Return a miss or a refusal as an answer that its SDK raises at once; the tape or the run raises it again."""
    kind = "cassette_miss" if isinstance(refusal, CassetteMissError) else "refused"
    error = {"message": f"{refusal}", "type": kind, "code": kind, "param": None}
    return HTTPReply(
        status=MISS_STATUS,
        reason="Failed Dependency",
        headers={"content-type": "application/json", "x-should-retry": "false"},
        body=msgspec.json.encode({"type": "error", "error": error}),
    )
