"""Reading journals: JSON line by line, by msgspec. JSON knows no tags, no aliases and no code.

An open journal may end in a torn item, which is dropped and told; any other damage raises with its line.
"""

from __future__ import annotations

from collections.abc import Iterator

from aggregator.cassettes.comments import EMPTY, OPEN_COMMENT, PREAMBLE
from aggregator.cassettes.exchanges import line_is_whole
from aggregator.cassettes.keys import Ignore
from aggregator.cassettes.rows import REMEDY, UNREADABLE, Recording, Row, index_spans
from aggregator.errors import CassetteDamagedError

OPENING = OPEN_COMMENT + PREAMBLE
_ITEM = b"- "
_Span = tuple[int, int]


def is_open_journal(data: bytes) -> bool:
    """Say whether a recording was going on: our comment says so, or it is gone but the first line is ours."""
    if data.startswith(OPEN_COMMENT) or OPENING.startswith(data):
        return True
    if not data.startswith(PREAMBLE + b'- {"request":'):
        return False
    return data.find(rb",\"sha256\":\"", 0, data.find(b"\n", len(PREAMBLE)) % (len(data) + 1)) > 0


def read_open_journal(data: bytes, where: str, ignore: Ignore = ()) -> Recording:
    """Read the journal of a recording that was not closed."""
    if OPENING.startswith(data):
        finding = f"{where}: not closed; no exchange was written yet"
        return Recording(rows=(), state="open", layout="journal", findings=(finding,), kept=0)
    start = data.find(PREAMBLE)
    if start not in (0, len(OPEN_COMMENT)):
        raise CassetteDamagedError(f"expected {PREAMBLE.decode()!r} - at {where}:2; {REMEDY}")
    start += len(PREAMBLE)
    first = data.count(b"\n", 0, start) + 1
    spans = list(_spans(data, start))
    kept = len(data)
    torn = _torn(data, spans, where, first)
    if torn:
        kept = spans.pop()[0] - len(_ITEM)
    findings = [f"{where}: not closed, so it may end early; its {len(spans)} exchanges are good"]
    if torn:
        findings.append(f"{where}:{first + len(spans)}: the last exchange was torn and is dropped")
    rows = _rows(data, spans, where, ignore)
    return Recording(rows=rows, state="open", layout="journal", findings=tuple(findings), kept=kept)


def read_closed_journal(content: bytes, where: str, ignore: Ignore, *, intact: bool, skipped: int) -> Recording:
    """Read a finished journal after its comment of `skipped` lines; `intact` says that its hash was right."""
    if content == EMPTY:
        return Recording(rows=(), state="closed", layout="journal")
    if not content.startswith(PREAMBLE):
        raise CassetteDamagedError(
            f"expected {PREAMBLE.decode()!r}, got {content[:40]!r} - at {where}:{skipped + 1}; {REMEDY}"
        )
    spans = list(_spans(content, len(PREAMBLE)))
    if not intact:
        first = skipped + PREAMBLE.count(b"\n") + 1
        if _torn(content, spans, where, first):
            raise _damaged(where, first + len(spans) - 1)
    return Recording(rows=_rows(content, spans, where, ignore), state="closed", layout="journal")


def _spans(data: bytes, start: int) -> Iterator[_Span]:
    """Yield where each item's JSON starts and ends; the mark before it is not part of it."""
    find, size = data.find, len(data)
    while start < size:
        end = find(b"\n", start)
        end = size if end < 0 else end
        yield start + len(_ITEM), end
        start = end + 1


def _torn(data: bytes, spans: list[_Span], where: str, first: int) -> bool:
    """Say whether the last item is torn; raise for the first one that is damaged otherwise, with its line.

    An item that is whole but for its line break counts as torn: what follows could not be told from it.
    """
    view = memoryview(data)
    for index, (start, end) in enumerate(spans):
        last = index == len(spans) - 1 and data[-1:] != b"\n"
        whole = data[start - len(_ITEM) : start] == _ITEM and line_is_whole(view[start:end])
        if not whole and not last:
            raise _damaged(where, first + index)
    return bool(spans) and data[-1:] != b"\n"


def _damaged(where: str, line: int) -> CassetteDamagedError:
    return CassetteDamagedError(f"expected an exchange and its hash, got something else - at {where}:{line}; {REMEDY}")


def _rows(data: bytes, spans: list[_Span], where: str, ignore: Ignore) -> tuple[Row, ...]:
    try:
        return tuple(index_spans(data, spans, ignore))
    except UNREADABLE as error:
        raise CassetteDamagedError(f"expected an exchange, got {error} - in {where}; {REMEDY}") from error
