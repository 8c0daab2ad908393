"""The report of a miss: the nearest recorded request, the differences by JSON path, and how to record again.

Similarity is the share of common words; the best few are then compared word by word, in order. Pure functions over
rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from heapq import nlargest
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.cassettes.exchanges import Exchange, Facts, Row, encode_line, find_parts
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.text import MISSING, clip, json_changes, show_count

MAX_LINES = 40
_CANDIDATES = 200  # compared by their words
_FINALISTS = 5  # compared word by word
_SAMPLES, _SAMPLE = 4, 24  # the number and length of the samples of the request that are searched for
_WINDOW = 60
_WORD = re.compile(rb"[0-9A-Za-z_]+|[\x80-\xff]{1,3}")  # JSON without white space has words, and Chinese its characters


class Asked(Struct, frozen=True, kw_only=True):
    """A request without an answer, with its secrets redacted, and its place in the run."""

    request: HTTPRequest
    key: bytes
    lineage: str
    ticket: int


def explain_miss(
    asked: Asked,
    rows: Sequence[Row],
    played: bytes | bytearray,
    name: str,
    *,
    key_of_row: Callable[[int], bytes] | None = None,
    search: bool = True,
) -> str:
    """Return the message of a miss, at most `MAX_LINES` lines; without `search` the nearest request is left out.

    `key_of_row` gives the keys of the rows, if the tape matches by others than `Row.key`.
    """
    request = asked.request
    head = [
        f"Expected a recorded answer to {request.method} {request.url} in {name}, got none",
        f"  lineage {asked.lineage!r}, ticket {asked.ticket}; {len(rows) - sum(played)} of {len(rows)} not played",
    ]
    remedy = (
        'To record it, run again with mode="new_episodes" (adds) or "all" (re-records), '
        "in pytest --cassette-mode=new_episodes."
    )
    if not rows:
        return "\n".join((*head, "  the cassette does not exist or is empty", remedy))
    same = [
        index for index, row in enumerate(rows) if (row.key if key_of_row is None else key_of_row(index)) == asked.key
    ]
    if same:
        return "\n".join((*head, *_elsewhere(same, asked, rows, played), remedy))
    if not search:
        return "\n".join((*head, "  (the nearest request is shown for the first misses only)", remedy))
    index, likeness = nearest(asked, rows)
    place = rows[index].facts
    head.append(
        f"  nearest: exchange {index}, lineage {place.lineage!r}, ticket {place.ticket}, "
        f"{'played' if played[index] else 'not played yet'}, {likeness:.0%} alike"
    )
    lines = list(differences(rows[index].exchange().request, request))
    room = MAX_LINES - len(head) - 1
    if len(lines) > room:
        lines = [*lines[: room - 1], f"  ... and {len(lines) - room + 1} more lines of differences"]
    return "\n".join((*head, *lines, remedy))


def _elsewhere(same: list[int], asked: Asked, rows: Sequence[Row], played: bytes | bytearray) -> Iterator[str]:
    """Yield the places at which this request was recorded, if only its lineage differs."""
    here = [index for index in same if rows[index].facts.lineage == asked.lineage]
    if here and not all(played[index] for index in here):
        yield f"  this request was recorded in this lineage, but not with ticket {asked.ticket}:"
    elif here:
        yield f"  this request was recorded {show_count(len(here), 'time')} in this lineage, and is requested again"
    else:
        yield '  this request was recorded, but in another lineage; lineage="prefer" would take it from there:'
    for index in (here or same)[: MAX_LINES - 8]:
        place, state = rows[index].facts, "played" if played[index] else "not played yet"
        yield f"    exchange {index}, lineage {place.lineage!r}, ticket {place.ticket}, {state}"


def nearest(asked: Asked, rows: Sequence[Row]) -> tuple[int, float]:
    """Return the index of the most similar recorded request, and its similarity in [0, 1].

    Three passes, each more expensive and over fewer candidates: common beginnings, ends and samples; the share of
    common words; the words in order.
    """
    text = _as_text(asked.request)
    parts = [row.data[row.start : row.answer_at] for row in rows]
    rough = _rough(text, parts) if len(parts) > _CANDIDATES else range(len(parts))
    words = _WORD.findall(text)
    known = frozenset(words)
    finalists = nlargest(_FINALISTS, rough, key=lambda index: (_overlap(known, len(words), parts[index]), -index))
    scored = [(SequenceMatcher(None, words, _WORD.findall(parts[index]), False).ratio(), index) for index in finalists]  # noqa: FBT003
    likeness, index = max(scored, key=lambda pair: (pair[0], rows[pair[1]].facts.lineage == asked.lineage, -pair[1]))
    return index, likeness


def _rough(text: bytes, parts: list[bytes]) -> list[int]:
    """Return the candidates that share most with the text: beginning, end, and samples in between."""
    step = max(_SAMPLE, len(text) // (_SAMPLES + 1))
    reverse = text[::-1]
    scores = [_common(text, part) + _common(reverse, part[::-1]) for part in parts]
    for start in range(step // 2, len(text) - _SAMPLE, step):
        sample = text[start : start + _SAMPLE]
        scores = [score + _SAMPLE if sample in part else score for score, part in zip(scores, parts, strict=True)]
    return nlargest(_CANDIDATES, range(len(parts)), key=lambda index: (scores[index], -index))


def _common(a: bytes, b: bytes) -> int:
    """Return the approximate length of the common beginning, by bisection."""
    low, high = 0, min(len(a), len(b))
    while high - low > _SAMPLE // 2:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _overlap(known: frozenset[bytes], count: int, part: bytes) -> float:
    """Return the number of common words, each distinct one counted once, divided by the words of both."""
    words = _WORD.findall(part)
    return len(known.intersection(words)) / (len(words) + count)


def _as_text(request: HTTPRequest) -> bytes:
    """Encode the request as it appears in a line, for comparison with the candidates."""
    blank = Exchange(request=request, reply=HTTPReply(status=0, body=b"", headers={}), facts=Facts(lineage=""))
    line = encode_line(blank)
    return line[: find_parts(line, 0, len(line))[0]]


def differences(recorded: HTTPRequest, asked: HTTPRequest) -> Iterator[str]:
    """Yield lines of differences by JSON path, recorded against requested."""
    for name, before, after in (("method", recorded.method, asked.method), ("url", recorded.url, asked.url)):
        if before != after:
            yield from _show(name, before, after)
    for path, before, after in json_changes(_decoded(recorded.body), _decoded(asked.body)):
        yield from _show(path or "body", before, after)


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace")


def _show(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, str) and isinstance(after, str):
        start = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        yield f"  {path}, from character {start}:"
        yield f"    recorded  {_window(before, start)}"
        yield f"    asked     {_window(after, start)}"
    else:
        yield f"  {path}: recorded {_brief(before)}, asked {_brief(after)}"


def _window(text: str, start: int) -> str:
    first, last = max(0, start - _WINDOW // 2), start + _WINDOW
    return f"{'...' if first else ''}{text[first:last]!r}{'...' if last < len(text) else ''}"


def _brief(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    return clip(msgspec.json.encode(value).decode(), 2 * _WINDOW)
