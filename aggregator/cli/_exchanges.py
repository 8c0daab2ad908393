"""What a recorded exchange holds: model and tokens, secrets, its text for a terminal; and how two cassettes differ.

Model and tokens are read from our own facts or from the provider's fields (`llm/reading.py`). Secrets are what the
redaction would remove; placeholders of other tools' scrubbers are not secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_plus

import msgspec
from msgspec import Struct

from aggregator.cassettes.credentials import (
    SHORTEST,
    Needles,
    is_placeholder,
    is_secret_field,
    is_secret_parameter,
    is_worth_finding,
    needles_of,
)
from aggregator.cassettes.exchanges import Exchange, Row, exchange_id
from aggregator.cassettes.matching import decode_json
from aggregator.cassettes.redaction import SECRET_HEADERS, hides_parameter_always, is_kept, redact_cookies, removed_from
from aggregator.cassettes.secrets import query_edits, secret_edits
from aggregator.llm.reading import is_figure, read_model, read_usage
from aggregator.text import clip, json_changes

# ---- model and tokens of an exchange


def model_of(exchange: Exchange) -> str:
    """Return the model that was asked: what we noted, else what request, address or answer say, else ""."""
    return exchange.facts.model or read_model(exchange.request, exchange.reply)


def usage_of(exchange: Exchange) -> dict[str, int | float]:
    """Return the tokens and cost of an exchange: what we noted, else what the answer says of itself."""
    noted = exchange.facts.usage
    return {name: amount for name, amount in noted.items() if is_figure(amount)} or read_usage(exchange.reply)


# ---- showing an exchange


def render(exchange: Exchange) -> str:
    """Return one exchange in full: our facts, then request and answer, JSON indented."""
    request, reply, facts = exchange.request, exchange.reply, exchange.facts
    known = {
        "lineage": f"{facts.lineage or '-'} #{facts.ticket}.{facts.attempt}",
        "role": facts.role,
        "model": model_of(exchange) or "-",
        "recorded": f"{facts.at or 'unknown'}, {facts.ms:.0f} ms",
        "usage": ", ".join(f"{name} {amount:g}" for name, amount in usage_of(exchange).items()) or "unknown",
    }
    lines = [f"{name:<9} {text}" for name, text in known.items()]
    lines += ["", f"{request.method} {request.url}", *_header_lines(request.headers), "", _pretty(request.body), ""]
    if reply.status:
        lines += [f"{reply.status} {reply.reason}", *_header_lines(reply.headers), "", _pretty(reply.body)]
    if facts.error is not None:
        lines.append(f"{facts.error[0]}: {facts.error[1]}")
    return "\n".join(lines)


def _header_lines(headers: Mapping[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in headers.items()]


def value_of(body: bytes) -> Any:
    """Return a body as JSON, else as text, else as the bytes that it is."""
    for decode in (decode_json, bytes.decode):
        try:
            return decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return body


def _pretty(body: bytes) -> str:
    value = value_of(body)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


_TELLING_HEADERS = frozenset({"content-type", "location", "retry-after", "retry-after-ms", "x-should-retry"})
"""What a client goes by; dates, ids and rate limits differ in every recording."""


# ---- differences of two exchanges


class Difference(Struct, frozen=True, kw_only=True):
    """How two cassettes differ: exchanges of one only, and answers that are not the same any more."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed)


def difference(before: Sequence[Row], after: Sequence[Row]) -> Difference:
    """Compare two cassettes exchange by exchange: the same request at the same place of the run."""
    old = {_identity(row): row for row in before}
    new = {_identity(row): row for row in after}
    changed = {
        exchange_id(row): changes
        for identity, row in old.items()
        if identity in new and (changes := tuple(_answer_changes(row.exchange(), new[identity].exchange())))
    }
    return Difference(
        removed=tuple(exchange_id(row) for identity, row in old.items() if identity not in new),
        added=tuple(exchange_id(row) for identity, row in new.items() if identity not in old),
        changed=changed,
    )


def _identity(row: Row) -> tuple[bytes, str, int, int]:
    return row.key, row.facts.lineage, row.facts.ticket, row.facts.attempt


