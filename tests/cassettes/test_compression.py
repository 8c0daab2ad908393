"""Content codings are decoded, completely or not at all, within a limit."""

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
def test_codings_are_decoded(coding: str) -> None:
    """This works whether or not the client has decoded the body already, and for several codings in order."""
    packed = CODINGS[coding](PLAIN)
    assert decompressed(packed, coding) == (PLAIN, "")
    assert decompressed(PLAIN, coding) == (PLAIN, "")
    assert decompressed(gzip.compress(packed), f"{coding}, GZip") == (PLAIN, "")
    assert decompressed(b"", coding) == (b"", "")


def test_raw_deflate_is_decoded() -> None:
    """Some servers send deflate without the zlib header."""
    assert decompressed(zlib.compress(PLAIN)[2:-4], "deflate") == (PLAIN, "")


@pytest.mark.parametrize("coding", CODINGS)
def test_a_truncated_body_is_not_decoded(coding: str) -> None:
    """Half of a text is not used as the whole: the coding keeps its header."""
    packed = CODINGS[coding](bytes(range(256)) * 9)[:-9]
    assert decompressed(packed, coding) == (packed, coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_detected_by_its_size(coding: str) -> None:
    """Decompression stops at the limit; up to the limit a body is decompressed."""
    body = bytes(3 << 20)
    packed = CODINGS[coding](body)
    assert decompressed(packed, coding, len(body)) == (body, "")
    with pytest.raises(TooLargeError):
        decompressed(packed, coding, len(body) - 1)


def test_unknown_codings_keep_their_header() -> None:
    """Bytes of an unknown coding are returned unchanged; text was decoded by the client."""
    assert decompressed(b"\xff\xfe\x00", "unknown") == (b"\xff\xfe\x00", "unknown")
    assert decompressed(PLAIN, "unknown, identity") == (PLAIN, "")
