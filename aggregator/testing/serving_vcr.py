"""pytest-recording's `vcr` tests, served by our indexed tape: same marks, same files, no scan of the whole cassette.

Options that change how requests are matched or stored beyond what the tape does leave a test with stock vcrpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vcr import VCR
from vcr.cassette import Cassette
from vcr.request import Request

from aggregator.cassettes.clients import from_reply
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteWarning

SERVED_OPTIONS = frozenset(
    {
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
RULES = TapeRules(clients="all", adopts="everything")
_REQUEST_PARTS = frozenset({"body", "host", "method", "path", "port", "query", "raw_body", "scheme", "uri", "url"})


class ServedCassette(Cassette):  # type: ignore[misc] # vcrpy is untyped
    """What the fixture `vcr` is then: counts what the tape plays; `requests` and `responses` are those of the file."""

    def __init__(self, path: str, tape: Tape) -> None:
        super().__init__(path=path)
        self.tape = tape
        self._rows = tape.unplayed()

    @property
    def play_count(self) -> int:
        """How many recorded exchanges were played."""
        return len(self._rows) - len(self.tape.unplayed())

    @property
    def all_played(self) -> bool:
        """Whether every recorded exchange was played."""
        return not self.tape.unplayed()

    @property
    def requests(self) -> list[Request]:
        """The recorded requests."""
        asked = [row.exchange().request for row in self._rows]
        return [Request(one.method, one.url, one.body, dict(one.headers)) for one in asked]

    @property
    def responses(self) -> list[dict[str, Any]]:
        """The recorded answers, in vcrpy's shape."""
        return [from_reply(row.exchange().reply) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows) + self.tape.recorded


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

    Any option that differs from vcrpy's default and is not known to be supported gives False. Our tape always matches
    the canonical body too.
    """
    plain = vars(VCR())
    asked = {**vars(vcr), **options}
    changed = {name for name, value in asked.items() if (value or None) != (plain.get(name) or None)}
    matched = set(asked["match_on"])
    return (
        changed <= SERVED_OPTIONS
        and matched <= _REQUEST_PARTS
        and all(asked["matchers"][name] == plain["matchers"].get(name) for name in matched)
        and getattr(asked["persister"], "extra_paths", None) == []  # pytest-recording's own, of one cassette
    )


@contextmanager
def _served(
    vcr: Any, path: str, options: dict[str, Any], note: Callable[[Path, Tape], None]
) -> Iterator[ServedCassette]:
    merged = vcr.get_merged_config(path=path, **options)
    path = merged["path_transformer"](path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # vcrpy does not report them
        with cassette(Path(path), merged["record_mode"].value, rules=RULES) as tape:
            note(Path(path), tape)
            yield ServedCassette(path, tape)
    note(Path(path), tape)
