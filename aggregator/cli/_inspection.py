"""What a recorded cassette holds, as facts: totals, differences, what is wrong with it.

Pure functions over rows and exchanges, beside `find_cassettes`; `aggregator cassette` prints what they return.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.agents.code import plain_source
from aggregator.cassettes.credentials import Needles
from aggregator.cassettes.exchanges import Exchange, Recording, Row, exchange_id, line_is_whole
from aggregator.cassettes.matching import decode_json, raw_key
from aggregator.cassettes.storage import GZIP
from aggregator.cli._secrets import needles_from, secrets_in
from aggregator.cli._usage import model_of, usage_of
from aggregator.errors import ConfigError

__all__ = ["model_of", "needles_from", "secrets_in", "usage_of"]  # with what is defined here

SUFFIXES = frozenset({".yaml", ".yml", ".json", ".har", ".gz"})
_SHARD = re.compile(r"(.*)\.[0-9a-f]{12}\.\d{4}")
_CASSETTE = re.compile(
    rb"""(?:^|[{,])\s*["']?(?:http_)?interactions["']?\s*:|^# aggregator-cassette|^- \{?"?request"?:"""
    rb"""|^\s*\{\s*"log"\s*:\s*\{|"scope"\s*:\s*"https?:|"RequestUri"\s*:""",
    re.MULTILINE,
)
_HEAD = 4_096


def find_cassettes(paths: Iterable[Path]) -> list[Path]:
    """Return the cassettes that files and folders stand for; a cassette's further shards belong to its first.

    What is no cassette is passed over in a folder. Raises ConfigError for a path that is not there.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file())
            found += (file for file in files if _is_first(file) and _looks_like_cassette(file))
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"Expected a cassette or a folder of them, got {str(path)!r}, which is not there")
    return list(dict.fromkeys(found))


def _is_first(path: Path) -> bool:
    """Say whether a file is a cassette's first shard, or one whose first is gone, which has to be told."""
    shard = _SHARD.fullmatch(path.stem)
    return shard is None or not path.with_name(f"{shard[1]}{path.suffix}").exists()


def _looks_like_cassette(path: Path) -> bool:
    """Say whether a file begins as a cassette does, or begins with nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:  # whoever reads it tells why
        return True
    if head.startswith(GZIP):
        head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    return not head.strip() or bool(_CASSETTE.search(head.removeprefix(b"\xef\xbb\xbf")))


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


def too_old(exchange: Exchange, now: datetime, limit: timedelta) -> str | None:
    """Say since when an exchange is too old; None for a fresh one. One of unknown age is not fresh."""
    try:
        recorded = datetime.fromisoformat(exchange.facts.at)
    except ValueError:
        return "recorded at an unknown time"
    recorded = recorded if recorded.tzinfo else recorded.replace(tzinfo=UTC)
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
    return row.facts.key == raw_key(request.method, request.url, request.body) and line_is_whole(row.line)


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


def suggested_code(recording: Recording) -> dict[str, str]:
    """Return the code that recorded suggestions hold: sha256 of the source -> parameter and exchange that has it first.

    A replay lets it run in this process only with `cassette(..., code=...)`.
    """
    from aggregator.agents.consent import source_digest
    from aggregator.errors import SuggestionError
    from aggregator.training.replies import parse_reply

    found: dict[str, str] = {}
    for row in recording.rows:
        exchange = row.exchange()
        for text in _texts(exchange.reply.body):
            if "def " not in text or "suggestion" not in text.lower():
                continue
            try:
                suggestion = parse_reply(text).suggestion or {}
            except SuggestionError:
                continue
            for name, value in suggestion.items():
                if isinstance(value, str) and _is_function(value):
                    found.setdefault(source_digest(value), f"{name} in {exchange_id(row)}")
    return found


def _texts(body: bytes) -> Iterator[str]:
    """Yield the texts in an answer; those of a stream joined."""
    if body.lstrip().startswith((b"data:", b"event:", b":")):
        lines = (line[5:].strip() for line in body.splitlines() if line.startswith(b"data:"))
        yield "".join(text for line in lines for text in _strings(value_of(line)))
    else:
        yield from _strings(value_of(body))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _is_function(text: str) -> bool:
    try:
        body = ast.parse(plain_source(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef)


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
