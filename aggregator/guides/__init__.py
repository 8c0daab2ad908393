"""Guides judge an agent's output: exact match, pattern, keywords, number, LLM judge, or any callable.

May import: llm, agents, cassettes and below. A guide keeps no state between calls, so instances share it safely.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.guides.calling": ("metric",),
    "aggregator.guides.judge": (
        "LLMJudge",
        "Verdict",
    ),
    "aggregator.guides.matching": (
        "ExactMatch",
        "KeywordHints",
        "NumericMatch",
        "RegexMatch",
        "exact_match",
    ),
    "aggregator.records": ("Scores",),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
