"""Cassettes on disk: read and verified, written by one atomic replacement, or accepted after an edit by hand.

A file with a hash is verified; if the hash differs, the hash of each exchange locates the changed line. A file is
written in canonical order, and split into shards if it would be too large.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from errno import ELOOP
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.blocks import facts_of, read_blocks, render_exchange, to_exchange
from aggregator.cassettes.credentials import USUAL, Redaction
from aggregator.cassettes.exchanges import (
    REMEDY,
    UNREADABLE,
    Exchange,
    Recording,
    Row,
    decode_line,
    index_lines,
    line_hash,
)
from aggregator.cassettes.foreign import BUDGET, interactions_of, parse_document
from aggregator.cassettes.journal import (
    EMPTY,
    OPEN_COMMENT,
    OPENING,
    PREAMBLE,
    Comment,
    Layout,
    content_hash,
    has_comment,
    is_open_journal,
    parse_comment,
    read_closed_journal,
    read_open_journal,
)
from aggregator.cassettes.lineage import natural
from aggregator.cassettes.matching import key_of_request
from aggregator.cassettes.redaction import needles_for, redact_line, redact_request
from aggregator.errors import CassetteDamagedError, CassetteError, CassetteRefusedError
from aggregator.files import write_atomically

# Reading

_LONGEST_COMMENT = 4_096
GZIP = b"\x1f\x8b"
_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


# ---- reading


def read(path: Path, *, redact: bool = True, policy: Redaction = USUAL) -> Recording | None:
    """Return the content of a cassette, including its shards; None without one.

    Another tool's cassette is returned without its secrets; `redact=False` returns the real content of the file.

    Raises CassetteDamagedError (cut, edited, empty) and CassetteRefusedError (hostile, unknown format).
    """
    data = _bytes_of(path)
    if data is None:
        return None
    first, comment = _read_one(*data, str(path), redact=redact, policy=policy)
    if comment is None or comment.shards == 1:
        return msgspec.structs.replace(first, files=(path,))
    if comment.shard != 1:
        raise CassetteDamagedError(f"Expected the first shard of a cassette in {path}, got number {comment.shard}")
    files, parts = [path], [first]
    for number in range(2, comment.shards + 1):
        files.append(shard_path(path, comment.set, number))
        parts.append(_read_shard(files[-1], comment, number))
    return Recording(
        rows=tuple(row for part in parts for row in part.rows),
        state="closed",
        layout=first.layout,
        findings=tuple(finding for part in parts for finding in part.findings),
        size=sum(part.size for part in parts),
        files=tuple(files),
    )


def shard_path(path: Path, group: str, number: int) -> Path:
    """Return the path of a shard. Its name contains the recording's id, so that shards of two recordings never mix.

    >>> print(shard_path(Path("demo.yaml"), "4be0c1d2a7f3", 2))
    demo.4be0c1d2a7f3.0002.yaml
    """
    return path.with_name(f"{path.stem}.{group}.{number:04d}{path.suffix}")


def _read_shard(path: Path, first: Comment, number: int) -> Recording:
    data = _bytes_of(path)
    if data is None:
        raise CassetteDamagedError(f"Expected shard {number} of {first.shards} in {path}, got no file; {REMEDY}")
    part, comment = _read_one(*data, str(path))
    if comment is None or (comment.set, comment.shard, comment.shards) != (first.set, number, first.shards):
        raise CassetteDamagedError(
            f"Expected shard {number} of {first.shards}, got another file - at {path}:1; {REMEDY}"
        )
    return part


def _bytes_of(path: Path) -> tuple[bytes, bytes] | None:
    """Return a file's leading comment (b"" without one) and the rest; splitting later would copy 47 MB."""
    try:
        with path.open("rb", buffering=0) as file:  # a buffer would hold the whole a second time
            seekable = file.seekable()  # a pipe can be read only once
            start = file.read(_LONGEST_COMMENT if seekable else -1)
            first = start[: start.find(b"\n") + 1 or None] if has_comment(start) else b""
            if seekable:
                file.seek(len(first))
            data = first, file.read() if seekable else start[len(first) :]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CassetteError(f"Expected to read the cassette {path}, got {error}; make it readable") from error
    if not data[0] and data[1].startswith(GZIP):
        plain = unpack_file(data[1], str(path))
        first = plain[: plain.find(b"\n") + 1 or None] if has_comment(plain) else b""
        data = first, plain[len(first) :]
    if packer := next((name for start, name in _PACKERS.items() if data[1].startswith(start)), ""):
        raise CassetteRefusedError(
            f"Expected a cassette as text or packed by gzip in {path}, got one packed by {packer}; unpack it"
        )
    if not data[0] and (not data[1] or data[1].isspace()):
        raise CassetteDamagedError(f"Expected a cassette in {path}, got an empty file; delete it to record again")
    return data


