"""One call to a model: encode, ask the tape, reserve budget, wait for the limiter, send, retry, decode, settle.

May import: agents (transcripts), cassettes (the tape) and below. aiohttp is imported in `transport.py` only.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.llm.client": ("LLM",),
    "aggregator.llm.budget": ("Budget", "Estimate", "estimate"),
    "aggregator.llm.ledger": ("Price",),
    "aggregator.llm.messages": ("Image",),
    "aggregator.llm.models": ("as_model",),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
