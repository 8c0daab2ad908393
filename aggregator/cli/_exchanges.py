"""What a recorded exchange holds: model and tokens, secrets, its text for a terminal; and how two cassettes differ.

Model and tokens are read from our own facts or from the provider's fields, streams included: OpenAI (chat, Responses,
embeddings) and compatible servers, Anthropic, Gemini, Bedrock, Cohere, Ollama. Secrets are what the redaction would
remove; placeholders of other tools' scrubbers are not secrets.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

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
from aggregator.cassettes.payloads import decode_event, event_spans
from aggregator.cassettes.redaction import SECRET_HEADERS, hides_parameter_always, is_kept, redact_cookies, removed_from
from aggregator.cassettes.secrets import query_edits, secret_edits
from aggregator.checks import is_number
from aggregator.text import clip, json_changes

LARGEST_FIGURE = 1e15
_MODEL_FIELDS = ("model", "modelId", "model_id", "engine", "modelVersion", "model_name")
_MODEL_IN_PATH = re.compile(r"/(?:models?|deployments|engines)/([^/?]+?)(?::[a-zA-Z]+)?(?:[/?#]|$)")
_INPUT = (
    *("input_tokens", "prompt_tokens", "promptTokenCount", "inputTokens", "inputTokenCount"),
    *("prompt_eval_count", "prompt_token_count", "inputTextTokenCount"),
)
_OUTPUT = (
    *("output_tokens", "completion_tokens", "candidatesTokenCount", "outputTokens", "outputTokenCount"),
    *("eval_count", "generation_token_count", "tokenCount"),
)
_MORE_INPUT = (  # which these providers leave out of the input
    *("cache_read_input_tokens", "cache_creation_input_tokens", "cacheReadInputTokens", "cacheWriteInputTokens"),
)
_MORE_OUTPUT = ("thoughtsTokenCount",)
_HOLDERS = (
    *("usage", "usageMetadata", "tokens", "billed_units", "meta", "response", "message", "delta", "x_groq", "metadata"),
    *("amazon-bedrock-invocationMetrics", "results"),
)
"""Where an answer, or an event of a stream, holds its figures, at any depth of these."""
_HINT = re.compile(rb"oken|eval_count|usage|modelId|\"bytes\"", re.IGNORECASE)
_EVENT_STREAM = "application/vnd.amazon.eventstream"


def model_of(exchange: Exchange) -> str:
    """Return the model that was asked: what we noted, else what request, address or answer say, else ""."""
    if exchange.facts.model:
        return exchange.facts.model
    asked = _model_in(_json_of(exchange.request.body))
    if asked:
        return asked
    named = _MODEL_IN_PATH.search(exchange.request.url)  # of Gemini, Bedrock and Azure
    if named:
        return unquote(named[1]).partition(":generate")[0]
    return next((model for answer in _answers(exchange) if (model := _model_in(answer))), "")


def usage_of(exchange: Exchange) -> dict[str, int | float]:
    """Return the tokens and cost of an exchange: what we noted, else what the answer says of itself."""
    if exchange.facts.usage:
        return {name: amount for name, amount in exchange.facts.usage.items() if is_figure(amount)}
    found: dict[str, int | float] = {}
    for answer in _answers(exchange):
        found |= _usage_in(answer)  # the last event of a stream says the sum
    headers = exchange.reply.headers
    for side in ("input", "output"):
        count = headers.get(f"x-amzn-bedrock-{side}-token-count", "")
        if count.isdigit() and f"{side}_tokens" not in found:
            found[f"{side}_tokens"] = int(count)
    return dict(sorted(found.items()))


def is_figure(amount: Any) -> bool:
    """Return True for a number that can be summed and printed; another tool's file may hold any other."""
    return is_number(amount) and 0 <= amount < LARGEST_FIGURE


def _json_of(body: bytes) -> Any:
    try:
        return decode_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _model_in(value: Any) -> str:
    for name in _MODEL_FIELDS if isinstance(value, dict) else ():
        if isinstance(model := value.get(name), str) and model:
            return model
    inner = value.get("response") or value.get("message") if isinstance(value, dict) else None
    return _model_in(inner) if isinstance(inner, dict) else ""


def _answers(exchange: Exchange) -> Iterator[Any]:
    """Yield the JSON of an answer: one document, or the events of a stream that may hold figures."""
    reply = exchange.reply
    if reply.headers.get("content-type", "").startswith(_EVENT_STREAM):
        yield from _frames(reply.body)
        return
    spans = event_spans(reply.body)
    if not spans:
        whole = _json_of(reply.body)
        yield from whole if isinstance(whole, list) else (whole,)  # Gemini streams a list
    for start, end in spans:
        event = reply.body[start:end]
        if _HINT.search(event):
            yield decode_event(event)


def _frames(body: bytes) -> Iterator[Any]:
    """Yield the payloads of an AWS event stream; those of `invoke` wrap a model's own event."""
    start = 0
    while start + 16 <= len(body):
        size, head = (int.from_bytes(body[at : at + 4], "big") for at in (start, start + 4))
        if size < head + 16 or start + size > len(body):
            return
        payload = _json_of(body[start + 12 + head : start + size - 4])
        if isinstance(payload, dict) and isinstance(payload.get("bytes"), str):
            try:
                payload = _json_of(base64.b64decode(payload["bytes"]))
            except ValueError:
                payload = None
        yield payload
        start += size


def _usage_in(value: Any) -> dict[str, int | float]:
    """Return the tokens that an answer or an event states, wherever its provider puts them."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if not isinstance(value, dict):
        return {}
    found: dict[str, int | float] = {}
    for holder in _HOLDERS:
        if isinstance(value.get(holder), dict | list):
            found = _usage_in(value[holder]) | found
    for side, names, more in (("input", _INPUT, _MORE_INPUT), ("output", _OUTPUT, _MORE_OUTPUT)):
        tokens = next((value[name] for name in names if is_figure(value.get(name))), None)
        if tokens is not None:
            found[f"{side}_tokens"] = tokens + _sum_of(value, more)
    if not found and is_figure(value.get("total_tokens")):  # of an embedding
        found["input_tokens"] = value["total_tokens"]
    return found


def _sum_of(value: Mapping[str, Any], names: tuple[str, ...]) -> int | float:
    figures: list[int | float] = [value[name] for name in names if is_figure(value.get(name))]
    return sum(figures)


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
    """Return what an answer says beside its body, and what ended it."""
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


def needles_from(environment: Mapping[str, str]) -> Needles:
    """Return the values of variables with a secret's name: none of them may be in a cassette; words are none."""
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
