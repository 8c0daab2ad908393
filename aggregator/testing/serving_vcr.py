"""pytest-recording's `vcr` tests, served by our indexed tape: same marks, same files, no scan of the whole cassette.

A test's own `match_on` says what is matched, and a miss is vcrpy's own exception. Hooks, filters, matchers of
one's own and options that change how files are stored leave a test with stock vcrpy.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vcr import VCR
from vcr.cassette import Cassette
from vcr.request import Request

from aggregator.cassettes.clients import from_reply
from aggregator.cassettes.matching import NAMES
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteWarning
from aggregator.records import HTTPReply, HTTPRequest

_IGNORING = ("ignore_hosts", "ignore_localhost")
SERVED_OPTIONS = frozenset(
    {
        *_IGNORING,
        "additional_matchers",
        "allow_playback_repeats",
        "allowed_hosts",  # of pytest-recording itself
        "cassette_library_dir",
        "decode_compressed_response",
        "filter_headers",  # the tape keeps none that could hold a secret
        "match_on",
        "matchers",
        "path_transformer",
        "persister",
        "record_mode",
        "serializers",
        "use_cassette",
    }
)
"""What may be set: the tape does it, or it is looked at by itself."""


class ServedCassette(Cassette):  # type: ignore[misc] # vcrpy is untyped
    """What the fixture `vcr` is then: what the file holds and what is being recorded, and what the tape plays."""

    def __init__(self, tape: Tape, merged: dict[str, Any]) -> None:
        super().__init__(
            path=merged["path"],
            match_on=merged["match_on"],
            record_mode=merged["record_mode"],
            before_record_request=merged["before_record_request"],
        )
        self.tape = tape
        self._rows = tape.unplayed()
        self._loaded = [(_request_of(row.exchange().request), _response_of(row.exchange().reply)) for row in self._rows]

    @property
    def data(self) -> list[tuple[Request, dict[str, Any]]]:
        """Requests and answers, those of the file first."""
        if "tape" not in vars(self):  # while vcrpy's own class is being made
            return []
        recorded = [(_request_of(one.request), _response_of(one.reply)) for one in self.tape.exchanges]
        return [*self._loaded, *recorded]

    @data.setter
    def data(self, value: object) -> None:
        """Take vcrpy's empty list."""

    @property
    def play_counts(self) -> Counter[int]:
        """How often each exchange of the file was played."""
        if "tape" not in vars(self):
            return Counter()
        unplayed = {id(row) for row in self.tape.unplayed()}
        return Counter({index: 1 for index, row in enumerate(self._rows) if id(row) not in unplayed})

    @play_counts.setter
    def play_counts(self, value: object) -> None:
        """Take vcrpy's empty counter."""

    @property
    def play_count(self) -> int:
        """How many answers were played."""
        return self.tape.plays

    @property
    def dirty(self) -> bool:
        """Whether something was recorded."""
        return "tape" in vars(self) and self.tape.recorded > 0

    @dirty.setter
    def dirty(self, value: object) -> None:
        """Take vcrpy's False."""

    def rewind(self) -> None:
        """Play from the beginning again."""
        self.tape.rewind()

    def __len__(self) -> int:
        return len(self._rows) + len(self.tape.exchanges)


def _request_of(request: HTTPRequest) -> Request:
    return Request(request.method, request.url, request.body, dict(request.headers))


def _response_of(reply: HTTPReply) -> dict[str, Any]:
    return from_reply(reply)


def serve_vcr(vcr: Any, note: Callable[[Path, Tape], None]) -> None:
    """Make this VCR's `use_cassette` open our tape, for every test whose options we support.

    `note` is called with each tape when it has been opened and again when it has been closed.
    """
    stock: Callable[..., AbstractContextManager[Any]] = vcr.use_cassette

    def use_cassette(path: str, **options: Any) -> AbstractContextManager[Any]:
        return _served(vcr, path, options, note) if can_serve(vcr, options) else stock(path, **options)

    vcr.use_cassette = use_cassette


def can_serve(vcr: Any, options: dict[str, Any]) -> bool:
    """Return True if the tape supports these options and those that a hook has set in the VCR.

    Any option that differs from vcrpy's default and is not known to be supported gives False.
    """
    plain = vars(VCR())
    asked = {**vars(vcr), **options}
    changed = {name for name, value in asked.items() if (value or None) != (plain.get(name) or None)}
    return (
        changed <= SERVED_OPTIONS
        and None not in matched_by(vcr, options)
        and getattr(asked["persister"], "extra_paths", None) == []  # pytest-recording's own, of one cassette
    )


def matched_by(vcr: Any, options: dict[str, Any]) -> tuple[str | None, ...]:
    """Return what a test matches on: names of vcrpy's own matchers, and None for one that no tape has.

    Those are matchers that the test registered, and headers, of which a recording holds only some.
    """
    plain = VCR().matchers
    names = (*options.get("match_on", vcr.match_on), *options.get("additional_matchers", ()))
    return tuple(name if name in NAMES and vcr.matchers[name] is plain[name] else None for name in names)


@contextmanager
def _served(
    vcr: Any, path: str, options: dict[str, Any], note: Callable[[Path, Tape], None]
) -> Iterator[ServedCassette]:
    merged = vcr.get_merged_config(path=path, **options)
    path = merged["path"] = merged["path_transformer"](path) if merged["path_transformer"] else path
    asked = {**vars(vcr), **options}
    rules = TapeRules(
        clients="all",
        adopts="everything",
        match_on=tuple(name for name in matched_by(vcr, options) if name is not None),
        ignore_hosts=(),  # the test says itself what it ignores
        allow_playback_repeats=merged["allow_playback_repeats"],
        before_request=merged["before_record_request"] if any(asked.get(name) for name in _IGNORING) else None,
        raises_again=False,  # nor does vcrpy
        keeps_exchanges=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # vcrpy does not report them
        with cassette(Path(path), merged["record_mode"].value, rules=rules) as tape:
            note(Path(path), tape)
            yield ServedCassette(tape, merged)
    note(Path(path), tape)
