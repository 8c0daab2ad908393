"""Frames of AWS's event stream, as a server sends them."""

from __future__ import annotations

import json
import struct
from binascii import crc32
from typing import Any


def frame(kind: str, payload: Any, *, message_type: str = "event", **more: str) -> bytes:
    """Build one frame; `payload` is JSON or bytes."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    named = {f":{message_type}-type": kind, ":content-type": "application/json", ":message-type": message_type}
    headers = b"".join(text_header(name, value) for name, value in {**named, **more}.items())
    return packed(headers, body)


def text_header(name: str, value: str) -> bytes:
    data = value.encode()
    return struct.pack("!B", len(name)) + name.encode() + b"\x07" + struct.pack("!H", len(data)) + data


def packed(headers: bytes, body: bytes) -> bytes:
    """Join headers and payload with their lengths and checksums."""
    prelude = struct.pack("!II", 16 + len(headers) + len(body), len(headers))
    whole = prelude + struct.pack("!I", crc32(prelude)) + headers + body
    return whole + struct.pack("!I", crc32(whole))
