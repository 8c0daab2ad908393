"""Content codings are undone, whole or not at all, within a limit."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard

from aggregator.cassettes.payloads import TooLargeError, decompressed

PLAIN = b'{"text": "hello"}'
CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("coding", CODINGS)
def test_codings_are_undone(coding: str) -> None:
    """Whether the client had decoded the body already or not; several codings in the order they were laid on."""
    packed = CODINGS[coding](PLAIN)
    assert decompressed(packed, coding) == (PLAIN, "")
    assert decompressed(PLAIN, coding) == (PLAIN, "")
    assert decompressed(gzip.compress(packed), f"{coding}, GZip") == (PLAIN, "")
    assert decompressed(b"", coding) == (b"", "")


def test_deflate_without_its_frame_is_undone() -> None:
    """Some servers send the bare stream."""
    assert decompressed(zlib.compress(PLAIN)[2:-4], "deflate") == (PLAIN, "")


@pytest.mark.parametrize("coding", CODINGS)
def test_a_cut_body_is_no_body(coding: str) -> None:
    """Half of a text is not taken for the whole: the coding stays named."""
    packed = CODINGS[coding](bytes(range(256)) * 9)[:-9]
    assert decompressed(packed, coding) == (packed, coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_found_by_its_size(coding: str) -> None:
    """What unpacks to more than the limit is not unpacked to its end; up to the limit it is."""
    body = bytes(3 << 20)
    packed = CODINGS[coding](body)
    assert decompressed(packed, coding, len(body)) == (body, "")
    with pytest.raises(TooLargeError):
        decompressed(packed, coding, len(body) - 1)


def test_unknown_codings_stay_named() -> None:
    """Bytes of an unknown coding are returned as they are; text has been decoded by the client that knew it."""
    assert decompressed(b"\xff\xfe\x00", "unknown") == (b"\xff\xfe\x00", "unknown")
    assert decompressed(PLAIN, "unknown, identity") == (PLAIN, "")
