"""Content codings of recorded bodies undone, within a limit: gzip, deflate, br (package brotli), zstd (zstandard)."""

from __future__ import annotations

import sys
import zlib
from importlib import import_module

NEEDED = {"br": "brotli>=1.2", "zstd": "zstandard"}
"""The package that each coding beyond the standard library's needs."""


_LARGEST_INFLATED = 1 << 24  # how far a body is looked into for secrets


class TooLargeError(Exception):
    """A body unpacks to more than the limit."""


def decompressed(body: bytes, encoding: str, limit: int = sys.maxsize) -> tuple[bytes, str]:
    """Return the body without its content codings, and the coding that could not be undone ("" for none).

    Some clients hand over what came from the wire, others what they decoded: text has been decoded already. Raises
    TooLargeError above `limit` bytes.

    >>> import gzip
    >>> decompressed(gzip.compress(b"hello"), "gzip"), decompressed(b"hello", "gzip")
    ((b'hello', ''), (b'hello', ''))
    """
    for coding in reversed([part.strip().lower() for part in encoding.split(",") if part.strip()]):
        plain = _undo(coding, body, limit)
        if plain is None:
            return (body, "") if _is_text(body) else (body, coding)
        body = plain
    return body, ""


def _undo(coding: str, body: bytes, limit: int) -> bytes | None:
    """One coding undone; None where the body is not of it, or cut, or the coding's package is absent."""
    try:
        match coding:
            case "gzip" | "x-gzip":
                return _inflated(body, 31, limit)
            case "deflate":
                plain = _inflated(body, 15, limit)
                return _inflated(body, -15, limit) if plain is None else plain  # some servers send it bare
            case "br":
                return _unbrotlied(body, limit)
            case "zstd":
                return _unzstded(body, limit)
            case "identity":
                return body
    except TooLargeError:
        raise
    except Exception:  # noqa: BLE001 - each library has its own error for "not compressed at all"
        return None
    return None


def _inflated(body: bytes, wbits: int, limit: int) -> bytes | None:
    stream = zlib.decompressobj(wbits)
    try:
        plain = stream.decompress(body, limit)
    except zlib.error:
        return None
    if stream.unconsumed_tail:
        raise TooLargeError
    return plain if stream.eof else None


def _unbrotlied(body: bytes, limit: int) -> bytes | None:
    stream = import_module("brotli").Decompressor()
    pieces, size = [stream.process(body, output_buffer_limit=1 << 20)], 0
    while pieces[-1]:
        size += len(pieces[-1])
        if size > limit:
            raise TooLargeError
        if stream.is_finished():
            return b"".join(pieces)
        pieces.append(stream.process(b"", output_buffer_limit=1 << 20))
    return b"" if stream.is_finished() else None


def _unzstded(body: bytes, limit: int) -> bytes | None:
    with import_module("zstandard").ZstdDecompressor().stream_reader(body, read_across_frames=True) as stream:
        plain = bytes(stream.read(limit + 1) if limit < sys.maxsize else stream.readall())
    if len(plain) > limit:
        raise TooLargeError
    return plain or None


def _is_text(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def inflated(body: bytes) -> bytes:
    """Return what a body in gzip, zlib or bare deflate holds, as far as it is sane to look; b"" for any other body."""
    if body.isascii():
        return b""
    return next((plain for wbits in (47, -15) if (plain := _unpacked(body, wbits))), b"")


def _unpacked(body: bytes, wbits: int) -> bytes:
    """Return what can be unpacked, of all members of a gzip file."""
    plain = b""
    try:
        while body and len(plain) < _LARGEST_INFLATED:
            member = zlib.decompressobj(wbits=wbits)
            plain += member.decompress(body, _LARGEST_INFLATED - len(plain))
            body = member.unused_data
    except zlib.error:
        pass  # what follows is something else
    return plain
