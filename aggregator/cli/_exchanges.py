"""The content of cassettes: one exchange, the difference of two cassettes, and all files in a folder.

`aggregator cassette` prints what these functions return. Model and tokens are read from our own facts or from the
provider's fields (`llm/reading.py`). Secrets are values that the redaction would remove; placeholders of other tools'
scrubbers are not secrets. The account of the last pytest run is in the cache that the plugin writes.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import msgspec
from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import decode

from aggregator.agents.code import plain_source
from aggregator.cassettes.credentials import (
    SHORTEST,
    Needles,
    is_placeholder,
    is_secret_field,
    is_secret_parameter,
    is_worth_finding,
    needles_of,
)
from aggregator.cassettes.exchanges import Exchange, Recording, Row, exchange_id, line_is_whole
from aggregator.cassettes.journal import is_open_journal
from aggregator.cassettes.matching import decode_json, raw_key
from aggregator.cassettes.redaction import SECRET_HEADERS, hides_parameter_always, is_kept, redact_cookies, removed_from
from aggregator.cassettes.secrets import query_edits, secret_edits
from aggregator.cassettes.storage import GZIP, followed, read
from aggregator.errors import CassetteError, ConfigError
from aggregator.files import FileLock
from aggregator.llm.reading import is_figure, read_model, read_usage
from aggregator.text import clip, json_changes

# ---- model and tokens of an exchange


def model_of(exchange: Exchange) -> str:
    """Return the requested model: our own fact, else from the request, the address or the answer, else ""."""
    return exchange.facts.model or read_model(exchange.request, exchange.reply)


def usage_of(exchange: Exchange) -> dict[str, int | float]:
    """Return the tokens and cost of an exchange: our own facts, else the answer's."""
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
    """Return a body as JSON, else as text, else as bytes."""
    for reading in (decode_json, bytes.decode):
        try:
            return reading(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return body


def _pretty(body: bytes) -> str:
    value = value_of(body)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


_TELLING_HEADERS = frozenset({"content-type", "location", "retry-after", "retry-after-ms", "x-should-retry"})
"""Headers that a client obeys; dates, ids and rate limits differ in every recording."""


# ---- differences of two exchanges


class Difference(Struct, frozen=True, kw_only=True):
    """How two cassettes differ: exchanges of only one, and changed answers."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed)


def difference(before: Sequence[Row], after: Sequence[Row]) -> Difference:
    """Compare two cassettes exchange by exchange, by request and lineage."""
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
    """Return an answer's status, relevant headers and error."""
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
    """Return the values of variables with a secret name, which no cassette may hold; plain words do not count."""
    values = [value for name, value in environment.items() if is_secret_field(name) and len(value) >= SHORTEST]
    return needles_of(frozenset(filter(is_worth_finding, values)))


def secrets_in(exchange: Exchange, needles: Needles = ()) -> list[str]:
    """Return the places of secrets: what the redaction would remove if the exchange were written now."""
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
    """Yield the redacted parts of an address: parameters, user and password, authentication, tokens."""
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


# ---- what recorded cassettes hold

SUFFIXES = frozenset({".yaml", ".yml", ".json", ".har", ".gz"})
_SHARD = re.compile(r"(.*)\.[0-9a-f]{12}\.\d{4}")
_CASSETTE = re.compile(
    rb"""(?:^|[{,])\s*["']?(?:http_)?interactions["']?\s*:|^# aggregator-cassette|^- \{?"?request"?:"""
    rb"""|^\s*\{\s*"log"\s*:\s*\{|"scope"\s*:\s*"https?:|"RequestUri"\s*:""",
    re.MULTILINE,
)
_HEAD = 4_096


def find_cassettes(paths: Iterable[Path]) -> list[Path]:
    """Return the cassettes in files and folders; a cassette's further shards belong to its first.

    Other files in a folder are skipped. Raises ConfigError for a path that does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file())
            found += (file for file in files if _is_first(file) and _looks_like_cassette(file))
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"Expected a cassette or a folder of them, got {str(path)!r}, which does not exist")
    return list(dict.fromkeys(found))


def _is_first(path: Path) -> bool:
    """Return True if a file is a cassette's first shard, or one whose first shard is missing, which is reported."""
    shard = _SHARD.fullmatch(path.stem)
    return shard is None or not path.with_name(f"{shard[1]}{path.suffix}").exists()


def _looks_like_cassette(path: Path) -> bool:
    """Return True if a file begins like a cassette, or is empty."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:  # reported when it is read
        return True
    if head.startswith(GZIP):
        head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
    return not head.strip() or bool(_CASSETTE.search(head.removeprefix(b"\xef\xbb\xbf")))


class Totals(Struct, frozen=True, kw_only=True):
    """Sums over exchanges. Tokens and cost are sums of known values; `unknown` counts answers without them."""

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
    """Return the totals of each (role, model), in order."""
    sums: dict[tuple[str, str], Totals] = {}
    for exchange in exchanges:
        group = (exchange.facts.role, model_of(exchange))
        sums[group] = sums.get(group, Totals()) + totals_of(exchange)
    return dict(sorted(sums.items()))


def too_old(exchange: Exchange, now: datetime, limit: timedelta) -> str | None:
    """Describe the age of an expired exchange, or return None. Unknown age counts as expired."""
    try:
        recorded = datetime.fromisoformat(exchange.facts.at)
    except ValueError:
        return "recorded at an unknown time"
    recorded = recorded if recorded.tzinfo else recorded.replace(tzinfo=UTC)
    return f"recorded {(now - recorded).days} days ago" if now - recorded > limit else None


def check(recording: Recording, *, needles: Needles, now: datetime, max_age: timedelta | None) -> list[str]:
    """Return the problems of a readable cassette; those of an exchange name it."""
    problems = [*recording.findings]
    if recording.state == "open" and not problems:
        problems.append("not closed: its recording was killed or still runs; record again to take it up")
    for row in recording.rows:
        exchange = row.exchange()
        key = raw_key(exchange.request.method, exchange.request.url, exchange.request.body)
        if row.facts.key != key or not line_is_whole(row.line):
            problems.append(f"{exchange_id(row)}: its key or its hash is not its own; it was edited: record again")
        if places := secrets_in(exchange, needles):
            problems.append(f"{exchange_id(row)}: a secret in {', '.join(places)}; revoke it, then record again")
        if max_age is not None and (age := too_old(exchange, now, max_age)):
            problems.append(f"{exchange_id(row)}: {age}; record again")
    return problems


def orphans(recording: Recording, unplayed: frozenset[str] | None) -> list[str]:
    """Return the exchanges that no test plays: the `unplayed` ones, or all if no test opened the cassette (None)."""
    if unplayed is None:
        return ["no test plays it; delete it, or run its tests"]
    return [f"{name}: no test plays it" for row in recording.rows if (name := exchange_id(row)) in unplayed]


def suggested_code(recording: Recording) -> dict[str, str]:
    """Return the code in recorded suggestions: sha256 of the source -> parameter and first exchange with it.

    A replay runs it in this process only with `cassette(..., code=...)`.
    """
    from aggregator.agents.code import source_digest
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
    """Yield the texts in an answer; a stream's are joined."""
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


def read_cassette(path: Path, *, redact: bool = True) -> Recording:
    """Return a cassette's content; raises ConfigError if it does not exist, CassetteError if it cannot be read."""
    file = followed(path) if path.is_file() else path  # a pipe's link has no target
    recording = None if path.is_dir() else read(file, redact=redact)
    if recording is None:
        there = "which is a folder" if path.is_dir() else "which does not exist"
        raise ConfigError(f"Expected a cassette, got {str(path)!r}, {there}")
    return recording


def readable(paths: Iterable[Path], problems: list[str], *, redact: bool = True) -> Iterator[tuple[Path, Recording]]:
    """Yield the readable cassettes, and add an entry to the problems for each other one."""
    for path in paths:
        try:
            recording = read_cassette(path, redact=redact)
        except CassetteError as error:
            problems.append(str(error))
            continue
        yield path, recording


@contextmanager
def rewriting(path: Path) -> Iterator[None]:
    """Lock a file against recordings while it is rewritten.

    Raises CassetteLockedError if one is in progress, CassetteError if one was killed and would be continued.
    """
    path = followed(path)
    lock = FileLock(path)
    try:
        if path.is_file() and path.stat().st_size and is_open_journal(path.read_bytes()):
            raise CassetteError(
                f"Expected a finished cassette to rewrite, got a recording that was not finished ({path}); "
                'finish it: run it again with mode="once"; or convert it to another file'
            )
        yield
    finally:
        lock.release()


class Played(Struct, frozen=True):
    """The accounts of every test that opened a cassette; `complete` if all of these tests ran fully and passed."""

    unplayed: frozenset[str]
    complete: bool = True


class _Test(Struct, frozen=True):
    path: str
    unplayed: frozenset[str]
    complete: bool = True


def played(cache: Path) -> dict[Path, Played]:
    """Return the account of each cassette that a test opened; raises ConfigError if the accounts cannot be read."""
    file = cache / "v" / "aggregator" / "cassettes"
    remedy = "run pytest with the plugin first, or name its cache: --pytest-cache DIR"
    try:
        run = decode(file.read_bytes(), type=dict[str, _Test])
    except FileNotFoundError as error:
        raise ConfigError(f"Expected the account of a pytest run in {file}, got none; {remedy}") from error
    except (DecodeError, ValidationError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"Expected the account of a pytest run in {file}, got {error}; {remedy}") from error
    found: dict[Path, Played] = {}
    for test in run.values():
        path = Path(test.path).resolve()
        before = found.get(path, Played(test.unplayed))
        found[path] = Played(before.unplayed & test.unplayed, before.complete and test.complete)
    return found


def passed_over(path: Path) -> str:
    """Explain why a cassette is skipped: its tests did not all run and pass."""
    return f"{path}: passed over: a test that plays it did not pass or did not run in whole; run its tests again"
