"""What a recorded cassette holds, as facts: totals, differences, what is wrong with it.

Pure functions over rows and exchanges, beside `find_cassettes`; `aggregator cassette` prints what they return.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.cassettes.exchanges import Exchange, line_is_whole
from aggregator.cassettes.keys import decode_json, raw_key
from aggregator.cassettes.redaction import redact_body, redact_request, redact_text
from aggregator.cassettes.rows import Recording, Row
from aggregator.cassettes.secrets import PLACEHOLDER, Needles, is_secret_field, needles_of
from aggregator.errors import ConfigError

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
_SHARD = re.compile(r".*\.[0-9a-f]{12}\.\d{4}")
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie"})
_USAGE_NAMES = {  # the provider's words, ours
    "input": ("input_tokens", "prompt_tokens", "promptTokenCount"),
    "output": ("output_tokens", "completion_tokens", "candidatesTokenCount"),
}


def exchange_id(row: Row) -> str:
    """Return the name of an exchange within its cassette: lineage, ticket, attempt and the start of its key."""
    place = row.place
    return f"{place.lineage or '-'} #{place.ticket}.{place.attempt} {row.key.hex()[:12]}"


def find_cassettes(paths: Iterable[Path]) -> list[Path]:
    """Return the cassettes that files and folders stand for; a cassette's further shards belong to its first.

    Raises ConfigError for a path that is not there.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(
                file
                for file in path.rglob("*")
                if file.suffix in SUFFIXES and file.is_file() and not _SHARD.fullmatch(file.stem)
            )
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"expected a cassette or a folder of them, got {str(path)!r}, which is not there")
    return list(dict.fromkeys(found))


def model_of(exchange: Exchange) -> str:
    """Return the model that was asked: what we noted, else what the request says, else ""."""
    if exchange.facts.model:
        return exchange.facts.model
    model = _json_object(exchange.request.body).get("model")
    if isinstance(model, str):
        return model
    named = re.search(r"/models/([^/:?]+)", exchange.request.url)  # Gemini's is in the path
    return named[1] if named else ""


def usage_of(exchange: Exchange) -> dict[str, int | float]:
    """Return the tokens and cost of an exchange: what we noted, else what a JSON reply says of itself."""
    if exchange.facts.usage:
        return exchange.facts.usage
    reply = _json_object(exchange.reply.body)
    usage = reply.get("usage") or reply.get("usageMetadata")
    if not isinstance(usage, dict):
        return {}
    found = {
        f"{side}_tokens": next((usage[name] for name in names if isinstance(usage.get(name), int)), None)
        for side, names in _USAGE_NAMES.items()
    }
    return {name: tokens for name, tokens in found.items() if tokens is not None}


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = decode_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Totals(Struct, frozen=True, kw_only=True):
    """Sums over exchanges. Tokens and cost are sums of what is known; `unknown` counts answers that told none."""

    exchanges: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    unknown: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


def totals_of(exchange: Exchange) -> Totals:
    """Return one exchange as totals; an error status or no answer at all counts as failed."""
    usage = usage_of(exchange)
    return Totals(
        exchanges=1,
        failed=int(exchange.facts.error is not None or not 200 <= exchange.reply.status < 400),
        input_tokens=int(usage.get("input_tokens", 0)),
        output_tokens=int(usage.get("output_tokens", 0)),
        cost=usage.get("cost", 0.0),
        seconds=exchange.facts.ms / 1e3,
        unknown=int(not usage),
    )


def tally(exchanges: Iterable[Exchange]) -> dict[tuple[str, str], Totals]:
    """Return the totals of each (role, model), in their order."""
    sums: dict[tuple[str, str], Totals] = {}
    for exchange in exchanges:
        group = (exchange.facts.role, model_of(exchange))
        sums[group] = sums.get(group, Totals()) + totals_of(exchange)
    return dict(sorted(sums.items()))


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
    return row.key, row.place.lineage, row.place.ticket, row.place.attempt


def _answer_changes(old: Exchange, new: Exchange) -> Iterator[str]:
    if old.reply.status != new.reply.status:
        yield f"status: {old.reply.status} -> {new.reply.status}"
    if old.reply.body != new.reply.body:
        a, b = _value(old.reply.body), _value(new.reply.body)
        yield from json_changes(a, b) if a != b else ["body: the same JSON, written otherwise"]


