"""Watching a run: observers, the console, the progress bar, trackers, structlog set-up.

May import: llm (the ledger), protocols, records and below. Observers read records; they never change a run.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.observing.configuring": ("configure_logging",),
    "aggregator.observing.observer": (
        "ConsoleLogger",
        "LoggingObserver",
        "Observer",
        "ProgressBar",
        "TensorBoardLogger",
        "WandbLogger",
        "as_observer",
        "from_logger",
    ),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
