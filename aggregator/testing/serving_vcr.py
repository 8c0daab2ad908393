"""pytest-recording's `vcr` tests on our indexed tape: same marks, same files, no scan of the whole cassette.

A test's own `match_on` decides what is compared, and a miss is vcrpy's own exception. A test with hooks, filters,
custom matchers or options that change how files are stored uses stock vcrpy.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from vcr import VCR
from vcr.cassette import Cassette, CassetteContextDecorator
from vcr.request import Request
from vcr.serializers import yamlserializer

from aggregator.cassettes.clients import from_reply
from aggregator.cassettes.credentials import Redaction
from aggregator.cassettes.matching import NAMES
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteWarning
from aggregator.records import HTTPRequest

_IGNORING = ("ignore_hosts", "ignore_localhost")
SERVED_OPTIONS = frozenset(
    {
        *_IGNORING,
        "additional_matchers",
        "allow_playback_repeats",
        "allowed_hosts",  # of pytest-recording itself
        "cassette_library_dir",
        "decode_compressed_response",
        "filter_headers",  # authentication is redacted
        "func_path_generator",
        "inject_cassette",
        "match_on",
        "matchers",
        "path_transformer",
        "persister",
        "record_mode",
        "serializers",
        "use_cassette",
    }
)
"""Supported options: the tape implements them, or they are checked separately."""
_EXACT = frozenset({"uri", "url"})  # compared literally, unlike our tape, which matches equivalent addresses
Note = Callable[[Path, Tape], None]


class ServedCassette(Cassette):  # type: ignore[misc] # vcrpy is untyped
    """The value of the fixture `vcr`: the file's exchanges, those being recorded, and what the tape plays."""

    def __init__(self, tape: Tape, merged: dict[str, Any]) -> None:
        super().__init__(
            path=merged["path"],
            match_on=merged["match_on"],
            record_mode=merged["record_mode"],
            inject=merged["inject"],
            before_record_request=merged["before_record_request"],
        )
        self.tape = tape
        self._rows = tape.unplayed()
        self._is_saved = False
        self._loaded = [(_request_of(row.exchange().request), from_reply(row.exchange().reply)) for row in self._rows]

    @property
    def data(self) -> list[tuple[Request, dict[str, Any]]]:
        """Requests and answers, the file's first."""
        if "tape" not in vars(self):  # while vcrpy's own class is being constructed
            return []
        recorded = [(_request_of(one.request), from_reply(one.reply)) for one in self.tape.exchanges]
        for _, response in recorded if self._is_saved else ():
            with suppress(UnicodeDecodeError):  # by then vcrpy has converted the bodies to text, if possible
                response["body"]["string"] = response["body"]["string"].decode()
        return [*self._loaded, *recorded]

    @data.setter
    def data(self, value: object) -> None:
        """Accept vcrpy's empty list."""

    @property
    def all_played(self) -> bool:
        """True if every exchange was played; exchanges being recorded count as not played."""
        return self.play_count == len(self)

    def _save(self, force: bool = False) -> None:
        """Note that the block has ended; the tape has written each exchange already."""
        self._is_saved = True

    @property
    def play_counts(self) -> Counter[int]:
        """How often each exchange of the file was played."""
        if "tape" not in vars(self):
            return Counter()
        unplayed = {id(row) for row in self.tape.unplayed()}
        return Counter({index: 1 for index, row in enumerate(self._rows) if id(row) not in unplayed})

    @play_counts.setter
    def play_counts(self, value: object) -> None:
        """Accept vcrpy's empty counter."""

    @property
    def play_count(self) -> int:
        """The number of answers played."""
        return self.tape.plays

    @property
    def dirty(self) -> bool:
        """True if something was recorded."""
        return "tape" in vars(self) and self.tape.recorded > 0

    @dirty.setter
    def dirty(self, value: object) -> None:
        """Accept vcrpy's False."""

    def rewind(self) -> None:
        """Play from the beginning again."""
        self.tape.rewind()

    def __len__(self) -> int:
        return len(self._rows) + len(self.tape.exchanges)


def _request_of(request: HTTPRequest) -> Request:
    return Request(request.method, request.url, request.body, dict(request.headers))


def _same_address(one: Any, other: Any) -> bool:
    """Return True if two requests have one address as vcrpy compares them: literally, except for an empty path."""
    here, there = (urlsplit(request.uri)._replace(path=request.path or "/") for request in (one, other))
    return bool(here == there)


