"""Secrets in a recorded exchange, by the definition of the writer: what the redaction takes away.

Placeholders of other tools' scrubbers, and values that say nothing, are no secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote_plus

from aggregator.cassettes.credentials import (
    SHORTEST,
    Needles,
    is_placeholder,
    is_secret_field,
    is_secret_parameter,
    is_worth_finding,
    needles_of,
)
from aggregator.cassettes.exchanges import Exchange
from aggregator.cassettes.redaction import SECRET_HEADERS, hides_parameter_always, is_kept, redact_cookies, removed_from
from aggregator.cassettes.secrets import query_edits, secret_edits

_KEYS_OF_NOTHING = frozenset(
    {"access-control-allow-credentials", "idempotency-key", "x-idempotency-key", "sec-websocket-key"}
)
_USER = re.compile(r"//([^/@]*)@")


def needles_from(environment: Mapping[str, str]) -> Needles:
    """Return the values of variables with a secret's name: none of them may stand in a cassette; words are none."""
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