def unpack_file(data: bytes, where: str) -> bytes:
    """Return the content of a compressed file; raises CassetteDamagedError or CassetteRefusedError."""
    plain, is_whole = bytearray(), True
    while is_whole and data.startswith(GZIP):  # several members, as written by `cat` and pigz
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        with suppress(zlib.error):
            plain += stream.decompress(data, BUDGET.size - len(plain) + 1)
        if len(plain) > BUDGET.size:
            raise CassetteRefusedError(
                f"Expected at most {BUDGET.size >> 20} MB in {where}, got a file that unpacks to more; do not trust it"
            )
        is_whole, data = stream.eof, stream.unused_data
    if not is_whole:
        raise CassetteDamagedError(
            f"Expected a whole gzip file, got {where}; restore it, or delete it and record again"
        )
    return bytes(plain)


def _read_one(
    first_line: bytes, content: bytes, where: str, *, redact: bool = True, policy: Redaction = USUAL
) -> tuple[Recording, Comment | None]:
    size = len(first_line) + len(content)
    beginning = size <= len(OPENING) and OPENING.startswith(first_line + content)  # killed before its first exchange
    if beginning or first_line == OPEN_COMMENT or (not first_line and is_open_journal(content)):
        return read_open_journal(first_line + content, where), None
    comment = parse_comment(first_line.rstrip(b"\r\n"), where) if first_line else None
    intact = comment is not None and content_hash(content) == comment.sha256
    if not intact and (first_line or content[:200].partition(b"\n")[0] + b"\n").endswith(b"\r\n"):
        content = content.replace(b"\r\n", b"\n")  # a checkout changed the line ends
        intact = comment is not None and content_hash(content) == comment.sha256
    skipped = 1 if comment is not None else 0
    if comment is not None and comment.layout == "journal":
        recording = read_closed_journal(content, where, intact=intact, skipped=skipped)
    else:
        recording = read_blocks(content, where, intact=intact, skipped=skipped, redact=redact, policy=policy)
    if comment is not None and (not intact or len(recording.rows) != comment.exchanges):
        raise CassetteDamagedError(
            f"Expected {comment.exchanges} exchanges and the content that {where}:1 states, "
            f"got {len(recording.rows)} exchanges and other content; {REMEDY}"
        )
    return msgspec.structs.replace(recording, size=size), comment


# Writing

SHARD_BYTES = 10_000_000
"""A larger cassette is split into shards; git hosts warn of files of 50 MB."""
READABLE_BYTES = 1_000_000
"""A cassette up to this size is closed as readable; larger ones are not reviewed, and load faster as a journal."""

LONGEST_READABLE = 4 << 20
"""A longer exchange makes the cassette a journal, which loads faster than YAML."""

LayoutChoice = Literal["auto", "journal", "readable"]


# ---- saving


def canonical_order(rows: Sequence[Row]) -> list[Row]:
    """Sort by lineage (numbers as numbers), then order of issue, then attempt; never by arrival."""
    return sorted(
        rows, key=lambda row: (natural(row.facts.lineage), row.facts.order, row.facts.ticket, row.facts.attempt)
    )


def save(path: Path, rows: Sequence[Row], layout: LayoutChoice = "auto", *, private: bool = True) -> None:
    """Write a finished cassette; the existing one is replaced atomically once the new one is complete.

    An exchange that is too long for our limit of a YAML line makes it a journal, whatever the layout.
    """
    path = followed(path)
    ordered = canonical_order(rows)
    sizes = [row.end - row.start for row in rows]
    if layout == "auto":
        layout = "readable" if sum(sizes) <= READABLE_BYTES else "journal"
    if max(sizes, default=0) >= LONGEST_READABLE:
        layout = "journal"
    contents = list(_shards(ordered, layout))
    digests = [content_hash(content) for content, _ in contents]
    group = sha256("".join(digests).encode()).hexdigest()[:12] if len(contents) > 1 else ""
    comments = [
        Comment(layout=layout, exchanges=count, sha256=digest, shard=number, shards=len(contents), set=group)
        for number, ((_, count), digest) in enumerate(zip(contents, digests, strict=True), 1)
    ]
    others = [shard_path(path, group, number) for number in range(2, len(contents) + 1)]
    try:
        for file, comment, (content, _) in reversed(list(zip((path, *others), comments, contents, strict=True))):
            write_atomically(file, comment.render() + content, private=private, sole_writer=True)
    except OSError as error:
        raise CassetteError(
            f"Expected to write the cassette {path}, got {error}; free some space or make the folder writable. "
            "What was recorded is still in its journal, and is taken up by the next recording"
        ) from error
    for old in further_shards(path):
        if old not in others:
            old.unlink()