def _value(body: bytes) -> Any:
    try:
        return decode_json(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace")


def json_changes(old: Any, new: Any, path: str = "$") -> Iterator[str]:
    """Yield each difference of two JSON values with its path.

    >>> list(json_changes({"a": [1, 2], "b": 1}, {"a": [1, 3]}))
    ['$.a[1]: 2 -> 3', '$.b: 1 -> nothing']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            if name not in new:
                yield f"{path}.{name}: {_short(old[name])} -> nothing"
            elif name not in old:
                yield f"{path}.{name}: nothing -> {_short(new[name])}"
            else:
                yield from json_changes(old[name], new[name], f"{path}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from json_changes(a, b, f"{path}[{index}]")
    elif old != new or type(old) is not type(new):
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def needles_from(environment: Mapping[str, str]) -> Needles:
    """Return the values of variables with a secret's name: none of them may stand in a cassette."""
    return needles_of(frozenset(value for name, value in environment.items() if is_secret_field(name) and value))


def secrets_in(exchange: Exchange, needles: Needles = ()) -> list[str]:
    """Return the places that hold a secret: what the redaction would change, were the exchange written now."""
    request, reply = exchange.request, exchange.reply
    clean = redact_request(request, needles)
    found = []
    if clean.url != request.url:
        found.append("the request's address")
    if clean.body != request.body:
        found.append("the request's body")
    if redact_body(reply.body, needles)[0] != reply.body:
        found.append("the answer's body")
    for side, headers in (("request's", request.headers), ("answer's", reply.headers)):
        found += [f"the {side} header {name}" for name, value in headers.items() if _is_secret(name, value, needles)]
    if exchange.facts.error and redact_text(exchange.facts.error[1], needles) != exchange.facts.error[1]:
        found.append("the recorded error")
    return found


def _is_secret(name: str, value: str, needles: Needles) -> bool:
    if value == PLACEHOLDER:
        return False
    is_named = name.lower() in _SECRET_HEADERS or is_secret_field(name)
    return (is_named and value != "") or redact_text(value, needles) != value


def too_old(exchange: Exchange, now: datetime, limit: timedelta) -> str | None:
    """Say since when an exchange is too old; None for a fresh one. One of unknown age is not fresh."""
    if not exchange.facts.at:
        return "recorded at an unknown time"
    recorded = datetime.fromisoformat(exchange.facts.at)
    return f"recorded {(now - recorded).days} days ago" if now - recorded > limit else None


def check(recording: Recording, *, needles: Needles, now: datetime, max_age: timedelta | None) -> list[str]:
    """Return what is wrong with a cassette that could be read; the problems of an exchange name it."""
    problems = [*recording.findings]
    if recording.state == "open" and not problems:
        problems.append("not closed: its recording was killed or still runs; record again to take it up")
    for row in recording.rows:
        exchange = row.exchange()
        if not _is_as_written(row, exchange):
            problems.append(f"{exchange_id(row)}: its key or its hash is not its own; it was edited: record again")
        if places := secrets_in(exchange, needles):
            problems.append(f"{exchange_id(row)}: a secret in {', '.join(places)}; revoke it, then record again")
        if max_age is not None and (age := too_old(exchange, now, max_age)):
            problems.append(f"{exchange_id(row)}: {age}; record again")
    return problems


def _is_as_written(row: Row, exchange: Exchange) -> bool:
    """Say whether key and hash are the exchange's own; where the file's hash is right, a replay takes them on trust."""
    request = exchange.request
    return row.place.key == raw_key(request.method, request.url, request.body) and line_is_whole(row.line)


def orphans(recording: Recording, unplayed: frozenset[str] | None) -> list[str]:
    """Return what no test plays: `unplayed` of a cassette that tests opened, all of one that none did (None)."""
    if unplayed is None:
        return ["no test plays it; delete it, or run its tests"]
    return [f"{name}: no test plays it" for row in recording.rows if (name := exchange_id(row)) in unplayed]


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


def _pretty(body: bytes) -> str:
    value = _value(body)
    return value if isinstance(value, str) else msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
