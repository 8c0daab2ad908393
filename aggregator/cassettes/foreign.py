"""From vcrpy's interactions, however they were written, to exchanges.

Understands YAML and JSON cassettes of every vcrpy since 1.0, request bodies that were recorded as mappings,
`parsed_body` (the JSON of a body in the place of its text), `content` and `status_code` (vcrpy before 6, from httpx),
bodies still compressed, and Ruby VCR's shape.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from aggregator.cassettes.compression import NEEDED, TooLargeError, decompressed
from aggregator.cassettes.exchanges import Exchange, Facts
from aggregator.errors import CassetteDamagedError, CassetteRefusedError
from aggregator.records import HTTPReply, HTTPRequest

LARGEST_BODY = 32 << 20


def interactions_of(document: Any, where: str) -> list[dict[str, Any]]:
    """Return a cassette's interactions; raises for anything that is no cassette or of another version."""
    if isinstance(document, dict) and document.get("version", 1) != 1:
        raise CassetteRefusedError(
            f"expected a cassette of version 1 in {where}, got version {document['version']!r}; "
            "a newer tool wrote it: upgrade"
        )
    items = document.get("interactions", document.get("http_interactions")) if isinstance(document, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise CassetteDamagedError(
            f"expected a cassette (`interactions:`, a list of request and response) in {where}, "
            f"got {str(document)[:80]!r}; restore it, or delete it and record again"
        )
    return items


def facts_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return our own facts of an interaction, {} where another tool recorded it."""
    x = item.get("x")
    try:
        facts = msgspec.json.decode(x) if isinstance(x, str) else x
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def to_exchange(item: Mapping[str, Any], facts: Mapping[str, Any], place: str) -> Exchange:
    """Return one interaction as it was on the wire; `place` is its file and line, for errors."""
    try:
        return Exchange(
            request=_request(item["request"]),
            reply=_reply(item["response"], place),
            facts=msgspec.convert(facts or {"lineage": ""}, Facts),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, msgspec.ValidationError) as error:
        if isinstance(error, CassetteDamagedError | CassetteRefusedError):
            raise
        raise CassetteDamagedError(
            f"expected an interaction of vcrpy, "
            f"got one that does not fit ({type(error).__name__}: {error}) - at {place}; "
            "restore the file, or delete it and record again"
        ) from error


def _request(request: Mapping[str, Any]) -> HTTPRequest:
    return HTTPRequest(
        method=str(request["method"]).upper(),
        url=str(request["uri"]),
        body=_body(request),
        headers=_headers(request.get("headers")),
    )


def _reply(response: Mapping[str, Any], place: str) -> HTTPReply:
    status = response["status"] if "status" in response else response["status_code"]
    headers = _headers(response.get("headers"))
    body = _inflated(_body(response), headers.pop("content-encoding", ""), place)
    return HTTPReply(
        status=int(status["code"] if isinstance(status, dict) else status),
        reason=str((status.get("message") if isinstance(status, dict) else "") or ""),
        headers=headers,
        body=body,
    )


def _headers(headers: Any) -> dict[str, str]:
    """Return headers by lower-case name; several values of one name are joined as HTTP joins them."""
    pairs = headers.items() if isinstance(headers, dict) else headers or ()
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        values = value if isinstance(value, list) else [value]
        found.setdefault(str(name).lower(), []).extend(_text(one) for one in values)
    return {name: ", ".join(values) for name, values in found.items()}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _body(side: Mapping[str, Any]) -> bytes:
    """Return the body of a request or response."""
    if "parsed_body" in side:
        return _dumped(side["parsed_body"])
    body = side["content"] if "content" in side else side.get("body")
    if (
        isinstance(body, dict)
        and body.keys() <= {"string", "base64_string", "encoding"}
        and body.keys() & {"string", "base64_string"}
    ):
        if "base64_string" in body:
            return base64.b64decode(body["base64_string"])
        body = body["string"]
    return _raw(body)


def _raw(body: Any) -> bytes:
    if body is None:
        return b""
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, bytes):
        return body
    if isinstance(body, list) and all(isinstance(part, str | bytes) for part in body):  # an iterator's parts
        return b"".join(_raw(part) for part in body)
    return _dumped(body)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _inflated(body: bytes, encoding: str, place: str) -> bytes:
    """Return a body without its content encoding, where it still has one."""
    try:
        plain, left = decompressed(body, encoding, LARGEST_BODY)
    except TooLargeError:
        raise CassetteRefusedError(
            f"expected a body of at most {LARGEST_BODY >> 20} MB, got one that unpacks to more - at {place}; "
            "do not trust this file"
        ) from None
    if left in NEEDED:
        raise CassetteRefusedError(
            f"expected a body that can be unpacked, got {left!r} - at {place}; "
            f"pip install '{NEEDED[left]}', or record it with vcrpy's decode_compressed_response=True"
        )
    return plain
