"""Stops, which end a run before its last step."""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.training.stops": ("Reached", "Stop", "patience", "seconds", "target"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
