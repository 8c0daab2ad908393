"""Schedules of the stepsize: functions of (step, number of steps)."""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.training.schedules": ("Schedule", "constant", "cosine", "linear"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
