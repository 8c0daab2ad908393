"""From a file to rows that can be looked up, with every cut and edit told.

Our own journals are read by msgspec, line by line: JSON knows no tags, no aliases and no code. Rows keep
their bytes and are decoded when they are played. Whatever vcrpy wrote goes through `foreign`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from aggregator.cassettes.comments import OPEN_COMMENT, PREAMBLE, Comment, content_hash, has_comment, parse_comment
from aggregator.cassettes.exchanges import Buffer, Exchange, Place, body_bytes, decode_head, decode_line, line_is_whole
from aggregator.cassettes.keys import Ignore, raw_key, request_key
from aggregator.errors import CassetteDamagedError

State = Literal["closed", "open", "foreign"]
_ITEM = b"- "
_REMEDY = "the file was cut or edited: restore it from version control, or delete it and record again"


class Row(Struct, frozen=True, gc=False):
    """One exchange as bytes, the digests of its request, and its place in the run."""

    line: Buffer
    key: bytes
    raw: bytes
    place: Place

    def exchange(self) -> Exchange:
        """Decode the whole row."""
        return decode_line(self.line)


class Recording(Struct, frozen=True, kw_only=True):
    """What a cassette holds. `kept` is how many bytes of an open journal are good, `findings` what was repaired."""

    rows: tuple[Row, ...]
    state: State
    layout: Literal["journal", "readable", "foreign"]
    findings: tuple[str, ...] = ()
    kept: int = 0
    size: int = 0
    files: tuple[Path, ...] = ()


def index_lines(lines: Iterable[Buffer], ignore: Ignore = ()) -> Iterator[Row]:
    """Compute the keys of good lines; no stored key is trusted."""
    for line in lines:
        head = decode_head(line)
        request = head.request
        body = body_bytes(request.body)
        yield Row(
            line,
            request_key(request.method, request.uri, body, ignore),
            raw_key(request.method, request.uri, body),
            head.x,
        )


def read_journal(data: bytes, where: str, ignore: Ignore = ()) -> Recording:
    """Read one journal; a torn last item of an open one is dropped and told, other damage raises with its line."""
    comment, start = _opening(data, where)
    if start > len(data):  # killed before the preamble was whole
        return Recording(rows=(), state="open", layout="journal", findings=(f"{where}: no exchange was written",))
    spans = list(_spans(data, start))
    findings: list[str] = []
    whole = comment is not None and content_hash(memoryview(data)[data.index(b"\n") + 1 :]) == comment.sha256
    kept = len(data)
    if not whole:
        first = data.count(b"\n", 0, start) + 1
        torn = _check(data, spans, where, first, closed=comment is not None)
        if comment is not None:
            raise CassetteDamagedError(f"expected the content that {where}:1 states, got another; {_REMEDY}")
        findings.append(f"{where}: not closed, so it may end early; {len(spans) - torn} exchanges are good")
        if torn:
            kept = spans.pop()[0] - len(_ITEM)
            findings.append(f"{where}:{first + len(spans)}: the last exchange was torn and is dropped")
    if comment is not None and comment.exchanges != len(spans):
        raise CassetteDamagedError(
            f"expected {comment.exchanges} exchanges as {where}:1 states, got {len(spans)}; {_REMEDY}"
        )
    view = memoryview(data)
    rows = _rows(view, spans, where, data, ignore)
    return Recording(
        rows=rows,
        state="open" if comment is None else "closed",
        layout="journal",
        findings=tuple(findings),
        kept=kept,
        size=len(data),
    )


def _opening(data: bytes, where: str) -> tuple[Comment | None, int]:
    """Return what the comment states and where the items start; past the end of a file cut in its opening."""
    if (OPEN_COMMENT + PREAMBLE).startswith(data):
        return None, len(data) if data == OPEN_COMMENT + PREAMBLE else len(data) + 1
    comment, start = None, 0
    if has_comment(data):
        start = data.find(b"\n") + 1 or len(data)
        comment = parse_comment(data[:start].rstrip(b"\n"), where)
    if data[start : start + len(PREAMBLE)] != PREAMBLE:
        raise CassetteDamagedError(
            f"expected {PREAMBLE.decode()!r}, got {data[start : start + len(PREAMBLE)]!r} - at {where}:2; {_REMEDY}"
        )
    return comment, start + len(PREAMBLE)


def _spans(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield where each item's JSON starts and ends; the mark before it is not part of it."""
    find, size = data.find, len(data)
    while start < size:
        end = find(b"\n", start)
        end = size if end < 0 else end
        yield start + len(_ITEM), end
        start = end + 1


def _check(data: bytes, spans: list[tuple[int, int]], where: str, first: int, *, closed: bool) -> bool:
    """Raise for the first damaged item, with its line; return whether the last one is merely torn."""
    view = memoryview(data)
    for index, (start, end) in enumerate(spans):
        if data[start - len(_ITEM) : start] == _ITEM and line_is_whole(view[start:end]):
            continue
        if not closed and index == len(spans) - 1 and data[-1:] != b"\n":
            return True
        raise CassetteDamagedError(
            f"expected an exchange and its hash, got something else - at {where}:{first + index}; {_REMEDY}"
        )
    # whole, but without its line break: what follows could not be told from it
    return not closed and bool(spans) and data[-1:] != b"\n"


def _rows(view: memoryview, spans: list[tuple[int, int]], where: str, data: bytes, ignore: Ignore) -> tuple[Row, ...]:
    try:
        return tuple(index_lines((view[start:end] for start, end in spans), ignore))
    except (msgspec.DecodeError, ValueError) as error:
        raise CassetteDamagedError(f"expected an exchange, got {error} - in {where}; {_REMEDY}") from error


def read(path: Path, ignore: Ignore = ()) -> Recording | None:
    """Return what a cassette holds; None where there is none.

    Raises CassetteDamagedError (cut, edited, empty) and CassetteRefusedError (hostile, unknown format).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not data:
        raise CassetteDamagedError(f"expected a cassette in {path}, got an empty file; delete it to record anew")
    return read_journal(data, str(path), ignore)
