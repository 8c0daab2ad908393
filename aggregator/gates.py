"""Gates, which accept or refuse an update, and checks, which refuse single values."""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.training.gates": (
        "always",
        "both",
        "improves_on_batch",
        "improves_on_validation",
        "keeps_placeholders",
        "leak_guard",
        "max_edit",
    ),
    "aggregator.training.step": ("Check", "Gate"),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
