"""sandbox: trained code in a worker process with limits, or in Monty. Knows nothing about parameters.

May import: protocols, records, errors, text, files, checks, portal.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {"aggregator.sandbox.limits": ("Limits", "sandboxed")}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
