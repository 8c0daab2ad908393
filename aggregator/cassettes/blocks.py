"""Reading every format except journals: our readable layout, and vcrpy's files."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from aggregator.cassettes.credentials import USUAL, Redaction
from aggregator.cassettes.exchanges import (
    NOT_YAML,
    REMEDY,
    Exchange,
    Facts,
    Recording,
    encode_line,
    index_lines,
    line_hash,
)
from aggregator.cassettes.foreign import BUDGET, Budget, interactions_of, parse_document
from aggregator.cassettes.matching import key_of_request
from aggregator.cassettes.payloads import NEEDED, TooLargeError, decompressed
from aggregator.cassettes.redaction import digest_of_redacted, needles_for, redact_lines, redact_requests
from aggregator.errors import CassetteDamagedError, CassetteRefusedError, SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

LARGEST_BODY = 32 << 20
_TOGETHER, _LARGEST_TOGETHER = 64, 1 << 20  # exchanges, bytes, that are searched at once
_LEAST = 300  # bytes of an exchange's line without its bodies


# ---- reading a block


def facts_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return our own facts of an interaction, {} if another tool recorded it."""
    x = item.get("x")
    try:
        facts = msgspec.json.decode(x) if isinstance(x, str) else x
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def to_exchange(item: Mapping[str, Any], facts: Mapping[str, Any], place: str) -> Exchange:
    """Return one interaction as sent and received; `place` is its file and line, for errors."""
    try:
        request = item["request"]
        return Exchange(
            request=HTTPRequest(
                method=str(request["method"]).upper(),
                url=str(request["uri"]),
                body=_body(request),
                headers=_headers(request.get("headers")),
            ),
            reply=_reply(item["response"], place, decode=not facts),
            facts=msgspec.convert(facts or {"lineage": ""}, Facts),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, msgspec.ValidationError) as error:
        if isinstance(error, CassetteDamagedError | CassetteRefusedError):
            raise
        raise CassetteDamagedError(
            f"Expected an interaction of vcrpy, "
            f"got one that does not fit ({type(error).__name__}: {error}) - at {place}; "
            "restore the file, or delete it and record again"
        ) from error


def _reply(response: Mapping[str, Any], place: str, *, decode: bool) -> HTTPReply:
    status = response["status"] if "status" in response else response["status_code"]
    headers = _headers(response.get("headers"), "\n")
    body = _body(response)
    if decode:
        body = _inflated(body, headers.pop("content-encoding", ""), place)
    return HTTPReply(
        status=int(status["code"] if isinstance(status, dict) else status),
        reason=str((status.get("message") if isinstance(status, dict) else "") or ""),
        headers=headers,
        body=body,
    )


def _headers(headers: Any, joined: str = ", ") -> dict[str, str]:
    """Return headers by lower-case name; several values of one name are joined as in HTTP, or as given."""
    pairs = headers.items() if isinstance(headers, dict) else headers or ()
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        values = value if isinstance(value, list) else [value]
        found.setdefault(str(name).lower(), []).extend(_text(one) for one in values)
    return {name: joined.join(values) for name, values in found.items()}


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
    """Return a body without its content encoding, if it still has one."""
    try:
        plain, left = decompressed(body, encoding, LARGEST_BODY)
    except TooLargeError:
        raise CassetteRefusedError(
            f"Expected a body of at most {LARGEST_BODY >> 20} MB, got one that unpacks to more - at {place}; "
            "do not trust this file"
        ) from None
    if left in NEEDED:
        raise CassetteRefusedError(
            f"Expected a body that can be unpacked, got {left!r} - at {place}; "
            f"pip install '{NEEDED[left]}', or record it with vcrpy's decode_compressed_response=True"
        )
    return plain


# ---- reading a readable cassette


def read_blocks(
    content: bytes,
    where: str,
    *,
    intact: bool,
    skipped: int,
    redact: bool = True,
    policy: Redaction = USUAL,
    budget: Budget = BUDGET,
) -> Recording:
    """Read a YAML or JSON cassette; `intact` if its hash is right, after `skipped` lines."""
    document, starts = parse_document(content, where, budget)
    items = interactions_of(document, where)
    facts = [facts_of(item) for item in items]
    ours = ["sha256" in fact for fact in facts]
    adoption = _Adoption(policy if redact else None)
    lines: list[bytes] = []
    size = 0
    for index, item in enumerate(items):
        place = f"{where}:{starts.get(id(item), 0) + skipped}" if starts else f"{where}, interaction {index + 1}"
        exchange = to_exchange(item, facts[index] if ours[index] else {}, place)
        size += len(exchange.request.body) + len(exchange.reply.body) + _LEAST
        if size > budget.total:  # one body under many aliases, or many that decompress to much
            raise CassetteRefusedError(
                f"Expected a cassette of at most {budget.total:,} bytes, got one that unpacks to more - at {place}; "
                "do not trust this file, or split it if it is yours"
            )
        if ours[index]:
            lines += [*adoption.finish(), _check_line(facts[index], exchange, place)]
        else:
            lines += adoption.take(exchange, index, place)
    lines += adoption.finish()
    findings = []
    if changed := adoption.changed:
        findings.append(
            f"{where}: {len(changed)} answers are changed by the redaction of secrets, as at {changed[0]}; "
            "see the rules for secrets in docs/cassettes.md"
        )
    if any(ours) and not intact and not skipped:
        findings.append(f"{where}: it has no leading comment, so a missing last exchange cannot be detected")
    return Recording(
        rows=tuple(index_lines(lines)),
        state="closed" if intact else "foreign",
        layout="readable" if any(ours) or intact else "foreign",
        findings=tuple(findings),
    )