def followed(path: Path) -> Path:
    """Return the target of a link, so that the target is written and the link kept; raises for a loop of links."""
    target = path.resolve() if path.is_symlink() else path
    if target.is_symlink():  # Python 3.13 resolves a loop without an error
        raise OSError(ELOOP, os.strerror(ELOOP), str(path))
    return target


def further_shards(path: Path) -> list[Path]:
    """Return every further shard of this name, of any recording."""
    name = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{12}}\.\d{{4}}{re.escape(path.suffix)}")
    return sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name))


def _shards(rows: Sequence[Row], layout: Layout) -> Iterator[tuple[bytes, int]]:
    """Yield contents of about `SHARD_BYTES`, each with its number of exchanges; at least one."""
    parts, size = [PREAMBLE if rows else EMPTY], 0
    for row in rows:
        item = b"- %b\n" % row.line if layout == "journal" else render_exchange(row.exchange(), row.line).encode()
        if size and size + len(item) > SHARD_BYTES:
            yield b"".join(parts), len(parts) - 1
            parts, size = [PREAMBLE], 0
        parts.append(item)
        size += len(item)
    yield b"".join(parts), len(parts) - 1


# Edits by hand


# ---- accepting edited files


class Accepted(Struct, frozen=True, kw_only=True):
    """The content of an edited cassette, and its differences from its hashes."""

    rows: tuple[Row, ...]
    layout: Layout
    changed: int = 0
    added: int = 0
    removed: int = 0
    is_intact: bool = True  # the file can be read without `accept`

    @property
    def is_edited(self) -> bool:
        """True if exchanges differ."""
        return bool(self.changed or self.added or self.removed)


def read_edited(path: Path) -> Accepted:
    """Read one of our cassettes, including its shards, without checking its hashes.

    Secrets added by an edit are redacted, and calls with edited requests get new tickets. Raises CassetteError for a
    file that is not ours, CassetteDamagedError for one that cannot be decoded.
    """
    try:
        recording = read(path)
        is_intact = recording is not None and not recording.findings
    except CassetteDamagedError:
        is_intact = False
    comment, found = _read_edited(path)
    stated = comment.exchanges if comment else 0
    for number in range(2, comment.shards + 1 if comment else 0):
        shard, more = _read_edited(shard_path(path, comment.set if comment else "", number))
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
        is_intact=is_intact,
    )


def _read_edited(path: Path) -> tuple[Comment | None, list[tuple[Exchange, str]]]:
    """Return the comment of one file, and its exchanges with their stated hashes, or ""."""
    try:
        data = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise CassetteDamagedError(f"Expected the cassette {path}, got {error}; restore it") from error
    first = data[: data.find(b"\n") + 1] if has_comment(data) else b""
    comment = parse_comment(first.rstrip(), str(path)) if first else None
    return comment, list(_exchanges(data[len(first) :], path, skipped=1 if first else 0))


def _exchanges(content: bytes, path: Path, *, skipped: int) -> Iterator[tuple[Exchange, str]]:
    if content.startswith(PREAMBLE + b'- {"'):
        lines = content[len(PREAMBLE) :].split(b"\n")
        for number, line in enumerate(lines, skipped + PREAMBLE.count(b"\n") + 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
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
    """Return an exchange with its streamed answer in one chunk if the chunks do not match its body any more."""
    chunks, size = exchange.facts.chunks, len(exchange.reply.body)
    if not chunks or sum(length for length, _ in chunks) == size:
        return exchange
    return replace(exchange, facts=replace(exchange.facts, chunks=((size, chunks[-1][1]),)))


def _recount(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Give calls whose tickets no longer count from 0 per request and lineage new ones, in order of issue."""
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
