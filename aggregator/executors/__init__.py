"""executors: where rollouts run.

May import: adapters, guides, observing, llm and the rooms below them.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.executors.local": ("LocalExecutor",),
    "aggregator.executors.process": ("ProcessExecutor",),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