def _answer_changes(old: Exchange, new: Exchange) -> Iterator[str]:
    yield from (change.removeprefix("$.") for change in describe_changes(_head(old), _head(new)))
    if old.reply.body != new.reply.body:
        changes = list(describe_changes(value_of(old.reply.body), value_of(new.reply.body)))
        yield from changes or ["body: the same JSON, written otherwise"]


def _head(exchange: Exchange) -> dict[str, Any]:
    """Return status, headers that matter and error of an answer."""
    reply, error = exchange.reply, exchange.facts.error
    headers = {name: value for name, value in reply.headers.items() if name in _TELLING_HEADERS}
    return {"status": reply.status, **headers, **({"error": ": ".join(error)} if error else {})}


def describe_changes(old: Any, new: Any) -> Iterator[str]:
    """Yield each difference of two JSON values with its path.

    >>> list(describe_changes({"a": [1, 2], "b": 1}, {"a": [1, 3]}))
    ['$.a[1]: 2 -> 3', '$.b: 1 -> nothing']
    """
    for path, before, after in json_changes(old, new, "$"):
        yield f"{path}: {clip(repr(before), 60)} -> {clip(repr(after), 60)}"


_KEYS_OF_NOTHING = frozenset(
    {"access-control-allow-credentials", "idempotency-key", "x-idempotency-key", "sec-websocket-key"}
)
_USER = re.compile(r"//([^/@]*)@")


# ---- secrets in a cassette


def needles_from(environment: Mapping[str, str]) -> Needles:
    """Return the values of variables with a secret's name, which no cassette may hold; plain words do not count."""
    values = [value for name, value in environment.items() if is_secret_field(name) and len(value) >= SHORTEST]
    return needles_of(frozenset(filter(is_worth_finding, values)))


def secrets_in(exchange: Exchange, needles: Needles = ()) -> list[str]:
    """Return the places that hold a secret: what the redaction would take away, were the exchange written now."""
    request, reply = exchange.request, exchange.reply
    found = []
    if _are_secret(_removed_from_address(request.url, needles)):
        found.append("the request's address")
    for place, body, headers in (
        ("the request's body", request.body, request.headers),
        ("the answer's body", reply.body, reply.headers),
    ):
        if _are_secret(text.decode(errors="replace") for text in removed_from(body, headers, needles)):
            found.append(place)
    for side, headers in (("request's", request.headers), ("answer's", reply.headers)):
        found += [f"the {side} header {name}" for name, value in headers.items() if _is_secret(name, value, needles)]
    if exchange.facts.error and _are_secret(_removed_from_text(exchange.facts.error[1], needles)):
        found.append("the recorded error")
    return found


def _are_secret(removed: Iterable[str]) -> bool:
    return not all(is_placeholder(text) for text in removed)


def _removed_from_address(url: str, needles: Needles) -> Iterator[str]:
    """Yield what is redacted in an address: parameters, user and password, what authenticates, tokens."""
    address, _, rest = url.partition("?")
    for pair in re.split("[&#]", rest) if rest else url.partition("#")[2].split("&"):
        name, _, value = pair.partition("=")
        if hides_parameter_always(name):
            yield unquote_plus(value)
    if user := _USER.search(address):
        yield user[1].rpartition(":")[2]
    data = url.encode(errors="surrogateescape")
    yield from (data[start:end].decode(errors="replace") for start, end, _ in secret_edits(data, needles))


def _removed_from_text(text: str, needles: Needles) -> Iterator[str]:
    data = text.encode(errors="surrogateescape")
    for start, end, _ in (*query_edits(data), *secret_edits(data, needles)):
        yield data[start:end].decode(errors="replace")


def _is_secret(name: str, value: str, needles: Needles) -> bool:
    lower = name.lower()
    if lower in _KEYS_OF_NOTHING or is_placeholder(value) or value.replace(".", "").isdigit():
        return False
    if lower == "set-cookie" and "=" in value and redact_cookies(value) == value:
        return False
    is_named = lower in SECRET_HEADERS or (is_secret_parameter(lower) and not is_kept(lower))
    return is_named or _are_secret(_removed_from_text(value, needles))