def _check_line(facts: dict[str, Any], exchange: Exchange, place: str) -> bytes:
    """Return the journal line of one of our own, whose hash must be right."""
    line = encode_line(exchange)
    if not line.endswith(rb'\"sha256\":\"%b\"}"}' % str(facts["sha256"]).encode()):
        raise CassetteDamagedError(f"Expected an exchange that fits its hash, got another - at {place}; {REMEDY}")
    return line


class _Adoption:
    """Converts another tool's exchanges to lines: no lineage, played in the order of the file, secrets redacted.

    It converts several at once, which halves the cost; `policy` is None for no redaction. `changed` are the places of
    answers that the redaction changed.
    """

    def __init__(self, policy: Redaction | None) -> None:
        self.changed: list[str] = []
        self._policy = policy
        self._scrubbed = None if policy is None else replace(policy, scrubbed=True)
        self._calls: dict[bytes, int] = {}
        self._waiting: list[tuple[Exchange, int, str]] = []
        self._size = 0

    def take(self, exchange: Exchange, index: int, place: str) -> list[bytes]:
        """Add an exchange; return lines once there are enough of them."""
        self._waiting.append((exchange, index, place))
        self._size += len(exchange.request.body) + len(exchange.reply.body)
        return self.finish() if len(self._waiting) >= _TOGETHER or self._size >= _LARGEST_TOGETHER else []

    def finish(self) -> list[bytes]:
        """Return the lines of the added exchanges."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        requests = [exchange.request for exchange, _, _ in waiting]
        if self._policy is None or self._scrubbed is None or not waiting:
            return [encode_line(self._place(exchange, exchange.request, index)) for exchange, index, _ in waiting]
        clean = redact_requests(requests, self._scrubbed)
        placed = [
            self._place(exchange, request, index) for (exchange, index, _), request in zip(waiting, clean, strict=True)
        ]
        needles = [needles_for(request) for request in requests]
        lines = []
        for line, (_, _, place) in zip(redact_lines(placed, needles, self._policy), waiting, strict=True):
            if isinstance(line, SecretLeakError):
                raise line
            lines.append(line.data)
            self.changed += [place] if line.is_changed else []
        return lines

    def _place(self, exchange: Exchange, request: HTTPRequest, index: int) -> Exchange:
        key = key_of_request(request)
        ticket = self._calls[key] = self._calls.get(key, -1) + 1
        digest = ""
        if self._policy is not None and request.body != exchange.request.body:
            digest = digest_of_redacted(exchange.request, self._policy)
        return replace(exchange, request=request, facts=Facts(lineage="", ticket=ticket, order=index, redacted=digest))


# characters that a literal cannot hold, or would not return exactly
_NOT_LITERAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9._~/?&=%+-]*(?::\d+)?[A-Za-z0-9._~/?&=%+-]*")
_PLAIN_NAME = re.compile(r"[a-z][a-z0-9]*-[a-z0-9-]*[a-z0-9]|accept|date")


# ---- writing a block


def render_exchange(exchange: Exchange, line: bytes | memoryview) -> str:
    """Return the exchange as a block item; `line` is its journal line, whose hash it keeps."""
    request, reply = exchange.request, exchange.reply
    facts = escaped(msgspec.json.encode(exchange.facts).decode()[:-1]).replace("'", "''")
    return "".join(
        (
            f"- request:\n    method: {quoted(request.method)}\n",
            f"    uri: {request.url if _PLAIN_URL.fullmatch(request.url) else quoted(request.url)}\n",
            _header_block(request.headers),
            f"    body: {scalar(request.body, 6)}",
            f"  response:\n    status:\n      code: {reply.status}\n      message: {quoted(reply.reason)}\n",
            _header_block(reply.headers),
            f"    body:\n      string: {scalar(reply.body, 8)}",
            f'  x: \'{facts},"sha256":"{line_hash(line)}"}}\'\n',
        )
    )


def _header_block(headers: Mapping[str, str]) -> str:
    if not headers:
        return "    headers: {}\n"
    lines = [
        f"      {name if _PLAIN_NAME.fullmatch(name) else quoted(name)}:\n"
        + "".join(f"      - {quoted(value)}\n" for value in values.split("\n"))
        for name, values in headers.items()
    ]
    return f"    headers:\n{''.join(lines)}"


def quoted(text: str) -> str:
    r"""Return a text in double quotes, readable as JSON and YAML.

    >>> print(quoted('a "b"'))
    "a \"b\""
    """
    return escaped(msgspec.json.encode(text).decode())


def escaped(json: str) -> str:
    """Return JSON with escapes for characters that PyYAML does not accept."""
    return NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", json)


def scalar(body: bytes, indent: int) -> str:
    """Return a body as the value of a key, including the line break.

    >>> print(scalar(b'{"a": 1}', 2), end="")
    |-
      {"a": 1}
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return f'!!binary "{base64.b64encode(body).decode()}"\n'
    if not text.strip() or _NOT_LITERAL.search(text):
        return f"{quoted(text)}\n"
    content = text.rstrip("\n")
    breaks = len(text) - len(content)
    if content != content.rstrip(" \t\n") and content.rpartition("\n")[2].strip() == "":
        return f"{quoted(text)}\n"  # ends in a line of blanks, which a literal would lose
    keep = "-" if breaks == 0 else "" if breaks == 1 else "+"
    # a literal that starts with a blank must state its indentation
    depth = "2" if text[0] in " \n\t" else ""
    pad = " " * indent
    lines = "\n".join(pad + line if line else "" for line in content.split("\n"))
    return "".join((f"|{depth}{keep}\n{lines}\n", "\n" * (breaks - 1)))
