"""What one tape does, decided when it is opened and never changed afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from msgspec import Struct

from aggregator.cassettes.clients import families
from aggregator.cassettes.credentials import USUAL, Redaction
from aggregator.cassettes.hooks import BeforeRequest, BeforeResponse
from aggregator.cassettes.hosts import IGNORED_HOSTS
from aggregator.cassettes.keys import Ignore
from aggregator.cassettes.matching import MatchOn
from aggregator.cassettes.timing import Faults, Latency
from aggregator.errors import ConfigError

LineageRule = Literal["strict", "prefer"]

Adopts = Literal["nothing", "threads", "everything"]
"""Which calls without a tape in their context belong to this one, if no other tape is open."""


class TapeRules(Struct, frozen=True, kw_only=True):
    """How a tape matches, plays and reports.

    `adopts`: "threads" takes the calls of plain threads, which start without a context; "everything" also those of
    every context without a tape, as in a pytest process; "nothing" leaves both to the network.
    `plays_failures=False` repeats recorded calls that failed instead of playing them.
    `raises_again=False` reports misses at the end instead of raising them again, as vcrpy does.
    `keeps_exchanges` holds what is recorded in memory too, as `Tape.exchanges`.
    `expects_all=False` reports no exchanges that were left unplayed.
    `code` permits source in recorded suggestions to run in this process, see `aggregator.agents.consent`; source of
    sandboxed operations needs no permission.
    `ignore_hosts` are left to the network, see `aggregator.cassettes.hosts`; `match_on` says which requests are the
    same, see `aggregator.cassettes.matching`; with `allow_playback_repeats` a request that is asked more often than it
    was recorded gets its last answer again; `before_request` and `before_response` are vcrpy's hooks.
    `like_vcrpy=True` does what vcrpy does and we do not: it takes what clients ask through in-process transports, and
    sends streamed bodies in one piece. `coded=True` leaves the bodies of other clients' answers compressed.
    `clients` are the other HTTP clients that ask this tape, see `aggregator.cassettes.clients`.
    """

    lineage: LineageRule = "strict"
    ignore: Ignore = ()
    latency: Latency = "off"
    faults: Faults | None = None
    clients: str | Sequence[str] = ()
    adopts: Adopts = "threads"
    ignore_hosts: tuple[str, ...] = IGNORED_HOSTS
    match_on: MatchOn = None
    allow_playback_repeats: bool = False
    before_request: BeforeRequest | None = None
    before_response: BeforeResponse | None = None
    redaction: Redaction = USUAL
    like_vcrpy: bool = False
    coded: bool = False
    plays_failures: bool = True
    expects_all: bool = True
    raises_again: bool = True
    keeps_exchanges: bool = False
    code: bool | str | Collection[str] = False

    def __post_init__(self) -> None:
        """Reject options that cannot be meant, before anything is opened."""
        families(self.clients)
        if self.faults is not None and self.clients:
            raise ConfigError(
                f"Expected faults without clients, got both (clients={self.clients!r}): an injected fault reaches our "
                "own client alone, as others have exceptions of their own; leave one of them out"
            )
        if self.code is not False:
            from aggregator.agents.consent import check_consent  # loads what only agents with trained code need

            check_consent(self.code)


DEFAULT_RULES = TapeRules()
