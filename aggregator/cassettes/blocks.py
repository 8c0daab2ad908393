"""Reading everything but journals: our readable layout, and whatever vcrpy wrote."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from aggregator.cassettes.documents import BUDGET, Budget, parse_document
from aggregator.cassettes.exchanges import Exchange, encode_line
from aggregator.cassettes.foreign import facts_of, interactions_of, to_exchange
from aggregator.cassettes.keys import Ignore, request_key
from aggregator.cassettes.redaction import needles_for, redact_line, redact_request
from aggregator.cassettes.rows import REMEDY, Recording, index_lines
from aggregator.errors import CassetteDamagedError, CassetteRefusedError


def read_blocks(
    content: bytes,
    where: str,
    ignore: Ignore,
    *,
    intact: bool,
    skipped: int,
    redact: bool = True,
    budget: Budget = BUDGET,
) -> Recording:
    """Read a YAML or JSON cassette; `intact` says that it states its hash, `skipped` how many lines came before."""
    document, starts = parse_document(content, where, budget)
    items = interactions_of(document, where)
    facts = [facts_of(item) for item in items]
    ours = ["sha256" in fact for fact in facts]
    calls: dict[bytes, int] = {}
    lines: list[bytes] = []
    size = 0
    for index, item in enumerate(items):
        place = f"{where}:{starts.get(id(item), 0) + skipped}" if starts else f"{where}, interaction {index + 1}"
        exchange = to_exchange(item, facts[index] if ours[index] else {}, place)
        lines.append(
            _checked(facts[index], exchange, place) if ours[index] else _adopted(exchange, index, calls, redact=redact)
        )
        size += len(lines[-1])
        if size > budget.total:  # one body under many aliases, or many that unpack to much
            raise CassetteRefusedError(
                f"expected a cassette of at most {budget.total:,} bytes, got one that unpacks to more - at {place}; "
                "do not trust this file, or split it if it is yours"
            )
    findings = []
    if any(ours) and not intact and not skipped:
        findings.append(f"{where}: its leading comment is gone, so an exchange cut off at the end would not be seen")
    return Recording(
        rows=tuple(index_lines(lines, ignore)),
        state="closed" if intact else "foreign",
        layout="readable" if any(ours) or intact else "foreign",
        findings=tuple(findings),
    )


def _checked(facts: dict[str, Any], exchange: Exchange, place: str) -> bytes:
    """Return the journal line of one of our own, whose hash must be right."""
    line = encode_line(exchange)
    if not line.endswith(rb'\"sha256\":\"%b\"}"}' % str(facts["sha256"]).encode()):
        raise CassetteDamagedError(
            f"expected the exchange whose hash stands beside it, got another - at {place}; {REMEDY}"
        )
    return line


def _adopted(exchange: Exchange, index: int, calls: dict[bytes, int], *, redact: bool) -> bytes:
    """Return the line of another tool's exchange: no lineage, played in the order of the file, secrets redacted."""
    request = redact_request(exchange.request) if redact else exchange.request
    key = request_key(request.method, request.url, request.body)
    ticket = calls[key] = calls.get(key, -1) + 1
    placed = replace(exchange, request=request, facts=replace(exchange.facts, ticket=ticket, order=index))
    return redact_line(placed, needles_for(exchange.request)) if redact else encode_line(placed)
