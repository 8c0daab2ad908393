"""Searches: which candidates are explored, tried, made current and remembered.

`examples/extending/search.py` shows a custom one.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.records": ("Candidate",),
    "aggregator.training.searches": ("beam", "greedy", "pareto", "priority", "sequential"),
    "aggregator.training.step": ("Search",),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
