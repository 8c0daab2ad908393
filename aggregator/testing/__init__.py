"""For tests: the pytest plugin, and fakes of a transport and of a model.

May import every room below the command line. Nothing is loaded before its first use, because pytest loads the plugin in
every project.
"""

from __future__ import annotations

from aggregator import _face

_HOMES: dict[str, tuple[str, ...]] = {
    "aggregator.testing.fakes": (
        "FakeTransport",
        "ScriptedModel",
        "error_reply",
        "stream_reply",
        "suggestion",
        "text_reply",
    ),
}

__getattr__, __dir__ = _face(__name__, _HOMES)
__all__ = sorted(name for names in _HOMES.values() for name in names)  # noqa: PLE0605 - the table's
