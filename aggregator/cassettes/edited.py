"""A cassette that somebody edited by hand: read whatever its hashes say, and made a cassette again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.blocks import facts_of, to_exchange
from aggregator.cassettes.documents import parse_document
from aggregator.cassettes.exchanges import UNREADABLE, Exchange, Row, decode_line, index_lines, line_hash
from aggregator.cassettes.foreign import interactions_of
from aggregator.cassettes.journal import PREAMBLE, Comment, Layout, has_comment, parse_comment
from aggregator.cassettes.keys import key_of_request
from aggregator.cassettes.reading import shard_path
from aggregator.cassettes.redaction import needles_for, redact_line, redact_request
from aggregator.errors import CassetteDamagedError, CassetteError


class Accepted(Struct, frozen=True, kw_only=True):
    """What an edited cassette holds, and how it differs from what its hashes say."""

    rows: tuple[Row, ...]
    layout: Layout
    changed: int = 0
    added: int = 0
    removed: int = 0

    @property
    def is_edited(self) -> bool:
        """Whether anything differs."""
        return bool(self.changed or self.added or self.removed)


def read_edited(path: Path) -> Accepted:
    """Read a cassette of ours, its shards included, without checking its hashes.

    Secrets that an edit has brought in are redacted, and calls whose requests were edited are counted again. Raises
    CassetteError for a file that is not ours, CassetteDamagedError for one that cannot be decoded.
    """
    comment, found = _read_one(path)
    stated = comment.exchanges if comment else 0
    for number in range(2, comment.shards + 1 if comment else 0):
        shard, more = _read_one(shard_path(path, comment.set if comment else "", number))
        found += more
        stated += shard.exchanges if shard else 0
    kept = sum(bool(digest) for _, digest in found)
    if comment is None and not kept:
        raise CassetteError(
            f"Expected a cassette of ours that was edited, got another tool's ({path}); write it in our format: "
            f"aggregator cassette convert {path}"
        )
    clean = [replace(exchange, request=redact_request(exchange.request)) for exchange, _ in found]
    needles = [needles_for(exchange.request) for exchange, _ in found]
    lines = [redact_line(exchange, known) for exchange, known in zip(_recount(clean), needles, strict=True)]
    return Accepted(
        rows=tuple(index_lines(lines)),
        layout="readable" if comment is None else comment.layout,
        changed=sum(bool(old) and line_hash(line) != old for line, (_, old) in zip(lines, found, strict=True)),
        added=len(found) - kept,
        removed=max(0, stated - kept),
    )


def _read_one(path: Path) -> tuple[Comment | None, list[tuple[Exchange, str]]]:
    """Return the comment of one file, and its exchanges with the hash that each states, "" where it states none."""
    try:
        data = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise CassetteDamagedError(f"Expected the cassette {path}, got {error}; restore it") from error
    first = data[: data.find(b"\n") + 1] if has_comment(data) else b""
    comment = parse_comment(first.rstrip(), str(path)) if first else None
    return comment, list(_exchanges(data[len(first) :], path, skipped=1 if first else 0))


def _exchanges(content: bytes, path: Path, *, skipped: int) -> Iterator[tuple[Exchange, str]]:
    if content.startswith(PREAMBLE + b'- {"'):
        lines = content[len(PREAMBLE) :].splitlines()
        for number, line in enumerate(lines, skipped + PREAMBLE.count(b"\n") + 1):
            try:
                yield _whole(decode_line(line.removeprefix(b"- "))), line_hash(line)
            except UNREADABLE as error:
                raise CassetteDamagedError(
                    f"Expected an exchange in one line of JSON, got {error} - at {path}:{number}; mend the line"
                ) from error
        return
    document, starts = parse_document(content, str(path))
    for index, item in enumerate(interactions_of(document, str(path))):
        place = f"{path}:{starts.get(id(item), 0) + skipped}" if starts else f"{path}, interaction {index + 1}"
        facts: dict[str, Any] = {"lineage": "", "order": index, **facts_of(item)}
        yield _whole(to_exchange(item, facts, place)), str(facts.get("sha256", ""))


def _whole(exchange: Exchange) -> Exchange:
    """Return an exchange whose streamed answer comes in one piece if the pieces are no longer those of its body."""
    chunks, size = exchange.facts.chunks, len(exchange.reply.body)
    if not chunks or sum(length for length, _ in chunks) == size:
        return exchange
    return replace(exchange, facts=replace(exchange.facts, chunks=((size, chunks[-1][1]),)))


def _recount(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Give calls whose tickets no longer count from 0 within their request and lineage new ones, in order of issue."""
    groups: dict[tuple[bytes, str], list[int]] = {}
    for index, exchange in enumerate(exchanges):
        groups.setdefault((key_of_request(exchange.request), exchange.facts.lineage), []).append(index)
    counted = list(exchanges)
    for group in groups.values():
        facts = [exchanges[index].facts for index in group]
        tickets = {one.ticket for one in facts}
        if 0 in tickets and len({(one.ticket, one.attempt) for one in facts}) == len(facts):
            continue
        calls = sorted({(one.order, one.ticket) for one in facts})
        for index in group:
            one = exchanges[index].facts
            counted[index] = replace(exchanges[index], facts=replace(one, ticket=calls.index((one.order, one.ticket))))
    return counted
