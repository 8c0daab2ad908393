"""Finished cassettes on disk: canonical order, one atomic replacement, shards where one file would be too large."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aggregator.cassettes.comments import PREAMBLE, Comment, Layout, content_hash
from aggregator.cassettes.lineage import natural
from aggregator.cassettes.reading import Row

LayoutChoice = Literal["auto", "journal", "readable"]


def canonical_order(rows: Sequence[Row]) -> list[Row]:
    """Sort by lineage (numbers as numbers), then order of issue within it, then attempt: never by arrival."""
    return sorted(
        rows, key=lambda row: (natural(row.place.lineage), row.place.order, row.place.ticket, row.place.attempt)
    )


def render(rows: Sequence[Row], layout: Layout) -> bytes:
    """Return the content of a file, without its leading comment."""
    return PREAMBLE + b"".join(b"- %b\n" % bytes(row.line) for row in rows)


def save(path: Path, rows: Sequence[Row], layout: LayoutChoice = "auto") -> None:
    """Write a cassette; what stood there is replaced at once or not at all."""
    content = render(rows, "journal")
    comment = Comment(layout="journal", exchanges=len(rows), sha256=content_hash(content))
    replace_file(path, comment.render() + content)


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file through a temporary one beside it, on the device before it takes the name."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