def serve_vcr(vcr: Any, note: Note) -> None:
    """Make this VCR's `use_cassette` open our tape, for every test with supported options.

    `note` is called with each tape after opening and again after closing.
    """
    stock: Callable[..., AbstractContextManager[Any]] = vcr.use_cassette

    def use_cassette(path: Any = None, **options: Any) -> Any:
        if path is not None and not isinstance(path, str | PathLike):  # a function to decorate
            return use_cassette(**options)(path)
        given = options if path is None else {"path": path, **options}
        return served_context(vcr, note, given) if can_serve(vcr, options) else stock(**given)

    vcr.use_cassette = use_cassette


def served_context(vcr: Any, note: Note, options: dict[str, Any]) -> ServedContext:
    """Return an equivalent of this VCR's `use_cassette(**options)` on our tape: a context manager and a decorator."""
    return ServedContext(_Opener(vcr, note, options), lambda: vcr.get_merged_config(**options))


def can_serve(vcr: Any, options: dict[str, Any], *, persisters: tuple[Any, ...] = ()) -> bool:
    """Return True if the tape supports these options and those set in the VCR by a hook.

    Any option that differs from vcrpy's default and is not known to be supported gives False. pytest-recording's own
    persister is supported, and so are `persisters`.
    """
    plain = vars(VCR())
    asked = {**vars(vcr), **options}
    changed = {name for name, value in asked.items() if (value or None) != (plain.get(name) or None)}
    return (
        changed <= SERVED_OPTIONS
        and None not in matched_by(vcr, options)
        and (asked["persister"] in persisters or getattr(asked["persister"], "extra_paths", None) == [])
        and asked["serializers"].get(asked["serializer"]) is yamlserializer
    )


def matched_by(vcr: Any, options: dict[str, Any]) -> tuple[str | None, ...]:
    """Return a test's matchers: names of vcrpy's own, and None for one that the tape does not support.

    Unsupported are matchers that the test registered, and headers, which are only partly recorded.
    """
    plain = VCR().matchers
    names = (*options.get("match_on", vcr.match_on), *options.get("additional_matchers", ()))
    return tuple(name if name in NAMES and vcr.matchers[name] is plain[name] else None for name in names)


class _Opener:
    """Opens a cassette when vcrpy would load one."""

    def __init__(self, vcr: Any, note: Note, options: dict[str, Any]) -> None:
        self.vcr, self.note, self.options = vcr, note, options

    def load(self, **merged: Any) -> _Opened:
        """Return the object for the block."""
        return _Opened(self, merged)

    def rules(self, merged: dict[str, Any]) -> TapeRules:
        """Return the rules of a tape for the test's options."""
        asked = {**vars(self.vcr), **self.options}
        names = [name for name in matched_by(self.vcr, self.options) if name is not None]
        return TapeRules(
            clients="all",
            adopts="everything",
            match_on=tuple(_same_address if name in _EXACT else name for name in names),
            ignore_hosts=(),  # the test's own options decide what is ignored
            allow_playback_repeats=merged["allow_playback_repeats"],
            before_request=merged["before_record_request"] if any(asked.get(name) for name in _IGNORING) else None,
            redaction=Redaction(headers=("*",)),  # vcrpy keeps every header; authentication in them is redacted too
            raises_again=False,  # vcrpy does not either
            keeps_exchanges=True,
            like_vcrpy=True,
            coded=not asked["decode_compressed_response"],
        )


class _Opened:
    """A cassette of one block of `use_cassette`."""

    def __init__(self, opener: _Opener, merged: dict[str, Any]) -> None:
        self.opener, self.merged = opener, merged
        self.raised: BaseException | None = None
        self.served: ServedCassette | None = None

    def _save(self) -> None:
        """Finish the block's public state."""
        if self.served is not None:
            self.served._save()  # noqa: SLF001 - which vcrpy calls

    def __iter__(self) -> Iterator[ServedCassette]:
        path = Path(self.merged["path"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* were not played|.* as match_on allows", CassetteWarning)
            opened = cassette(path, self.merged["record_mode"].value, rules=self.opener.rules(self.merged))
            tape = opened.__enter__()
            self.opener.note(path, tape)
            self.served = ServedCassette(tape, self.merged)
            yield self.served
            error = self.raised
            opened.__exit__(None if error is None else type(error), error, None)
        self.opener.note(path, tape)


class ServedContext(CassetteContextDecorator):  # type: ignore[misc] # vcrpy is untyped
    """vcrpy's own context manager and decorator, with our cassette."""

    def _patch_generator(self, opened: _Opened) -> Iterator[ServedCassette]:
        self._opened = opened
        return iter(opened)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.raised = error
        super().__exit__(kind, error, trace)
