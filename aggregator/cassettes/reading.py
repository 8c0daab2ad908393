"""From a file to rows that can be looked up, with every cut and edit told.

A file that states its hash is checked against it; where they differ, each exchange's own hash tells the line.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from aggregator.cassettes.blocks import read_blocks
from aggregator.cassettes.compression import TooLargeError, decompressed
from aggregator.cassettes.credentials import USUAL, Redaction
from aggregator.cassettes.documents import BUDGET
from aggregator.cassettes.exchanges import REMEDY, Recording, Row, index_lines
from aggregator.cassettes.journal import (
    OPEN_COMMENT,
    OPENING,
    Comment,
    content_hash,
    has_comment,
    is_open_journal,
    parse_comment,
    read_closed_journal,
    read_open_journal,
)
from aggregator.errors import CassetteDamagedError, CassetteError, CassetteRefusedError

_LONGEST_COMMENT = 4_096
GZIP = b"\x1f\x8b"
__all__ = ["Recording", "Row", "index_lines", "read", "shard_path"]


def read(path: Path, *, redact: bool = True, policy: Redaction = USUAL) -> Recording | None:
    """Return what a cassette holds, its shards included; None where there is none.

    Another tool's cassette comes without its secrets; `redact=False` returns what is really in the file.

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
    """Return where a shard stands; the name tells the recording, so that two are never mixed.

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
    """Return a file's leading comment (b"" without one) and what follows it; cut later, 47 MB would be copied."""
    try:
        with path.open("rb", buffering=0) as file:  # a buffer would hold the whole a second time
            seekable = file.seekable()  # a pipe gives its bytes once
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
    if not data[0] and (not data[1] or data[1].isspace()):
        raise CassetteDamagedError(f"Expected a cassette in {path}, got an empty file; delete it to record anew")
    return data


def unpack_file(data: bytes, where: str) -> bytes:
    """Return what a compressed file holds; raises CassetteDamagedError, and CassetteRefusedError over the budget."""
    try:
        plain, left = decompressed(data, "gzip", BUDGET.size)
    except TooLargeError:
        raise CassetteRefusedError(
            f"Expected at most {BUDGET.size >> 20} MB in {where}, got a file that unpacks to more; do not trust it"
        ) from None
    if left:
        raise CassetteDamagedError(
            f"Expected a whole gzip file, got {where}; restore it, or delete it and record again"
        )
    return plain


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
