r"""The leading comment of a cassette: what the file states of itself, so that a cut or an edit is seen.

    # aggregator-cassette format=1 layout=readable state=closed exchanges=12 sha256=9f86…
    # aggregator-cassette format=1 layout=journal state=closed shard=2/5 set=4be0c1d2a7f3 exchanges=2000 sha256=…
    # aggregator-cassette format=1 layout=journal state=open

The hash is that of every byte after the comment, with line ends as `\n` whatever a checkout made of them.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Literal

from msgspec import Struct

from aggregator.errors import CassetteDamagedError, CassetteRefusedError

FORMAT = 1
Layout = Literal["journal", "readable"]
PREAMBLE = b"version: 1\ninteractions:\n"
EMPTY = b"version: 1\ninteractions: []\n"
"""What a finished cassette without exchanges holds, in either layout; nothing under `interactions:` is no list."""
OPEN_COMMENT = b"# aggregator-cassette format=1 layout=journal state=open\n"
_MARK = b"# aggregator-cassette "
_CLOSED = re.compile(
    rb"format=1 layout=(journal|readable) state=closed (?:shard=(\d+)/(\d+) set=([0-9a-f]{12}) )?"
    rb"exchanges=(\d+) sha256=([0-9a-f]{64})"
)


class Comment(Struct, frozen=True, kw_only=True):
    """What a closed cassette states. `shard` counts from 1; `set` names the recording that its shards belong to."""

    layout: Layout
    exchanges: int
    sha256: str
    shard: int = 1
    shards: int = 1
    set: str = ""

    def render(self) -> bytes:
        """Return the comment as it stands in the file, line break included."""
        part = f"shard={self.shard}/{self.shards} set={self.set} " if self.shards > 1 else ""
        return (
            f"# aggregator-cassette format={FORMAT} layout={self.layout} state=closed {part}"
            f"exchanges={self.exchanges} sha256={self.sha256}\n"
        ).encode()


def parse_comment(first_line: bytes, where: str) -> Comment | None:
    """Return what the first line states; None for an open journal; raises for anything else that bears our mark.

    `has_comment` says beforehand whether the line is ours at all.
    """
    if first_line == OPEN_COMMENT.rstrip():
        return None
    if match := _CLOSED.fullmatch(first_line.removeprefix(_MARK)):
        layout, shard, shards, group, exchanges, digest = match.groups()
        return Comment(
            layout="journal" if layout == b"journal" else "readable",
            exchanges=int(exchanges),
            sha256=digest.decode(),
            shard=int(shard or 1),
            shards=int(shards or 1),
            set=(group or b"").decode(),
        )
    if (version := re.match(rb"format=(\d+) ", first_line.removeprefix(_MARK))) and int(version[1]) > FORMAT:
        raise CassetteRefusedError(
            f"expected format {FORMAT} in {where}, got {int(version[1])}; "
            "a newer release of the library wrote it: upgrade"
        )
    raise CassetteDamagedError(
        f"expected the leading comment of a cassette, got {first_line[:120]!r} - at {where}:1; "
        "the file was cut or edited: restore it, or delete it and record again"
    )


def has_comment(data: bytes) -> bool:
    """Say whether the file bears our mark."""
    return data.startswith(_MARK)


def content_hash(content: bytes | memoryview) -> str:
    """Return the hash that a leading comment states for what follows it."""
    return sha256(content).hexdigest()
