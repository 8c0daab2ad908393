"""pytest-recording's `vcr` tests, served by our indexed tape: same marks, same files, no scan of the whole cassette.

Options that change how requests are matched or stored beyond what the tape does leave a test with stock vcrpy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vcr.request import Request

from aggregator.cassettes.clients import from_reply
from aggregator.cassettes.recorder import cassette
from aggregator.cassettes.tape import Tape
from aggregator.cassettes.vcr import IndexedCassette
from aggregator.errors import CassetteWarning

SERVED_OPTIONS = frozenset({"allowed_hosts", "decode_compressed_response", "filter_headers", "path", "record_mode"})
_REQUEST_PARTS = frozenset({"body", "host", "method", "path", "port", "query", "raw_body", "scheme", "uri", "url"})


class ServedCassette(IndexedCassette):
    """What the fixture `vcr` is then: counts what the tape plays; `requests` and `responses` are those of the file."""

    def __init__(self, path: str, tape: Tape) -> None:
        super().__init__(path=path, family="")
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


def serve_vcr(vcr: Any) -> None:
    """Let this VCR's `use_cassette` open our tape, for every test whose options we can honour."""
    stock: Callable[..., AbstractContextManager[Any]] = vcr.use_cassette

    def use_cassette(path: str, **options: Any) -> AbstractContextManager[Any]:
        return _served(vcr, path, options) if can_serve(vcr, options) else stock(path, **options)

    vcr.use_cassette = use_cassette


def can_serve(vcr: Any, options: dict[str, Any]) -> bool:
    """Say whether the tape does all that these options ask for; the canonical body always counts with us."""
    matched = set(options.get("match_on", vcr.match_on))
    asked = {name for name, value in options.items() if value} - SERVED_OPTIONS - {"match_on"}
    return not asked and matched <= _REQUEST_PARTS and not getattr(vcr.persister, "extra_paths", ())


@contextmanager
def _served(vcr: Any, path: str, options: dict[str, Any]) -> Iterator[ServedCassette]:
    merged = vcr.get_merged_config(path=path, **options)
    path = merged["path_transformer"](path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* were not played", CassetteWarning)  # vcrpy says nothing of them
        with cassette(Path(path), merged["record_mode"].value, clients="all") as tape:
            yield ServedCassette(path, tape)
